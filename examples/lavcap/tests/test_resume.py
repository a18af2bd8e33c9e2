"""A run that is killed and started again is the run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lavcap import checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("interrupted_runs.py")
    done = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def history(run: Path) -> list[dict[str, float]]:
    rows = json.loads((run / checkpoint.RECORD).read_text())["log_history"]
    return [row for row in rows if "loss" in row or "eval_loss" in row]


def test_losses_go_on_as_if_nothing_had_happened(runs: Path) -> None:
    whole = history(runs / "whole")
    assert len(whole) == 9 + 3  # three epochs of three updates, the last of each of one batch only
    assert history(runs / "killed") == whole


def test_it_ends_with_the_same_weights(runs: Path) -> None:
    whole, killed = (checkpoint.latest_checkpoint(runs / name) for name in ("whole", "killed"))
    assert whole is not None and killed is not None and whole.name == killed.name == "checkpoint-9"
    assert (whole / checkpoint.WEIGHTS).read_bytes() == (killed / checkpoint.WEIGHTS).read_bytes()


def test_nothing_half_written_stays(runs: Path) -> None:
    assert sorted(p.name for p in (runs / "killed").iterdir()) == sorted(p.name for p in (runs / "whole").iterdir())
