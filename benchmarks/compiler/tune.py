"""Chooses what kernels/triton/configurations.json holds for the kernels on chip.

``python -m benchmarks.compiler.tune [--only forward bfloat16 …]`` on a GPU: times the candidates of the fused forward
and backward, of every dtype and size class, and writes the fastest for this GPU, after its result has been held against
the specification. With ``--ahead`` no GPU is needed: tile by tile and target by target, what is configured stays where
nothing spills with it; else the first candidate is taken of which that is true, or, in a backward, the one that spills
least. Every choice is written at once; ``--only`` goes on where a run has ended. Run ``make resources`` afterwards, and
review what changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import otfuse
from benchmarks.answers import with_gradient
from benchmarks.compiler import table as resources
from benchmarks.compiler.launches import Resources, Row
from benchmarks.compiler.table import compiling, try_row
from benchmarks.contenders import Contender
from benchmarks.measuring import device_seconds
from benchmarks.results import ROOT
from otfuse._backends.triton import configurations
from otfuse.testing import clustered_tokens

CONFIGURATIONS = ROOT / "otfuse/kernels/triton/configurations.json"
Configuration = tuple[int, int, int]  # BLOCK_D, num_warps, num_stages
REPRESENTATIVE = {512: (32, 16), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}
KINDS = ("forward", "backward")
FEATURES = {"float64": (16, 8), "float32": (32, 16, 8), "bfloat16": (64, 32, 16), "float16": (64, 32, 16)}
# Of a backward, ahead of time: the tiles that are searched through; the others are configured by their class.
BACKWARD = [(64, 64), (128, 128)]
BATCH, D = 256, 768
NO_GOOD = sys.maxsize - 1  # for spills: does not compile, or does not fit


def candidates(dtype: str, size: int) -> list[Configuration]:
    """BLOCK_D, num_warps, num_stages: large steps before small, few warps before many.

    A tile of 8,192 entries leaves no registers for larger steps, nor for a second one in flight.
    """
    if size >= 8192:
        return list(itertools.product(FEATURES[dtype][-2:], (8, 16), (1,)))
    warps = (4, 2) if size <= 512 else (4, 8) if size <= 2048 else (8, 16)
    return list(itertools.product(FEATURES[dtype], warps, (2, 1)))


def candidates_ahead(kernel: str, dtype: str, tile: tuple[int, int], target: str) -> list[Configuration]:
    """The configured one first; then more warps than would be timed, and of a forward fewer, and more stages."""
    size = tile[0] * tile[1]
    features = FEATURES[dtype] if size <= 2048 else FEATURES[dtype][-2:]
    warps: tuple[int, ...] = (4, 8, 16, 2) if size <= 2048 else (8, 16, 4)
    if kernel == "backward":
        warps = warps[:2]
    rest = list(itertools.product(features, warps, (2, 1)))
    rest += itertools.product(features, warps, (3,)) if kernel == "forward" else ()
    configured = resources.configuration_of(rows_of(kernel, dtype, tile, target)[0])
    if kernel == "forward, cost":  # without tokens there are no steps
        warps = (4, 2, 8, 16) if size <= 2048 else warps
        rest = [(configured[0], num_warps, configured[2]) for num_warps in warps]
    return list(dict.fromkeys([configured, *rest]))


def rows_of(kernel: str, dtype: str, tile: tuple[int, int], target: str) -> list[Row]:
    """The rows of the table that are chosen by, which are configured together; first what most often spills."""
    names, dtypes = [kernel], [dtype]
    if kernel == "forward":
        of_kernel = [name for name, launch in resources.LAUNCHES.items() if launch.configured == kernel]
        names = sorted((name for name in of_kernel if "cost" not in name), key="forward, inference".__ne__)
    if kernel == "backward":
        names += ["backward, implicit", *(["backward, cost"] if dtype == "float32" else [])]
    if kernel == "forward, cost" and dtype == "float32":
        dtypes = ["float32", "bfloat16", "float16"]
    return [Row(name, of, tile, target) for name in names for of in dtypes if tile in resources.tiles(name, of)]


def choose_ahead(kernel: str, dtype: str, tile: tuple[int, int], target: str) -> tuple[Configuration, int]:
    """The first candidate without spills in any row, or the one with the least; and how many bytes."""
    best, least = (0, 0, 0), sys.maxsize
    for candidate in candidates_ahead(kernel, dtype, tile, target):
        most = 0
        for row in rows_of(kernel, dtype, tile, target):
            if most < (least if kernel == "backward" else 1):
                most = max(most, _spills(row, _compiled(row, candidate)))
        if most < least:
            best, least = candidate, most
        if least == 0:
            break
    return best, least


def _compiled(row: Row, candidate: Configuration) -> Resources | str:
    """Resources, or the name of the error."""
    blocks = dict(zip(("BLOCK_N", "BLOCK_M", "BLOCK_D", "num_warps", "num_stages"), row.tile + candidate))
    found = try_row(row, blocks)
    return found.partition(":")[0] if isinstance(found, str) else found


def _spills(row: Row, found: Resources | str) -> int:
    """Bytes a thread; more than any where it does not compile or does not fit."""
    if isinstance(found, str) or found.shared > configurations.SHARED_MEMORY[row.target]:
        return NO_GOOD
    return found.spills


Task = tuple[str, str, tuple[int, int], str]  # kernel, dtype, tile, target


def tasks_ahead(only: set[str]) -> list[Task]:
    """Everything to be chosen, or what has all of these words: kernel, dtype, class, tile, target."""
    kinds = {
        "forward": resources.DTYPES,
        "forward, cost": ("float64", "float32"),  # which half precision is solved in
        "backward": ("float32", "bfloat16", "float16"),
    }
    tasks = []
    for kernel, dtype in [(kernel, dtype) for kernel, dtypes in kinds.items() for dtype in dtypes]:
        tiles = resources.tiles(kernel, dtype) if kernel != "backward" else BACKWARD
        for tile, target in itertools.product(tiles, resources.TARGETS):
            size = configurations.size_class(kernel, dtype, *tile)
            if only <= {*kernel.split(", "), dtype, str(size), f"{tile[0]}x{tile[1]}", target}:
                tasks.append((kernel, dtype, tile, target))
    return tasks


def tune_ahead(tasks: list[Task], table: dict[str, Any], processes: int) -> None:
    """What is not as configured becomes an override of its tile and target."""
    with compiling(processes) as pool:
        for task, (chosen, spills) in zip(tasks, pool.map(choose_ahead, *zip(*tasks))):
            kernel, dtype, tile, target = task
            if spills == NO_GOOD:
                print(*task, "nothing compiles", flush=True)
            elif chosen != resources.configuration_of(rows_of(*task)[0]):
                print(*task, chosen, f"spills {spills}", flush=True)
                of_target = table["overrides"].setdefault(target, {}).setdefault(kernel, {}).setdefault(dtype, {})
                of_target[f"{tile[0]}x{tile[1]}"] = list(chosen)
                write(table)


def milliseconds_of_each(kernel: str, dtype: str, size: int) -> list[float]:
    """Of the candidates, on this GPU; infinite where one does not run, or is wrong.

    A backward is timed with its forward, whose configuration stays the same meanwhile.
    """
    x, y = clustered_tokens(BATCH, *REPRESENTATIVE[size], D, dtype=getattr(torch, dtype), device="cuda")
    inputs = (x, y) if kernel == "forward" else (x, y, torch.ones_like(x), torch.ones_like(y))

    def call(backend: str) -> Callable[..., Sequence[torch.Tensor]]:
        def attend(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = otfuse.sinkhorn_attend(x, y, 0.1, num_iters=20, backend=backend)
            return out.x, out.y

        return attend if kernel == "forward" else with_gradient(attend)

    expected, ours, costs = call("torch")(*inputs), call("triton"), []
    for candidate in candidates(dtype, size):
        _use(kernel, dtype, size, configurations.target_of(x.device), candidate)
        try:
            for found, right in zip(ours(*inputs), expected):
                torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))
            costs.append(1e3 * device_seconds(Contender("", ours), inputs, 2 * sum(t.nbytes for t in inputs)))
        except Exception as error:  # out of resources, or wrong: no candidate either way
            print(f"{kernel} {dtype} {size} {candidate}: {str(error).splitlines()[0]}")
            costs.append(float("inf"))
    return costs


def _use(kernel: str, dtype: str, size: int, target: str, candidate: Configuration) -> None:
    """For this process; ahead of whatever the file says of this target."""
    own = configurations._TABLE["overrides"].setdefault(target, {}).setdefault(kernel, {}).setdefault(dtype, {})
    own[str(size)] = candidate
    own["x".join(map(str, REPRESENTATIVE[size]))] = candidate
    configurations._configuration.cache_clear()


def write(table: dict[str, Any]) -> None:
    """As JSON, with what belongs to one dtype on one line."""
    text = json.dumps(table, indent=2)
    text = re.sub(r"\[\s+([^][]*?)\s+\]", lambda found: f"[{re.sub(chr(10) + ' +', ' ', found[1])}]", text)
    text = re.sub(r"\{\s+([^{}]*?\])\s+\}", lambda found: f"{{{re.sub(chr(10) + ' +', ' ', found[1])}}}", text)
    CONFIGURATIONS.write_text(text + "\n")


def tune_by_time(wanted: list[tuple[str, str, int]], table: dict[str, Any]) -> None:
    """The fastest becomes an override for this GPU; of tiles that have their own, the one that was timed."""
    target = configurations.target_of(torch.device("cuda"))
    for kernel, dtype, size in wanted:
        costs = milliseconds_of_each(kernel, dtype, size)
        best = min(range(len(costs)), key=costs.__getitem__)
        chosen = candidates(dtype, size)[best]
        print(f"{kernel} {dtype} {size}: {chosen}, {costs[best]:g} ms", flush=True)
        if costs[best] < float("inf"):
            own = table["overrides"].setdefault(target, {}).setdefault(kernel, {}).setdefault(dtype, {})
            own[str(size)] = list(chosen)
            own.pop("x".join(map(str, REPRESENTATIVE[size])), None)
            write(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ahead", action="store_true", help="by resources, without a GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="kernel, dtype, class: those that match")
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side")
    options = parser.parse_args()
    only, table = set(options.only), json.loads(CONFIGURATIONS.read_text())
    if options.ahead:
        tune_ahead(tasks_ahead(only), table, options.processes)
        return
    wanted = [
        (kernel, dtype, size)
        for kernel, dtype in itertools.product(KINDS, resources.DTYPES)
        for size in configurations.CLASSES[kernel][dtype]
        if only <= {kernel, dtype, str(size)}
    ]
    tune_by_time(wanted, table)


if __name__ == "__main__":
    main()
