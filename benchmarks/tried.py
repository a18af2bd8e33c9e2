"""What configurations were found to compile to, taken or not: benchmarks/tried.json.

A search ahead of time (tune_triton.py) and the table of what is taken (ahead_of_time.py) compile nothing twice. Entries
of other sources, or of another Triton, are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import triton
from variant import Resources, Row

TRIED = Path(__file__).with_suffix(".json")

Configuration = tuple[int, int, int]  # BLOCK_D, num_warps, num_stages
Tried = dict[tuple[Row, Configuration], Resources | str]  # or the name of the error


def load_tried(hash_of: Callable[[str], str]) -> Tried:
    """Those of the sources, by variant, that hash as they do now."""
    file = json.loads(TRIED.read_text()) if TRIED.exists() else {}
    if file.get("triton") != triton.__version__:
        return {}
    current = {name for name, sources in file["sources"].items() if sources == hash_of(name)}
    found: Tried = {}
    for text, results in file["rows"].items():
        row = row_of(text)
        for configuration, result in results.items() if row.variant in current else ():
            BLOCK_D, num_warps, num_stages = map(int, configuration.split())
            key = row, (BLOCK_D, num_warps, num_stages)
            found[key] = result if isinstance(result, str) else Resources(*result)
    return found


def write_tried(tried: Tried, hash_of: Callable[[str], str]) -> None:
    """One line a row."""
    rows: dict[str, dict[str, Resources | str]] = {}
    for (row, configuration), result in sorted(tried.items()):
        rows.setdefault(str(row), {})[" ".join(map(str, configuration))] = result
    head = {
        "note": "By BLOCK_D, warps, stages: registers and bytes of stack a thread, bytes shared; or the error",
        "triton": triton.__version__,
        "sources": {name: hash_of(name) for name in sorted({row.variant for row, _ in tried})},
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    found = ",\n".join(f"    {json.dumps(text)}: {json.dumps(results)}" for text, results in rows.items())
    TRIED.write_text("{\n" + ",\n".join([*lines, '  "rows": {\n' + found + "\n  }"]) + "\n}\n")


def row_of(text: str) -> Row:
    """The row that is written like this."""
    variant, dtype, tile, target = text.rsplit(" ", 3)
    N, M = map(int, tile.split("x"))
    return Row(variant, dtype, (N, M), target)
