"""Block sizes, warps and stages of the Triton kernels: from a table by size class and device, never by trying out.

The table is kernels/triton/configurations.json; benchmarks/compiler/tune.py makes it.
"""

from __future__ import annotations

import itertools
import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch

# Bytes that one program may have.
SHARED_MEMORY = {"sm_100": 227 * 1024, "sm_90": 227 * 1024, "sm_80": 163 * 1024, "gfx942": 64 * 1024}

INTERPRETER = "interpreter"
FEATURES_INTERPRETED = 64  # a step costs the interpreter the same, whatever it holds


def load() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files("otfuse.kernels.triton") / "configurations.json").read_text())
    return table


_TABLE = load()

# By kernel and dtype: the size classes, which are named by the most entries of a tile.
CLASSES = {
    kernel: {dtype: [int(size) for size in sizes if size.isdigit()] for dtype, sizes in dtypes.items()}
    for kernel, dtypes in _TABLE["configurations"].items()
}


def size_class(kernel: str, dtype: str, BLOCK_N: int, BLOCK_M: int) -> int:
    return next(size for size in CLASSES[kernel.partition(",")[0]][dtype] if size >= BLOCK_N * BLOCK_M)


@cache
def _configuration(kernel: str, dtype: str, BLOCK_N: int, BLOCK_M: int, target: str) -> tuple[int, int, int]:
    """BLOCK_D, num_warps, num_stages: the target's own before everybody's, a tile's own before its class's.

    Of "forward, cost", which is the forward without tokens, what it has for itself, before what the forward has.
    """
    names = (f"{BLOCK_N}x{BLOCK_M}", str(size_class(kernel, dtype, BLOCK_N, BLOCK_M)))
    tables = (_TABLE["overrides"].get(target, {}), _TABLE["configurations"])
    for own in dict.fromkeys((kernel, kernel.partition(",")[0])):
        for table, name in itertools.product(tables, names):
            if found := table.get(own, {}).get(dtype, {}).get(name):
                BLOCK_D, num_warps, num_stages = found
                return BLOCK_D if target != INTERPRETER else FEATURES_INTERPRETED, num_warps, num_stages
    raise KeyError(f"no configuration of {kernel} for {dtype}")


def block_sizes(kernel: str, dtype: str, BLOCK_N: int, BLOCK_M: int, target: str) -> dict[str, int]:
    """What a kernel is launched with for a tile of BLOCK_N x BLOCK_M."""
    BLOCK_D, num_warps, num_stages = _configuration(kernel, dtype, BLOCK_N, BLOCK_M, target)
    blocks = {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "num_warps": num_warps, "num_stages": num_stages}
    if not kernel.startswith("loss"):
        blocks["BLOCK_D"] = BLOCK_D
    return blocks


@cache
def target_of(device: torch.device) -> str:
    """The target of the table that a device counts as: itself, or the one with the most shared memory that it has."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    name = name or f"sm_{properties.major}{properties.minor}"
    if name in SHARED_MEMORY:
        return name
    memory = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return next((target for target, least in SHARED_MEMORY.items() if least <= memory), "gfx942")
