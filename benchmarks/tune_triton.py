"""Chooses what kernels/triton/configurations.json holds for the fused forward and backward.

``python benchmarks/tune_triton.py [--only forward bfloat16 …]`` on a GPU: times the candidates of every kernel, dtype
and size class, and writes the fastest, after its result has been held against the specification. With ``--ahead`` no
GPU is needed: the candidate is taken that needs the least stack, then the fewest registers, on sm_90. Run
benchmarks/ahead_of_time.py afterwards, and review what changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import ahead_of_time
import torch
from ahead_of_time import KERNELS, Row, compile_rows

import otfuse
from otfuse.backends import _triton_configurations as configurations
from otfuse.testing import clustered_tokens

CONFIGURATIONS = KERNELS / "configurations.json"
REPRESENTATIVE = {512: (32, 16), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}
KINDS = ("forward", "backward")
BATCH, D = 256, 768

Configuration = tuple[int, int, int]


def candidates(dtype: str, size: int) -> list[Configuration]:
    """BLOCK_D, num_warps, num_stages. Blocks of float32 and float64 beyond these cost a stack everywhere."""
    features = {"float64": (16,), "float32": (16, 32)}.get(dtype, (16, 32, 64))
    warps = (4,) if size <= 512 else (4, 8) if size <= 2048 else (8, 16)
    return list(itertools.product(features, warps, (1, 2)))


def cost_ahead(kernel: str, dtype: str, size: int) -> list[float]:
    """What each candidate asks of an sm_90, the stack first; infinite where it does not fit."""
    tile = REPRESENTATIVE[size]
    row = Row(kernel, dtype, tile, "sm_90")
    blocks = [_blocks(tile, candidate) for candidate in candidates(dtype, size)]
    found = compile_rows([row] * len(blocks), blocks)
    limit = configurations.SHARED_MEMORY[row.target]
    return [
        float("inf")
        if isinstance(resources, str) or resources.shared > limit
        else (resources.stack * 1e6 + resources.registers) * block["num_warps"]
        for resources, block in zip(found, blocks)
    ]


def _blocks(tile: tuple[int, int], candidate: Configuration) -> dict[str, int]:
    return dict(zip(("BLOCK_N", "BLOCK_M", "BLOCK_D", "num_warps", "num_stages"), tile + candidate))


def cost_measured(kernel: str, dtype: str, size: int) -> list[float]:
    """Milliseconds of each candidate on this GPU; infinite where it does not run, or is wrong."""
    N, M = REPRESENTATIVE[size]
    tokens = clustered_tokens(BATCH, N, M, D, dtype=getattr(torch, dtype), device="cuda")
    x, y = (t.requires_grad_(kernel == "backward") for t in tokens)
    expected = _results(kernel, x, y, "torch")
    target = configurations.target_of(x.device)
    costs = []
    for candidate in candidates(dtype, size):
        _use(kernel, dtype, size, target, candidate)
        try:
            for found, wanted in zip(_results(kernel, x, y, "triton"), expected):
                torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
            costs.append(_milliseconds(lambda: _results(kernel, x, y, "triton")))
        except Exception as error:  # out of resources, or wrong: no candidate either way
            print(f"{kernel} {dtype} {size} {candidate}: {str(error).splitlines()[0]}")
            costs.append(float("inf"))
    return costs


def _results(kernel: str, x: torch.Tensor, y: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """Backward is timed with its forward, whose configuration stays the same meanwhile."""
    out = otfuse.sinkhorn_attend(x, y, 0.1, num_iters=20, backend=backend)
    return (out.x, out.y) if kernel == "forward" else torch.autograd.grad((out.x.sum() + out.y.sum()), (x, y))


def _use(kernel: str, dtype: str, size: int, target: str, candidate: Configuration) -> None:
    """For this process; ahead of whatever the file says of this target."""
    own = configurations._TABLE["overrides"].setdefault(target, {}).setdefault(kernel, {}).setdefault(dtype, {})
    own[str(size)] = candidate
    own["x".join(map(str, REPRESENTATIVE[size]))] = candidate
    configurations._configuration.cache_clear()


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median of replays of a CUDA graph, so that nothing of the host is in it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def write(table: dict[str, Any]) -> None:
    """As JSON, with what belongs to one dtype on one line."""
    text = json.dumps(table, indent=2)
    text = re.sub(r"\[\s+([^][]*?)\s+\]", lambda found: f"[{re.sub(chr(10) + ' +', ' ', found[1])}]", text)
    text = re.sub(r"\{\s+([^{}]*?\])\s+\}", lambda found: f"{{{re.sub(chr(10) + ' +', ' ', found[1])}}}", text)
    CONFIGURATIONS.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ahead", action="store_true", help="by resources, without a GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernel, dtype, class: those that match")
    options = parser.parse_args()
    table = json.loads(CONFIGURATIONS.read_text())
    for kernel, dtype in itertools.product(KINDS, ahead_of_time.DTYPES):
        for size in configurations.CLASSES[kernel][dtype]:
            if not set(options.only) <= {kernel, dtype, str(size)}:
                continue
            costs = (cost_ahead if options.ahead else cost_measured)(kernel, dtype, size)
            best = min(range(len(costs)), key=costs.__getitem__)
            chosen = candidates(dtype, size)[best]
            print(f"{kernel} {dtype} {size}: {chosen}, {costs[best]:g}", flush=True)
            if costs[best] < float("inf"):
                table["configurations"][kernel][dtype][str(size)] = list(chosen)
                write(table)


if __name__ == "__main__":
    main()
