"""Files of results: what is written of a machine and a run, how it is read, and what became slower between two.

A file holds ``{"conditions": …, "rows": […], "absent": …, "not_run": …}``; README.md says what a row is.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.measuring import MachineLimits, shares

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "otfuse", "torch", "numba", "numpy", "triton", "POT", "geomloss", "ott-jax", "jax", "flash-sinkhorn",
    "liger-kernel", "habana-torch-plugin",
)  # fmt: skip
CLOCK_FREQUENCIES = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
FLOOR = 0.05  # part of a time that is never called a change
FEWEST_PEERS = 3
Row = dict[str, Any]


def conditions(device: torch.device, note: str = "", clock: str = "wall") -> dict[str, Any]:
    """What a number is worth nothing without. ``note``: what the person who ran it has to say of the machine."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "machine": cpu() if device.type == "cpu" else getattr(torch, device.type).get_device_name(device),
        "note": note,
        "clock": clock if device.type == "cpu" else "device",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "describe", "--always", "--dirty=+changes"),  # empty where the tree does not know
    }
    return facts | {"gpu": _gpu(device)} if device.type == "cuda" else facts


def file_name(facts: dict[str, Any]) -> str:
    machine = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    cores = f"-{facts['cores']}-cores" if facts["device"] == "cpu" else ""
    return f"{facts['date']}-{machine}{cores}.json"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    names = ("driver_version", *CLOCK_FREQUENCIES)
    line = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader").partition("\n")[0]
    driver, *clocks = [value.strip() for value in line.split(",")] if line else [None]
    return {
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 1e6,
        "memory_gb": properties.total_memory / 1e9,
        "clocks": dict(zip(CLOCK_FREQUENCIES, clocks)) or None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class ResultFile:
    """The rows of a run. They are written after every case: a run that is cut short keeps what it has.

    ``options`` are pytest's: see conftest.py.
    """

    def __init__(self, options: Any) -> None:
        self.options, self.start = options, time.monotonic()
        self.rows: list[Row] = []
        self.absent: dict[str, dict[str, list[str]]] = {}  # who, why, in which cases
        self.not_run: dict[str, str] = {}
        self.facts: dict[str, Any] | None = None
        self.path: Path | None = None

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.start > 60 * self.options.minutes

    def add(self, rows: list[Row], limits: MachineLimits | None = None) -> None:
        self.rows += rows
        self._write(limits)

    def say_absent(self, case: str, absent: dict[str, str]) -> None:
        for name, why in absent.items():
            self.absent.setdefault(name, {}).setdefault(why, []).append(case)

    def skip(self, case: str, reason: str) -> NoReturn:
        """Says in the file too why a case was not run."""
        import pytest

        self.not_run[case] = reason
        self._write(None)
        pytest.skip(reason)

    def _write(self, limits: MachineLimits | None) -> None:
        options = self.options
        if options.out is None or not options.benchmark_enable:
            return
        if self.facts is None:  # once: the clocks are those under load
            self.facts = conditions(torch.device(options.device), options.note, options.clock)
            self.facts["commit"] = options.commit or self.facts["commit"]
            options.out.mkdir(parents=True, exist_ok=True)
            first = options.out / file_name(self.facts)  # a day's second run ends in -2: nothing is replaced
            names = (first.with_stem(f"{first.stem}-{count}") for count in itertools.count(2))
            free = next(path for path in itertools.chain([first], names) if not path.exists())
            self.path = options.out / "dry-run.json" if options.dry_run else free
        if limits is not None:
            self.rows = [row | shares(row, limits) for row in self.rows]  # of the best so far
            self.facts["limits"] = limits.facts()
        self.facts["minutes"] = round((time.monotonic() - self.start) / 60, 1)
        result = {"conditions": self.facts, "rows": self.rows, "absent": self.absent, "not_run": self.not_run}
        assert self.path is not None
        self.path.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Result:
    """A file, read."""

    name: str
    conditions: dict[str, Any]
    rows: list[Row]
    absent: dict[str, dict[str, list[str]]]  # who, why, in which cases
    not_run: dict[str, str]  # case, why

    def suite(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["suite"] == name]


def read(path: Path) -> Result:
    """Exits with what is wrong where the file is none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            row["suite"], row["case"], row["contender"]
        return Result(path.stem, content["conditions"], content["rows"], content["absent"], content["not_run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no file of results ({type(error).__name__}: {error}); make one with --out, see README.md")


def by_case(rows: Iterable[Row], key: str = "case") -> dict[str, list[Row]]:
    """The rows of each case, in the order of the file: ours first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("otfuse")


def where(rows: Iterable[Row], **values: Any) -> Iterator[Row]:
    return (row for row in rows if all(row.get(key) == value for key, value in values.items()))


def shape(row: Row) -> str:
    return f"{row['B']} × {row['N']} × {row['M']}" + (f" × {row['D']}" if row["op"] == "attend" else "")


@dataclass(frozen=True)
class Change:
    case: str
    contender: str
    ratio: float  # new over old, what the machine did taken out
    noise: float  # of the ratio: beyond 1 + noise it is slower
    old_ms: float
    new_ms: float

    @property
    def verdict(self) -> str:
        slower, faster = self.ratio > 1 + self.noise, self.ratio < 1 / (1 + self.noise)
        return "SLOWER" if slower else "faster" if faster else "same"

    def __str__(self) -> str:
        return (
            f"{self.verdict:6}  {self.ratio:5.2f} × (noise {self.noise:.0%})  {self.old_ms:.4g} -> {self.new_ms:.4g} ms"
            f"  {self.case} | {self.contender}"
        )


def compare(old: Result, new: Result, everything: bool = False) -> tuple[str, int]:
    """What to print, and the exit code: 1 where something of ours became slower, 2 where nothing can be said.

    Noise of a row is the quartiles' distance in both files, and how far the peers scatter between the runs. Peers whose
    version did not change tell what the machine did: their common ratio is taken out of ours.
    """
    machines = [(r.conditions["machine"], r.conditions["cores"], r.conditions["threads"]) for r in (old, new)]
    if machines[0] != machines[1]:
        return f"not of one machine: {machines[0]} and {machines[1]}; times can be compared on the same one only", 2
    before, after = (
        {(row["suite"], row["case"], row["contender"]): row for row in result.rows if row.get("quartiles_ms")}
        for result in (old, new)
    )
    pairs = [(before[key], after[key]) for key in before if key in after]
    peers = [b["median_ms"] / a["median_ms"] for a, b in pairs if not is_ours(a) and _same_peers(old, new)]
    enough = len(peers) >= FEWEST_PEERS
    drift, scatter = (statistics.median(peers), _scatter(peers)) if enough else (1.0, 0.0)
    changes = [
        Change(
            a["case"], a["contender"], b["median_ms"] / a["median_ms"] / drift,
            FLOOR + _spread(a) + _spread(b) + scatter, a["median_ms"], b["median_ms"],
        )
        for a, b in pairs
        if is_ours(a)
    ]  # fmt: skip
    if not changes:
        return f"{old.name} and {new.name} have no row of ours in common", 2
    slower = sum(change.verdict == "SLOWER" for change in changes)
    shown = [change for change in changes if everything or change.verdict != "same"]
    machine = f"the machine: {len(peers)} rows of peers took {drift:.2f} × as long (scatter {scatter:.0%})"
    lines = [machine + (", taken out below" if enough else ", too few to tell")]
    lines += map(str, sorted(shown, key=lambda change: -change.ratio))
    lines += [f"gone    {' | '.join(key)}" for key, row in before.items() if key not in after and is_ours(row)]
    return "\n".join([*lines, f"{slower} of {len(changes)} rows of ours slower beyond the noise"]), int(slower > 0)


def _same_peers(old: Result, new: Result) -> bool:
    """Whether the versions of all packages but ours are the same."""
    before, after = (r.conditions["versions"] for r in (old, new))
    return all(before[name] == after[name] for name in before.keys() & after.keys() - {"otfuse"})


def _spread(row: Row) -> float:
    """Half the distance of the quartiles, of the median."""
    low, high = row["quartiles_ms"]
    return (high - low) / 2 / row["median_ms"]


def _scatter(ratios: Sequence[float]) -> float:
    low, median, high = statistics.quantiles(ratios, n=4)
    return (high - low) / 2 / median
