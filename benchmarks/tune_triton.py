"""Chooses what kernels/triton/configurations.json holds for the fused forward and backward.

``python benchmarks/tune_triton.py [--only forward bfloat16 …]`` on a GPU: times the candidates of every kernel, dtype
and size class, and writes the fastest, after its result has been held against the specification. With ``--ahead`` no
GPU is needed: the first candidate is taken, for every target, of which nothing in the class has a stack, or else the
one with the least; a class takes some minutes of a core. Run benchmarks/ahead_of_time.py afterwards, and review what
changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import ahead_of_time
import torch
from ahead_of_time import KERNELS, Row, compiling, try_row

import otfuse
from otfuse.backends import _triton_configurations as configurations
from otfuse.testing import clustered_tokens

CONFIGURATIONS = KERNELS / "configurations.json"
REPRESENTATIVE = {512: (32, 16), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}
KINDS = ("forward", "backward")
BATCH, D = 256, 768

Configuration = tuple[int, int, int]


def candidates(dtype: str, size: int) -> list[Configuration]:
    """BLOCK_D, num_warps, num_stages, in the order of ``--ahead``: large steps before small, few warps before many.

    A tile of 8,192 entries leaves no registers for larger steps, nor for a second one in flight.
    """
    features = {"float64": (16, 8), "float32": (32, 16, 8)}.get(dtype, (64, 32, 16))
    if size >= 8192:
        return list(itertools.product(features[-2:], (8, 16), (1,)))
    warps = (4, 2) if size <= 512 else (4, 8) if size <= 2048 else (8, 16)
    return list(itertools.product(features, warps, (2, 1)))


def choose_ahead(kernel: str, dtype: str, size: int, target: str) -> tuple[Configuration, int]:
    """The first candidate without a stack whose tiles fit, or the one with the least stack; and how much it is."""
    tiles = ahead_of_time.tiles(kernel, dtype)
    rows = [
        Row(name, dtype, tile, target)
        for name, variant in ahead_of_time.VARIANTS.items()
        for tile in tiles
        if variant.configured == kernel and configurations.size_class(kernel, dtype, *tile) == size
    ]
    best, least = candidates(dtype, size)[-1], sys.maxsize
    for candidate in candidates(dtype, size):
        most = 0
        for row in rows:
            if most < least:
                most = max(most, _stack(row, candidate))
        if most < least:
            best, least = candidate, most
        if least == 0:
            break
    return best, least


def _stack(row: Row, candidate: Configuration) -> int:
    """Bytes a thread; more than any where it does not compile or does not fit."""
    found = try_row(row, _blocks(row.tile, candidate))
    too_much = isinstance(found, str) or found.shared > configurations.SHARED_MEMORY[row.target]
    return sys.maxsize - 1 if too_much else found.stack


def tune_ahead(wanted: list[tuple[str, str, int]], table: dict[str, Any]) -> None:
    """Every target's own choice; what is not as on sm_90 is written down as an override."""
    tasks = [(*task, target) for task in wanted for target in ahead_of_time.TARGETS]
    with compiling(processes=6) as pool:
        found = {}
        for task, (chosen, stack) in zip(tasks, pool.map(choose_ahead, *zip(*tasks))):
            found[task] = chosen
            print(*task, chosen, f"stack {stack}", flush=True)
    for (kernel, dtype, size, target), chosen in found.items():
        everybody = found[kernel, dtype, size, "sm_90"]
        table["configurations"][kernel][dtype][str(size)] = list(everybody)
        own = table["overrides"].setdefault(target, {}).setdefault(kernel, {}).setdefault(dtype, {})
        for name in [name for name in own if name == str(size) or "x" in name]:
            del own[name]
        if chosen != everybody:
            own[str(size)] = list(chosen)
    table["overrides"] = without_empty(table["overrides"])
    write(table)


def without_empty(table: dict[str, Any]) -> dict[str, Any]:
    kept = {name: without_empty(value) if isinstance(value, dict) else value for name, value in table.items()}
    return {name: value for name, value in kept.items() if value != {}}


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


def tune_measured(wanted: list[tuple[str, str, int]], table: dict[str, Any]) -> None:
    for kernel, dtype, size in wanted:
        costs = cost_measured(kernel, dtype, size)
        best = min(range(len(costs)), key=costs.__getitem__)
        chosen = candidates(dtype, size)[best]
        print(f"{kernel} {dtype} {size}: {chosen}, {costs[best]:g} ms", flush=True)
        if costs[best] < float("inf"):
            table["configurations"][kernel][dtype][str(size)] = list(chosen)
            write(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ahead", action="store_true", help="by resources, without a GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernel, dtype, class: those that match")
    options = parser.parse_args()
    wanted = [
        (kernel, dtype, size)
        for kernel, dtype in itertools.product(KINDS, ahead_of_time.DTYPES)
        for size in configurations.CLASSES[kernel][dtype]
        if set(options.only) <= {kernel, dtype, str(size)}
    ]
    (tune_ahead if options.ahead else tune_measured)(wanted, json.loads(CONFIGURATIONS.read_text()))


if __name__ == "__main__":
    main()
