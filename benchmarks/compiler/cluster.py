"""Rows of the compiler's table: all rounds over a cluster (``otfuse._backends.triton.cluster``)."""

from __future__ import annotations

import itertools

import torch

from benchmarks.compiler.launches import Launch
from otfuse._backends.triton.cluster import HELD, cluster_blocks
from otfuse._backends.triton.paths import cluster_size, fits_on_chip

_KERNEL = ("cluster", "_rounds_kernel")
_SOLUTION = "weights_ptr items_ptr first_ptr exponent_ptr scaling_ptr f_ptr g_ptr error_ptr"
LAUNCHES = {
    "cluster": Launch(
        *_KERNEL, "cluster", "matrix_ptr", _SOLUTION + " history_ptr", {"STOPS": False, "HISTORY": 2}
    ),
    "cluster, inference": Launch(
        *_KERNEL, "cluster, inference", "matrix_ptr", _SOLUTION, {"STOPS": False, "HISTORY": 0}
    ),
    "cluster, everything": Launch(
        *_KERNEL, "cluster, everything", "matrix_ptr", _SOLUTION + " history_ptr", {"STOPS": True, "HISTORY": 2}, False
    ),
    "cluster, backward": Launch(
        "cluster_backward", "_adjoint_rounds_kernel", "cluster, backward", "matrix_ptr",
        "weights_ptr history_ptr exponents_ptr start_ptr pull_ptr total_ptr", {},
    ),
}  # fmt: skip


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    """All that are launched, of a cost or of the similarity of tokens, which is in float32; of the others some."""
    if dtype == "float64":
        return []
    if dtype in ("bfloat16", "float16") or not LAUNCHES[name].everywhere:
        return [(512, 512), (256, 256)] if dtype != "float32" else [(1024, 512), (256, 256)]
    sides = [16 << power for power in range(7)]
    return [tile for tile in itertools.product(sides, sides) if launched(dtype, tile, max(HELD.values()))]


def launched(dtype: str, tile: tuple[int, int], held: int) -> bool:
    """Tokens fit on chip less often than a cost, so these are more than either's."""
    return cluster_size(*tile, held) > 0 and not fits_on_chip(*tile, 1, getattr(torch, dtype))


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    return cluster_blocks(*tile, HELD[target])


def runs(dtype: str, tile: tuple[int, int], target: str) -> bool:
    """Whether a target has it."""
    return launched(dtype, tile, HELD[target])
