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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conditions import conditions, file_name
from field import field
from limits import Limits, cache_bytes, memory_available
from measured import Answers, Measured, inputs_of, mean_rounds
from peers import Compiler
from timing import CLOCKS, Contender, DeviceTurn, HostTurn, copies_beyond_cache, rates, row, shares
from torch import Tensor

FAR_OFF = 10  # times what is allowed: a peer this wrong does something else, and is not timed
COMPILE_SECONDS = 120
FEWEST, MOST, SLOW = 5, 400, 0.5  # turns of each contender; two where one takes SLOW seconds or more
CHECK = 4e8  # entry-rounds of the largest check of an item on a CPU: ten seconds or so
FULL_CHECK = 2e10
ORDER = ("test_attend", "test_sinkhorn", "test_accuracy", "test_memory", "test_scaling", "test_step")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder for the rows of this run, as <date>-<machine>.json")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of importance, on a CPU with what takes long at the end."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        measured = getattr(item, "callspec", None) and item.callspec.params.get("measured")
        slow = item.config.option.device == "cpu" and measured is not None and measured.takes_long
        return slow, ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER)

    items.sort(key=place)


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
            self.path = self.options.out / ("dry-run.json" if self.options.dry_run else file_name(self.facts))
        if limits is not None:
            self.rows = [row | shares(row, limits) for row in self.rows]  # of the best so far
            self.facts["limits"] = limits.facts()
        self.facts["minutes"] = round((time.monotonic() - self.start) / 60, 1)
        result = {"conditions": self.facts, "rows": self.rows, "absent": self.absent, "not_run": self.not_run}
        assert self.path is not None
        self.path.write_text(json.dumps(result, indent=1) + "\n")


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
    its turns, so that all see the same state of the machine. What is checked is what a turn has computed, on CUDA
    from its graph where it has one. A peer that fails or is far off is absent, with the reason; ours fails the test.
    """
    options = request.config.option
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        pytest.skip(f"torch finds no {device.type.upper()} device")

    def run(
        measured: Measured, suite: str, *, only: Sequence[str] = (),
        extra: Callable[[Any], dict[str, Any]] | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """``only``: names (or their beginnings) of those who take part, beside ours; ``extra``: of an answer, for its
        row."""
        case = str(measured)
        if timed:
            if reason := why_not(measured, device, options.full, results.spent):
                results.leave_out(case, reason)
        else:
            measured = measured.shrunk()
        inputs = inputs_of(measured, device)
        answers = Answers(measured, inputs)
        contenders, absent = field(measured, inputs, compiler, options.dry_run)
        contenders = [c for c in contenders if not only or c is contenders[0] or c.name.startswith(tuple(only))]
        entered: dict[str, tuple[Contender, Any, float, dict[str, Any]]] = {}
        for contender in contenders:
            try:
                entered[contender.name] = enter(
                    contender, inputs, measured.traffic, answers, not entered, extra, options.clock if timed else ""
                )
            except Exception as failure:  # whatever it has to say
                if not entered or not (timed or isinstance(failure, TimeoutError)):
                    raise  # ours, or it would go unnoticed
                absent[contender.name] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
        for name, why in absent.items():
            results.absent.setdefault(name, {}).setdefault(why, []).append(case)
        (ours, first, _, _), *_ = entered.values()
        if not timed:
            benchmark.pedantic(ours.call, args=tuple(ours.prepare(*inputs)), rounds=1)
            return
        take_turns(benchmark, [turn for _, turn, _, _ in entered.values()], options.seconds, options.dry_run)
        rounds = mean_rounds(measured, inputs, ours.name.split()[1].rstrip(","))
        facts |= {"suite": suite, "rounds": rounds, "checked_items": answers.checked} | measured.facts
        work = measured.traffic, measured.flops(rounds)
        rows = []
        for contender, turn, error, more in entered.values():
            one = row(case, contender, turn, first, error) | facts | more
            rows.append(one | rates(one["median_ms"], *work) if contender.answers else one)
        limits.again()
        results.add(rows, limits)
        benchmark.extra_info.update({one["contender"]: one["median_ms"] for one in rows})

    return run


def why_not(measured: Measured, device: torch.device, full: bool, spent: bool) -> str:
    """The reason to leave a measurement out; empty where there is none."""
    if spent:
        return "the time for all was spent (--minutes)"
    if 8 * measured.traffic > memory_available(device):
        return f"it needs some {8 * measured.traffic / 1e9:.1f} GB of memory, more than is free here"
    if device.type == "cpu" and measured.check_entry_rounds > (FULL_CHECK if full else CHECK):
        return f"the check in float64 alone would take {measured.check_entry_rounds / 3e7:.0f} s or so" + (
            "" if full else " (--full allows more)"
        )
    return ""


def enter(
    contender: Contender, inputs: tuple[Tensor, ...], traffic: int, answers: Answers, ours: bool,
    extra: Callable[[Any], dict[str, Any]] | None, clock: str,
) -> tuple[Contender, Any, float, dict[str, Any]]:  # fmt: skip
    """A contender, its turn, how far off what it computed is (NaN where that is no answer), and what else is of it.

    Without a ``clock`` there is no turn.
    """
    device, turn = inputs[0].device, None
    if not clock:
        outputs = contender.call(*contender.prepare(*inputs))
    else:
        copies = copies_beyond_cache(inputs, traffic, cache_bytes(device))
        turn = HostTurn(contender, copies, clock) if device.type == "cpu" else device_turn(contender, copies, device)
        outputs = turn.outputs[-1]
    if device.type == "cpu" and turn is not None:
        turn.outputs = []  # checked, and in the way of larger ones
    if not contender.answers:
        return contender, turn, math.nan, {}
    tensors, answer = contender.read(outputs), answers.of(contender.follows)
    off, allowed = answer.error(tensors), answer.allowed if ours else FAR_OFF * answer.allowed
    assert off <= allowed, f"{contender.name} is off by {off:.3g}, allowed {allowed:.3g}: not timed"
    return contender, turn, off, {} if extra is None else extra(tensors)


def device_turn(contender: Contender, copies: list[tuple[Tensor, ...]], device: torch.device) -> DeviceTurn:
    return DeviceTurn(contender, copies, getattr(torch, device.type))


def take_turns(benchmark: Any, turns: list[Any], seconds: float, dry: bool) -> None:
    """Each has an equal part of the time, some turns at least; who needs fewer of them spreads them over all."""
    fewest = [2 if dry or turn.seconds > SLOW else FEWEST for turn in turns]
    counts = [max(few, min(MOST, int(seconds / len(turns) / turn.seconds))) for few, turn in zip(fewest, turns)]
    rounds = max(counts)
    ours, *others = turns
    current = itertools.count()

    def others_first() -> None:
        now = next(current)
        for turn, count in zip(others, counts[1:]):
            if now * count // rounds != (now - 1) * count // rounds:
                turn.timed()

    benchmark.pedantic(ours.timed, setup=others_first, rounds=rounds)


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = session.config.stash[RESULTS]
    if results.path is not None:
        print(f"\n{len(results.rows)} rows written to {results.path}")
