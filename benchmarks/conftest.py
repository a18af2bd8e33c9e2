"""Options, and the fixture that times: checked first, then contenders take turns.

``python -m pytest benchmarks --benchmark-enable --out benchmarks/results`` times on this machine and adds a file
of rows; without ``--benchmark-enable`` every case runs once, small and untimed, so that none rots. With ``--device
cuda`` or ``hpu`` time is the device's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.answers import Answers, inputs_of, mean_iterations
from benchmarks.cases import Workload, urgency
from benchmarks.contenders import Compiler, Contender, contenders_of
from benchmarks.measuring import CLOCKS, Extra, MachineLimits, check_all, rows, take_turns, why_not
from benchmarks.results import ResultFile, Row

COMPILE_SECONDS = 120
RESULTS: pytest.StashKey[ResultFile] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add("--out", type=Path, help="folder for the rows of this run, as <date>-<machine>.json")
    add("--goals", action="store_true", help="on a device: only what a goal is set for")
    add("--full", action="store_true", help="every size, gradient, dtype, kind of token; hours on a CPU")
    add("--minutes", type=float, default=math.inf, help="start no case after that many (default: no end)")
    add("--seconds", type=float, default=1.0, help="time to spend on a case's turns (default 1)")
    add(
        "--compile-seconds", type=float, default=None,
        help=f"to spend on torch.compile in all (default {COMPILE_SECONDS}, and 0 where nothing is timed)",
    )  # fmt: skip
    add("--clock", choices=CLOCKS, default="wall", help="on a CPU: wall (default), or processor, if others use it too")
    add("--commit", help="the commit, where the tree does not know it")
    add("--note", default="", help="what to say of the machine, as 'shared with others'")
    add("--dry-run", action="store_true", help="time a tiny case in Triton's interpreter, to try this out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = ResultFile(config.option)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order of importance, on a CPU with what takes long at the end, elsewhere with what has a goal first."""

    def later(item: pytest.Item) -> int:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if config.option.device == "cpu":
            workload = params.get("workload")
            return int(isinstance(workload, Workload) and workload.takes_long)
        return urgency(getattr(item, "originalname", ""), params)

    items.sort(key=later)
    if config.option.goals and config.option.device != "cpu":
        config.hook.pytest_deselected(items=[item for item in items if later(item)])
        items[:] = [item for item in items if not later(item)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = session.config.stash[RESULTS]
    if results.path is not None:
        print(f"\n{len(results.rows)} rows written to {results.path}")


@pytest.fixture
def results(request: pytest.FixtureRequest) -> ResultFile:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def timed(request: pytest.FixtureRequest) -> bool:
    return request.config.option.benchmark_enable


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest, device: torch.device) -> MachineLimits:
    option = request.config.option
    return MachineLimits(device, small=option.dry_run, clock=CLOCKS[option.clock])


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, timed: bool) -> Compiler:
    seconds = request.config.option.compile_seconds
    return Compiler((COMPILE_SECONDS if timed else 0) if seconds is None else seconds)


@pytest.fixture
def check_and_time(
    request: pytest.FixtureRequest, results: ResultFile, device: torch.device, timed: bool, limits: MachineLimits,
    benchmark: Any,
) -> Callable[..., dict[str, str]]:  # fmt: skip
    """Check every contender's answer, then time them in turn; returns who failed, and why.

    The first contender is ours: pytest-benchmark shows it, and each of the others is timed once before every one of
    its turns, so that all see the same state of the machine. A peer that fails or is far off is absent; ours fails the
    test. ``finish`` changes the rows before they are written.
    """
    options = request.config.option
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        pytest.skip(f"torch finds no {device.type.upper()} device")

    def run(
        case: str, workload: Any, inputs: tuple[Tensor, ...], contenders: Sequence[Contender], answers: Any,
        finish: Callable[[list[Row]], list[Row]], absent: dict[str, str], extra: Extra | None = None,
    ) -> dict[str, str]:  # fmt: skip
        clock = options.clock if timed else ""
        checked, failed = check_all(contenders, inputs, workload.traffic, answers, clock, extra)
        results.say_absent(case, absent | failed)
        ours = checked[0].contender
        if not timed:
            benchmark.pedantic(ours.call, args=tuple(ours.prepare(*inputs)), rounds=1)
            return failed
        take_turns(benchmark, [one.turn for one in checked], options.seconds, options.dry_run)
        limits.again()
        iterations = mean_iterations(workload, inputs, ours.name.removeprefix("otfuse "))
        found = finish(rows(case, workload, checked, iterations))
        results.add(found, limits)
        benchmark.extra_info.update({one["contender"]: one["median_ms"] for one in found})
        return failed

    return run


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, results: ResultFile, device: torch.device, timed: bool, compiler: Compiler,
    check_and_time: Callable[..., dict[str, str]],
) -> Callable[..., None]:  # fmt: skip
    """``compare(workload, suite, …)``: us beside everybody who computes the same."""
    options = request.config.option

    def run(
        workload: Workload, suite: str, *, only: tuple[str, ...] = (), extra: Extra | None = None, **facts: Any
    ) -> None:
        """``only``: how names begin of those who take part, beside ours."""
        case = str(workload)
        if not timed:
            workload = workload.shrunk()
        elif results.out_of_time:
            results.skip(case, "the time for all was spent (--minutes)")
        elif reason := why_not(workload, device, options.full):
            results.skip(case, reason)
        inputs = inputs_of(workload, device)
        contenders, absent = contenders_of(workload, inputs, compiler, options.dry_run)
        contenders = contenders[:1] + [c for c in contenders[1:] if c.name.startswith(only or "")]
        check_and_time(
            case, workload, inputs, contenders, Answers(workload, inputs),
            lambda rows: [row | facts | {"suite": suite} for row in rows], absent, extra,
        )  # fmt: skip

    return run
