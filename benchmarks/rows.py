"""Result files, read: rows of this version and of the first one alike, and what is asked of them.

A file holds ``{"conditions": …, "rows": […], "absent": …, "not_run": …}``; README.md says what a row is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Of the first version: what a case is stood in its name only.
OLD_NAME = re.compile(r"(attend|solve)(?:, (\w+) gradient)? ([a-z_]+)-(\d+)x(\d+)x(\d+)x(\d+)$")
DEFAULTS: Row = {
    "dtype": "float32", "grad": None, "tol": None, "tokens": "clustered", "epsilon": 0.1, "rounds": 50, "note": "",
    "share_of_limit": None, "error": None,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    name: str  # of the file
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
        rows = [_completed(row) for row in content["rows"]]
        return Result(path.stem, content["conditions"], rows, content.get("absent", {}), content.get("not_run", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no file of results ({type(error).__name__}: {error}); make one with --out, see README.md")


def _completed(row: Row) -> Row:
    if "op" in row:
        return DEFAULTS | row
    old = OLD_NAME.match(row["case"])
    if old is None:  # of a GPU, with its facts beside the name
        return DEFAULTS | {"op": "attend", "suite": "attend"} | row
    op, grad, size, *numbers = old.groups()
    sizes = dict(zip("BNMD", map(int, numbers)))
    return DEFAULTS | {"op": op, "suite": op, "grad": grad, "size": size} | sizes | row


def cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case, in the order of the file: ours first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("otfuse")


def where(rows: Iterable[Row], **wanted: Any) -> Iterator[Row]:
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def shape(row: Row) -> str:
    return f"{row['B']} × {row['N']} × {row['M']}" + (f" × {row['D']}" if row["op"] == "attend" else "")


def condition_line(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    gpu = ""
    if "gpu" in facts:
        clocks = ", ".join(f"{name} {value}" for name, value in (facts["gpu"]["clocks"] or {}).items())
        gpu = f"driver {facts['gpu']['driver']}, CUDA {facts['gpu']['cuda']}, {clocks or 'clocks unknown'}, "
    clock = {"processor": "processor time", "wall": "wall clock", "device": "device time"}.get(facts.get("clock"))
    said = "; ".join(text for text in (facts.get("note"), clock) if text)
    note = f" ({said})" if said else ""
    return (
        f"{facts['date']}, {facts['machine']}{note}, {gpu}{facts['cores']} cores, {facts['threads']} thread(s), "
        f"Python {facts['python']}, {versions}, commit {facts['commit'] or 'unknown'}."
    )


def limit_line(facts: dict[str, Any]) -> str:
    """What the machine reached in the same run; empty where that was not measured."""
    if not facts.get("limits"):
        return ""
    products = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in facts["limits"]["product_gflop_per_s"].items())
    copy = facts["limits"]["copy_gb_per_s"]
    return f"In the same run a copy reached {copy:.3g} GB/s, and a matrix product {products} (GFLOP/s)."
