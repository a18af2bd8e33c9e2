"""The most memory held at once beyond inputs and outputs: no N x M array where none is promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory
import pytest
import torch


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, device: torch.device) -> list[dict[str, Any]]:
    if request.config.option.dry_run:
        pytest.skip("an interpreter's memory says nothing")
    if device.type == "cpu" and not os.access(memory.CLEAR, os.W_OK):
        pytest.skip("this system does not tell the peak memory of a stretch of a process")
    command = [sys.executable, "-W", "ignore", Path(memory.__file__), "--device", device.type]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | memory.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_keeps_the_promises(rows: list[dict[str, Any]], timed: bool, results: Any) -> None:
    if timed:
        results.add(rows)
    broken = [
        f"{row['case']}, {row['contender']}: {row['extra_mb']:.2f} MB, promised {row['promised_mb']:.2f}"
        for row in rows
        if row["promised_mb"] is not None and row["extra_mb"] > row["promised_mb"]
    ]
    assert broken == []
    assert any(row["promised_mb"] is not None for row in rows)


def test_that_the_measure_sees_arrays(rows: list[dict[str, Any]]) -> None:
    """What is known to hold some: the loop in plain PyTorch, and more of them for its gradient."""
    plain = {(row["op"], row["size"], row["B"], row["grad"]): row for row in rows if row["contender"].startswith("log")}
    forward, backward = (plain["solve", "square", 1, grad] for grad in (None, "unroll"))
    assert 1.9 <= forward["matrices"] < backward["matrices"]  # two, and pages that were there before
