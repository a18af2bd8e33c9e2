"""Options, and the fixture that times: verified first, contenders interleaved.

``python -m pytest benchmarks --benchmark-enable --out benchmarks/results`` times on this machine and adds a file
of rows; without ``--benchmark-enable`` every case runs once, small and untimed, so that none rots. With ``--device
cuda`` or ``hpu`` time is the device's.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conditions import conditions, file_name
from field import field
from limits import Limits
from measured import Measured, inputs_of, mean_rounds
from peers import Compiler
from race import Extra, enter_all, rows, take_turns, why_not
from selection import urgency
from timing import CLOCKS, shares

COMPILE_SECONDS = 120
ORDER = (
    "test_attend", "test_packed", "test_sinkhorn", "test_time_to_accuracy", "test_peak_memory", "test_scaling",
    "test_step",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder for the rows of this run, as <date>-<machine>.json")
    parser.addoption("--limited", action="store_true", help="on a device: only what a limit is set for")
    parser.addoption("--full", action="store_true", help="every size, gradient, dtype, kind of token; hours on a CPU")
    parser.addoption(
        "--minutes", type=float, default=math.inf, help="start no case after that many (default: no limit)"
    )
    parser.addoption("--seconds", type=float, default=1.0, help="time to spend on a case's turns (default 1)")
    parser.addoption(
        "--compile-seconds", type=float, default=None,
        help=f"to spend on torch.compile in all (default {COMPILE_SECONDS}, and 0 where nothing is timed)",
    )  # fmt: skip
    parser.addoption(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="on a CPU: wall (default), or processor, where others use it too",
    )
    parser.addoption("--commit", help="the commit, where the tree does not know it")
    parser.addoption("--note", default="", help="what to say of the machine, as 'shared with others'")
    parser.addoption("--dry-run", action="store_true", help="time a tiny case in Triton's interpreter, to try this out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order of importance, on a CPU with what takes long at the end, elsewhere with what has a limit first."""
    on_cpu = config.option.device == "cpu"

    def later(item: pytest.Item) -> int:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        measured = params.get("measured")
        return int(measured is not None and measured.takes_long) if on_cpu else urgency(item.path.stem, params)

    def place(item: pytest.Item) -> tuple[int, int]:
        return later(item), ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER)

    items.sort(key=place)
    if config.option.limited and not on_cpu:
        config.hook.pytest_deselected(items=[item for item in items if later(item)])
        items[:] = [item for item in items if not later(item)]


class Results:
    """The rows so far. They are written after every case: a run that is cut short keeps what it has."""

    def __init__(self, config: pytest.Config) -> None:
        self.options = config.option
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.absent: dict[str, dict[str, list[str]]] = {}  # who, why, in which cases
        self.not_run: dict[str, str] = {}
        self.facts: dict[str, Any] | None = None
        self.path: Path | None = None

    @property
    def spent(self) -> bool:
        return time.monotonic() - self.start > 60 * self.options.minutes

    def add(self, rows: list[dict[str, Any]], limits: Limits | None = None) -> None:
        self.rows += rows
        self._write(limits)

    def say_absent(self, case: str, absent: dict[str, str]) -> None:
        for name, why in absent.items():
            self.absent.setdefault(name, {}).setdefault(why, []).append(case)

    def leave_out(self, case: str, reason: str) -> NoReturn:
        """Says in the file too why a case was not run."""
        self.not_run[case] = reason
        self._write(None)
        pytest.skip(reason)

    def _write(self, limits: Limits | None) -> None:
        if self.options.out is None or not self.options.benchmark_enable:
            return
        if self.facts is None:  # once: the clocks are those under load
            self.facts = conditions(torch.device(self.options.device), self.options.note, self.options.clock)
            self.facts["commit"] = self.options.commit or self.facts["commit"]
            self.options.out.mkdir(parents=True, exist_ok=True)
            self.path = self.options.out / "dry-run.json" if self.options.dry_run else self._free_path()
        if limits is not None:
            self.rows = [row | shares(row, limits) for row in self.rows]  # of the best so far
            self.facts["limits"] = limits.facts()
        self.facts["minutes"] = round((time.monotonic() - self.start) / 60, 1)
        result = {"conditions": self.facts, "rows": self.rows, "absent": self.absent, "not_run": self.not_run}
        assert self.path is not None
        self.path.write_text(json.dumps(result, indent=1) + "\n")

    def _free_path(self) -> Path:
        """Of a day's second run the name ends in -2: results are added, never replaced."""
        assert self.facts is not None
        first = self.options.out / file_name(self.facts)
        names = (first if count == 1 else first.with_stem(f"{first.stem}-{count}") for count in itertools.count(1))
        return next(path for path in names if not path.exists())


RESULTS: pytest.StashKey[Results] = pytest.StashKey()


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def timed(request: pytest.FixtureRequest) -> bool:
    return request.config.option.benchmark_enable


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest, device: torch.device) -> Limits:
    option = request.config.option
    return Limits(device, small=option.dry_run, clock=CLOCKS[option.clock])


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, timed: bool) -> Compiler:
    seconds = request.config.option.compile_seconds
    return Compiler((COMPILE_SECONDS if timed else 0) if seconds is None else seconds)


@pytest.fixture
def race(
    request: pytest.FixtureRequest, results: Results, device: torch.device, timed: bool, limits: Limits,
    compiler: Compiler, benchmark: Any,
) -> Callable[..., None]:  # fmt: skip
    """``race(measured, suite, ...)``: check every contender's answer, then time them in turn.

    The first contender is ours: pytest-benchmark shows it, and each of the others is timed once before every one of
    its turns, so that all see the same state of the machine. A peer that fails or is far off is absent, with the
    reason; ours fails the test.
    """
    options = request.config.option
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        pytest.skip(f"torch finds no {device.type.upper()} device")

    def run(
        measured: Measured, suite: str, *, only: tuple[str, ...] = (), extra: Extra | None = None, **facts: Any
    ) -> None:
        """``only``: how names begin of those who take part, beside ours."""
        case = str(measured)
        if not timed:
            measured = measured.shrunk()
        elif reason := why_not(measured, device, options.full, results.spent):
            results.leave_out(case, reason)
        inputs = inputs_of(measured, device)
        contenders, absent = field(measured, inputs, compiler, options.dry_run)
        contenders = contenders[:1] + [c for c in contenders[1:] if c.name.startswith(only or "")]
        entered, failed = enter_all(contenders, inputs, measured, options.clock if timed else "", extra)
        results.say_absent(case, absent | failed)
        ours = entered[0].contender
        if not timed:
            benchmark.pedantic(ours.call, args=tuple(ours.prepare(*inputs)), rounds=1)
            return
        take_turns(benchmark, [one.turn for one in entered], options.seconds, options.dry_run)
        limits.again()
        rounds = mean_rounds(measured, inputs, ours.name.removeprefix("otfuse "))
        found = rows(case, measured, entered, rounds)
        results.add([one | facts | {"suite": suite} for one in found], limits)
        benchmark.extra_info.update({one["contender"]: one["median_ms"] for one in found})

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = session.config.stash[RESULTS]
    if results.path is not None:
        print(f"\n{len(results.rows)} rows written to {results.path}")
