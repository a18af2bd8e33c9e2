"""Which measurements a run makes, in the order of importance: one that is cut short has the first ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    CUDA_CASES,
    HYPER_CONNECTIONS,
    LARGE,
    LAVCAP,
    LONG_VIDEO,
    MANY_SMALL,
    MATCHING,
    PATCHES,
    SQUARE,
    TINY,
    Case,
    equal_work,
    lavcap,
    many_small,
)
from gpu_summary import FEWER_ROUNDS
from measured import Measured

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GRADS = ("unroll", "implicit", "detach")
TOL = 1e-3
DRY = {
    "attend": [
        Measured(TINY, BF16), Measured(TINY), Measured(TINY, tol=TOL), *(Measured(TINY, grad=grad) for grad in GRADS)
    ],
    "solve": [Measured(TINY, op="solve"), Measured(TINY, op="solve", grad="unroll")],
    "accuracy": [],
}  # fmt: skip
EQUAL_WORK = "N = M, equal B N M"  # a size that falls off a cliff shows as a step
# Entries of all costs together, and the largest side: that of one item on a device.
WORK = {"cpu": (2**20, 1024), "cuda": (2**26, 8192), "hpu": (2**26, 8192)}
CURVE_ROUNDS = (5, 10, 20, 50, 100, 200, 500)


# What limits are set for (gpu_summary.py), and what is run first on CUDA. A round of a large item is a difference.
LIMITED = (
    Measured(lavcap(64), BF16),
    Measured(lavcap(64), BF16, "unroll"),
    Measured(lavcap(1024), BF16),
    Measured(replace(many_small(1_048_576, 4), T=20), op="solve"),
    Measured(LONG_VIDEO, BF16),
    Measured(LARGE[0], BF16),
    Measured(replace(LARGE[0], T=FEWER_ROUNDS), BF16),
)


def urgency(suite: str, params: dict[str, Any]) -> int:
    """0 of what limits are set for, packed tokens among it; 1 of what shows a cliff; 2 of all else."""
    if suite == "test_packed" and "grad" in params:
        return 0 if params["grad"] is None and params.get("mix", "lavcap") == "lavcap" else 2
    if suite in ("test_attend", "test_sinkhorn") and params.get("measured") in LIMITED:
        return 0
    return 1 if params.get("axis") == EQUAL_WORK else 2


def chosen(suite: str, config: pytest.Config) -> list[Measured]:
    """Of a suite, by the options; where nothing is timed, one of those that shrink to the same."""
    option = config.option
    if option.dry_run:
        found = DRY[suite]
    else:
        found = {"attend": attends, "solve": solves, "accuracy": curves}[suite](option.device, option.full)
    return found if option.benchmark_enable else distinct(found)


def distinct(found: Iterable[Measured]) -> list[Measured]:
    """The first of each shrunk form."""
    return list({measured.shrunk(): measured for measured in reversed(list(found))}.values())[::-1]


def attends(device: str, full: bool = False) -> list[Measured]:
    found = _cpu_attends() if device == "cpu" else _device_attends()
    cases = dict.fromkeys([*LAVCAP, *PATCHES, LONG_VIDEO, SQUARE, MATCHING, *LARGE])
    return _once(found + (_everything(cases, "attend") if full else []))


def solves(device: str, full: bool = False) -> list[Measured]:
    main = lavcap(32)
    cases = [HYPER_CONNECTIONS[0], lavcap(4), main, lavcap(64), SQUARE, *MANY_SMALL[:2]]
    cases += [] if device == "cpu" else [*HYPER_CONNECTIONS[1:], *MANY_SMALL[2:], LARGE[0], LARGE[2]]
    found = [Measured(case, op="solve") for case in cases]
    found += [Measured(case, grad=grad, op="solve") for case in (lavcap(4), main, SQUARE) for grad in GRADS[:2]]
    found += [Measured(main, kind="random", op="solve"), Measured(main, tol=TOL, op="solve")]
    found += [Measured(case, BF16, op="solve") for case in (main, MANY_SMALL[1])]
    if device != "cpu":
        found += [measured for measured in LIMITED if measured.op == "solve"]
    if full:
        found += _everything(dict.fromkeys([*LAVCAP, SQUARE, *HYPER_CONNECTIONS, *MANY_SMALL, *LARGE]), "solve")
    return _once(measured for measured in found if measured.grad != "detach")  # a plan that is constant has none


def _cpu_attends() -> list[Measured]:
    small, main = lavcap(4), lavcap(32)
    found = [Measured(case) for case in (small, main, *LAVCAP[2:], *PATCHES, SQUARE, LONG_VIDEO, MATCHING)]
    found += [Measured(case, grad=grad) for case in (small, main) for grad in GRADS]
    found += [Measured(PATCHES[0], grad="unroll"), Measured(main, BF16), Measured(main, F16)]
    found += [Measured(main, BF16, "unroll"), Measured(main, kind="random")]
    return found + [Measured(main, tol=TOL, kind=kind) for kind in ("clustered", "random")]


def _device_attends() -> list[Measured]:
    main, large = CUDA_CASES[:2]
    found = [Measured(main, BF16), Measured(main, BF16, "unroll"), Measured(large, BF16)]
    found += [Measured(case, BF16) for case in CUDA_CASES] + [Measured(case, BF16, "unroll") for case in CUDA_CASES]
    found += [Measured(case, BF16, tol=TOL) for case in (main, large)]
    found += [Measured(main, BF16, kind="random"), Measured(main, BF16, tol=TOL, kind="random"), Measured(main, F16)]
    found += [Measured(case, F32) for case in CUDA_CASES] + [Measured(main, F32, grad) for grad in GRADS]
    found += [Measured(case, BF16) for case in LARGE] + [m for m in LIMITED if m.op == "attend"]
    return found + [Measured(case, BF16, grad) for case in CUDA_CASES for grad in GRADS[1:]]


def _everything(cases: Iterable[Case], op: str) -> list[Measured]:
    """The whole table: sizes, gradients, dtypes, kinds of tokens, with and without a stop."""
    options = product((None, TOL), ("clustered", "random"), (F32, BF16, F16), (None, *GRADS), cases)
    return [Measured(case, dtype, grad, tol, op, kind) for tol, kind, dtype, grad, case in options]


def _once(found: Iterable[Measured]) -> list[Measured]:
    return list(dict.fromkeys(found))


def curves(device: str, full: bool) -> list[Measured]:
    """Solves of more and more rounds, for time against accuracy."""
    epsilons = (0.1, 0.05, 0.02) if full else (0.1, 0.05)
    cases = [replace(lavcap(32), T=rounds, epsilon=epsilon) for epsilon in epsilons for rounds in CURVE_ROUNDS]
    return [Measured(case, op="solve") for case in cases]


def axes(device: str) -> list[tuple[str, int, Measured]]:
    """(what grows, how large it is, what is measured). What is too large for a machine is left out when it comes up."""
    dtype = F32 if device == "cpu" else BF16
    main = lavcap(32)
    points = [("B", B, Measured(lavcap(B), dtype)) for B in (1, 4, 16, 64, 256, 1024, 4096)]
    sides = [2**power for power in range(3, 15)]
    points += [("N = M", side, Measured(Case("square", 1, side, side, 64), op="solve")) for side in sides]
    entries, longest = WORK[device]
    sides = [2**power for power in range(1, longest.bit_length())]
    points += [(EQUAL_WORK, side, Measured(equal_work(entries, side), op="solve")) for side in sides]
    rounds = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    points += [("rounds", T, Measured(replace(main, T=T), dtype)) for T in rounds]
    return points + [("D", D, Measured(replace(main, D=D), dtype)) for D in (16, 64, 256, 768, 1536, 3072)]
