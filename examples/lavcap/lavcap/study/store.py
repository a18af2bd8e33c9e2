"""The result file: one run a line, written anew and renamed after every run, so that a killed study goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavcap.files import write_whole

Runs = dict[str, dict[str, Any]]  # by lavcap.study.conditions.Condition.key


def read_runs(path: Path) -> Runs:
    """What has been run; nothing if there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}


def write_runs(path: Path, runs: Runs, conditions: dict[str, Any]) -> None:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in runs.items())
    text = f'{{"conditions": {json.dumps(conditions)},\n "runs": {{\n{lines}\n }}}}\n'
    write_whole(path, text)
