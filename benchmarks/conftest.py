"""Options, conditions, and the one fixture that times: verified first, contenders interleaved.

``python -m pytest benchmarks --benchmark-enable --out benchmarks/results`` times on this machine and adds a file
of rows; without ``--benchmark-enable`` every case runs once, untimed, so that none rots.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--out", type=Path, help="folder for the rows of this run, as <date>-<machine>.json")
    parser.addoption("--seconds", type=float, default=4.0, help="time to spend on a case (default 4)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


TURN = 0.01  # seconds
ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
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
        turns = {name: _Turn(contender, benchmark.enabled) for name, contender in contenders.items()}

        def one_of_each() -> None:
            for name in others:
                turns[name].timed()

        seconds = sum(turn.seconds for turn in turns.values())
        rounds = max(7, min(400, int(request.config.getoption("--seconds") / seconds))) if benchmark.enabled else 1
        benchmark.pedantic(turns[ours], setup=one_of_each, rounds=rounds)
        if not benchmark.enabled:
            return
        turns[ours].times = list(benchmark.stats.stats.data)
        for name, turn in turns.items():
            row = _row(case, name, turn, turns[ours], errors[name]) | facts
            request.config.stash[ROWS].append(row)
            benchmark.extra_info[name] = row

    return run


class _Turn:
    """A contender called often enough for a turn of TURN seconds."""

    def __init__(self, contender: Callable[[], Any], enabled: bool) -> None:
        self.contender, self.calls, self.seconds = contender, 1, 0.0
        self.times: list[float] = []
        if enabled:
            self.seconds = min(self.timed() for _ in range(3))
            self.calls = max(1, round(TURN / self.seconds))
            self.seconds *= self.calls
            self.times = []

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.contender()

    def timed(self) -> float:
        start = time.perf_counter()
        self()
        self.times.append(time.perf_counter() - start)
        return self.times[-1]

    def per_call(self) -> list[float]:
        return [seconds / self.calls for seconds in self.times]


def _row(case: str, contender: str, turn: _Turn, ours: _Turn, error: float) -> dict[str, Any]:
    low, median, high = statistics.quantiles(turn.per_call(), n=4)
    return {
        "case": case,
        "contender": contender,
        "median_ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "times_ours": median / statistics.median(ours.per_call()),
        "turns": len(turn.times),
        "calls_per_turn": turn.calls,
        "error": None if math.isnan(error) else error,
    }


def conditions() -> dict[str, Any]:
    """What a number is worth nothing without."""
    packages = ("otfuse", "torch", "numba", "numpy", "POT", "ott-jax", "jax")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def pytest_sessionfinish(session: pytest.Session) -> None:
    out, rows = session.config.getoption("--out"), session.config.stash[ROWS]
    if out is None or not rows:
        return
    facts = conditions()
    machine = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{facts['date']}-{machine}-{facts['cores']}-cores.json"
    path.write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    print(f"\n{len(rows)} rows written to {path}")
