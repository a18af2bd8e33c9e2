"""What became slower between two result files of one machine, beyond the noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rows import Result, Row, is_ours

FLOOR = 0.05  # part of a time that is never called a change
FEWEST_PEERS = 3


@dataclass(frozen=True)
class Change:
    case: str
    contender: str
    ratio: float  # new over old, what the machine did taken out
    noise: float  # of the ratio: beyond 1 + noise it is slower
    old_ms: float
    new_ms: float

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)

    def line(self) -> str:
        word = "SLOWER" if self.slower else "faster" if self.faster else "same"
        return (
            f"{word:6}  {self.ratio:5.2f} × (noise {self.noise:.0%})  {self.old_ms:.4g} -> {self.new_ms:.4g} ms  "
            f"{self.case} | {self.contender}"
        )


@dataclass(frozen=True)
class Comparison:
    changes: Sequence[Change]  # of ours
    drift: float  # how much longer peers took, whose code is the same
    scatter: float  # of that, between peers
    peers: int
    only_old: Sequence[str]  # of ours, that the new file lacks


def compare(old: Result, new: Result) -> Comparison:
    """Noise of a row is the quartiles' distance in both files, and how far the peers scatter between the runs.

    Peers whose version did not change tell what the machine did: their common ratio is taken out of ours.
    """
    before, after = (_by_key(result.rows) for result in (old, new))
    pairs = [(before[key], after[key]) for key in before if key in after]
    peers = [b["median_ms"] / a["median_ms"] for a, b in pairs if not is_ours(a) and _same_code(old, new)]
    drift, scatter = (statistics.median(peers), _scatter(peers)) if len(peers) >= FEWEST_PEERS else (1.0, 0.0)
    changes = [
        Change(
            a["case"], a["contender"], b["median_ms"] / a["median_ms"] / drift,
            FLOOR + _spread(a) + _spread(b) + scatter, a["median_ms"], b["median_ms"],
        )
        for a, b in pairs
        if is_ours(a)
    ]  # fmt: skip
    gone = [" | ".join(key) for key, row in before.items() if key not in after and is_ours(row)]
    return Comparison(changes, drift, scatter, len(peers), gone)


def report(old: Result, new: Result, everything: bool = False) -> tuple[str, int]:
    """What to print, and the exit code: 1 where something of ours became slower, 2 where nothing can be said."""
    machines = [(r.conditions["machine"], r.conditions["cores"], r.conditions["threads"]) for r in (old, new)]
    if machines[0] != machines[1]:
        return f"not of one machine: {machines[0]} and {machines[1]}; times can be compared on the same one only", 2
    found = compare(old, new)
    if not found.changes:
        return f"{old.name} and {new.name} have no row of ours in common", 2
    slower = [change for change in found.changes if change.slower]
    shown = found.changes if everything else [change for change in found.changes if change.slower or change.faster]
    machine = f"the machine: {found.peers} rows of peers took {found.drift:.2f} × as long (scatter {found.scatter:.0%})"
    lines = [machine + (", taken out below" if found.peers >= FEWEST_PEERS else ", too few to tell")]
    lines += [change.line() for change in sorted(shown, key=lambda change: -change.ratio)]
    lines += [f"gone    {name}" for name in found.only_old]
    lines += [f"{len(slower)} of {len(found.changes)} rows of ours slower beyond the noise"]
    return "\n".join(lines), int(bool(slower))


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row["suite"], row["case"], row["contender"]): row for row in rows if row.get("quartiles_ms")}


def _same_code(old: Result, new: Result) -> bool:
    """Of the peers; ours may differ."""
    versions = [{k: v for k, v in r.conditions["versions"].items() if k != "otfuse"} for r in (old, new)]
    common = versions[0].keys() & versions[1].keys()
    return all(versions[0][name] == versions[1][name] for name in common)


def _spread(row: Row) -> float:
    """Half the distance of the quartiles, of the median."""
    low, high = row["quartiles_ms"]
    return (high - low) / 2 / row["median_ms"]


def _scatter(ratios: Sequence[float]) -> float:
    low, median, high = statistics.quantiles(ratios, n=4)
    return (high - low) / 2 / median
