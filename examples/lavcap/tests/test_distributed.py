"""Two real processes, joined by gloo, give what one process gives with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lavcap import checkpoint
from lavcap.train import run
from safetensors.torch import load_file
from small import CASES, losses, small_trainer

EXAMPLE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, EXAMPLE / "tests" / "two_processes.py", folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(folder: Path, tmp_path: Path, case: str) -> None:
    alone = small_trainer(CASES[case](tmp_path, 4), clips=11)
    run(alone)
    rows = json.loads((folder / case / checkpoint.RECORD).read_text())["log_history"]
    together = [(row["loss"], row["ce_loss"], row["ot_loss"]) for row in rows if "ce_loss" in row]
    assert len(together) == len(losses(alone)) > 1
    # Sums in another order, in float32, over some hundred operations and a few updates.
    for ours, theirs in zip(together, losses(alone)):
        assert ours == pytest.approx(theirs, rel=1e-4)
    validation = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert validation == pytest.approx(
        [row["eval_loss"] for row in alone.state.log_history if "eval_loss" in row], rel=1e-4
    )


def test_a_sharded_model_is_written_whole(folder: Path) -> None:
    """Written and read back by both processes in two_processes.py; the file holds whole tensors."""
    written = load_file(folder / "checkpoint-1" / checkpoint.WEIGHTS)
    trained = load_file(checkpoint.best_checkpoint(folder / "per_token") / checkpoint.WEIGHTS)
    assert all(written[name].shape == value.shape for name, value in trained.items())
