"""Options, and the fixtures that time: verified first, contenders interleaved.

``python -m pytest benchmarks --benchmark-enable --out benchmarks/results`` times on this machine and adds a file
of rows; without ``--benchmark-enable`` every case runs once, untimed, so that none rots. With ``--device cuda`` the
cases for a GPU run, and time is the device's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conditions import conditions, copy_bandwidth, file_name
from peers import Compiler
from timing import Contender, DeviceTurn, HostTurn, copies_beyond_cache, rates, row
from torch import Tensor

FAR_OFF = 10  # times what is allowed: a peer this wrong does something else, and is not timed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder for the rows of this run, as <date>-<machine>.json")
    parser.addoption("--seconds", type=float, default=4.0, help="time to spend on a case (default 4)")
    parser.addoption(
        "--compile-seconds", type=float, default=120, help="to spend on torch.compile in all (default 120)"
    )
    parser.addoption("--commit", help="the commit, where the tree does not know it")
    parser.addoption("--dry-run", action="store_true", help="time a tiny case in Triton's interpreter, to try this out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config)


class Results:
    """The rows so far. They are written after every case: a run that is cut short keeps what it has."""

    def __init__(self, config: pytest.Config) -> None:
        self.options = config.option
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] | None = None
        self.path: Path | None = None

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.options.out is None:
            return
        if self.facts is None:  # once: the clocks are those under load
            self.facts = conditions(torch.device(self.options.device))
            self.facts["commit"] = self.options.commit or self.facts["commit"]
            self.options.out.mkdir(parents=True, exist_ok=True)
            self.path = self.options.out / ("dry-run.json" if self.options.dry_run else file_name(self.facts))
        assert self.path is not None
        self.path.write_text(json.dumps({"conditions": self.facts, "rows": self.rows}, indent=1) + "\n")


RESULTS: pytest.StashKey[Results] = pytest.StashKey()


@pytest.fixture
def on_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("this case is for --device cpu")


@pytest.fixture
def compare(on_cpu: None, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compare(case, contenders, error, ...)``: check every contender's answer, then time them in turn.

    The first contender is ours: pytest-benchmark times it, and each of the others is timed once before every
    one of its rounds, so that all see the same state of the machine. A turn is several calls, some milliseconds
    in all: of a single call after another's one would time the cold caches.
    """

    def run(
        case: str, contenders: dict[str, Callable[[], Any]], error: Callable[[Any], float], allowed: float, **facts: Any
    ) -> None:
        errors = {name: error(contender()) for name, contender in contenders.items()}
        ours, *others = contenders
        assert errors[ours] <= allowed, f"{ours} is off by {errors[ours]:.3g}, allowed {allowed:.3g}: not timed"
        turns = {name: HostTurn(contender, benchmark.enabled) for name, contender in contenders.items()}

        def one_of_each() -> None:
            for name in others:
                turns[name].timed()

        seconds = sum(turn.seconds for turn in turns.values())
        rounds = max(7, min(400, int(request.config.getoption("--seconds") / seconds))) if benchmark.enabled else 1
        benchmark.pedantic(turns[ours], setup=one_of_each, rounds=rounds)
        if not benchmark.enabled:
            return
        turns[ours].times = list(benchmark.stats.stats.data)
        rows = {name: row(case, name, turn, turns[ours], errors[name]) | facts for name, turn in turns.items()}
        request.config.stash[RESULTS].add(list(rows.values()))
        benchmark.extra_info.update(rows)

    return run


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float | None:
    """Bytes a second of a copy in this run, which times on CUDA are held against."""
    return copy_bandwidth(device) if device.type == "cuda" else None


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest) -> Compiler:
    return Compiler(request.config.getoption("--compile-seconds"))


@pytest.fixture
def race(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """``race(case, contenders, inputs, error, allowed, traffic, flops, ...)``: ``compare`` on a device.

    What is checked is what a turn has just computed, from its CUDA graph where it has one. A peer that fails or
    is far off goes to ``absent`` with the reason; ours, the first, fails the test.
    """
    options = request.config.option
    timed = options.benchmark_enable and (device.type == "cuda" or options.dry_run)
    entered = _enter_timed if timed else _enter_untimed

    def run(
        case: str, contenders: list[Contender], inputs: tuple[Tensor, ...], error: Callable[[Any], float],
        allowed: float, traffic: int, flops: int, absent: dict[str, str], **facts: Any,
    ) -> None:  # fmt: skip
        ours, *peers = contenders
        checked = {ours.name: _checked(entered(ours, inputs, traffic), ours, error, allowed)}
        for peer in peers:
            try:
                checked[peer.name] = _checked(entered(peer, inputs, traffic), peer, error, FAR_OFF * allowed)
            except Exception as failure:  # whatever it has to say
                if not timed and not isinstance(failure, TimeoutError):
                    raise  # it would go unnoticed
                absent[peer.name] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
        if not timed:
            return
        _take_turns([turn for turn, _ in checked.values()], options.seconds, fewest=2 if options.dry_run else 7)
        first, peak = checked[ours.name][0], request.getfixturevalue("bandwidth")
        rows = [row(case, name, turn, first, off) | _launched(turn) for name, (turn, off) in checked.items()]
        facts |= {"absent": absent}
        request.config.stash[RESULTS].add([r | rates(r["median_ms"], traffic, flops, peak) | facts for r in rows])

    return run


def _checked(
    entered: tuple[Any, Any], contender: Contender, error: Callable[[Any], float], allowed: float
) -> tuple[Any, float]:
    """The turn, and how far off its outputs are; NaN where they are no answer."""
    turn, outputs = entered
    if not contender.answers:
        return turn, math.nan
    off = error(outputs)
    assert off <= allowed, f"{contender.name} is off by {off:.3g}, allowed {allowed:.3g}: not timed"
    return turn, off


def _enter_timed(contender: Contender, inputs: tuple[Tensor, ...], traffic: int) -> tuple[Any, Any]:
    """A contender's turn, and what it computed."""
    if inputs[0].device.type == "cpu":
        return HostTurn(lambda: contender.call(*inputs), True), contender.call(*inputs)
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    turn = DeviceTurn(contender, copies_beyond_cache(inputs, traffic, cache))
    return turn, turn.outputs[-1]


def _enter_untimed(contender: Contender, inputs: tuple[Tensor, ...], traffic: int) -> tuple[Any, Any]:
    return None, contender.call(*inputs)


def _take_turns(turns: list[HostTurn | DeviceTurn], seconds: float, fewest: int) -> None:
    rounds = max(fewest, min(400, int(seconds / sum(turn.seconds for turn in turns))))
    for _ in range(rounds):
        for turn in turns:
            turn.timed()


def _launched(turn: HostTurn | DeviceTurn) -> dict[str, Any]:
    on_device = isinstance(turn, DeviceTurn)
    return {"replayed": on_device and turn.graph is not None, "copies": len(turn.copies) if on_device else 1}


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = session.config.stash[RESULTS]
    if results.path is not None:
        print(f"\n{len(results.rows)} rows written to {results.path}")
