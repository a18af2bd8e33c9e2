"""Checkpoints: what they hold, and that no reader ever takes half of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lavcap import checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn


class Model(nn.Module):
    """Of a captioner what checkpoints are about: frozen weights, trained ones, statistics that adapt."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 1000).requires_grad_(False)
        self.head = nn.Linear(1000, outputs)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def trained_state(self) -> dict[str, Tensor]:
        state = {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}
        return state | {f"norm.{name}": value for name, value in self.norm.named_buffers()}


def test_only_what_training_changes_is_written(tmp_path: Path) -> None:
    saved = Model()
    saved.norm(torch.randn(8, 4))  # moves the running statistics
    checkpoint.save_trained(saved, tmp_path)

    names = set(load_file(tmp_path / checkpoint.WEIGHTS))
    assert names == {"head.weight", "head.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    loaded = Model()
    checkpoint.load_trained(loaded, tmp_path)
    assert torch.equal(loaded.head.weight, saved.head.weight)
    assert torch.equal(loaded.norm.running_mean, saved.norm.running_mean)
    assert not torch.equal(loaded.frozen.weight, saved.frozen.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda other: other.frozen.requires_grad_(True), "frozen.bias is missing"),
        (lambda other: other.head.requires_grad_(False), "head.bias is not trained here"),
        (lambda other: setattr(other, "head", nn.Linear(1000, 3)), r"head.bias has shape \(2,\), here \(3,\)"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change, message: str) -> None:
    checkpoint.save_trained(Model(), tmp_path)
    other = Model()
    change(other)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        checkpoint.load_trained(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a checkpoint of lavcap train"):
        checkpoint.load_trained(Model(), tmp_path)
    with pytest.raises(FileNotFoundError, match="name a folder that lavcap train wrote"):
        checkpoint.best_checkpoint(tmp_path)


class Killed(BaseException):
    """Ends the process as far as the code under test can see: nothing of ours catches it."""


def write(run: Path, step: int, best: int | None = None) -> None:
    folder = checkpoint.start_folder(run / f"checkpoint-{step}")
    checkpoint.save_trained(Model(), folder)
    (folder / checkpoint.RECORD).write_text(json.dumps({"best_global_step": best}))
    checkpoint.finish_folder(run / f"checkpoint-{step}")


@pytest.mark.parametrize("call", range(14))
def test_killed_at_any_write_the_last_whole_checkpoint_is_taken(tmp_path: Path, monkeypatch, call: int) -> None:
    """Every call that changes the disk in turn is the last that happens, in writing one and in deleting one."""
    write(tmp_path, 1)
    write(tmp_path, 2, best=2)
    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in [
            (checkpoint.os, "fsync"),
            (checkpoint.os, "rename"),
            (checkpoint.os, "unlink"),
            (checkpoint.os, "rmdir"),
            (checkpoint, "save_file"),
        ]:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with pytest.raises(Killed):
            write(tmp_path, 3, best=3)
            checkpoint.keep_newest(tmp_path, 1, best=3)

    whole = checkpoint.latest_checkpoint(tmp_path)
    assert whole in {tmp_path / "checkpoint-2", tmp_path / "checkpoint-3"}
    for folder in checkpoint.checkpoints(tmp_path):
        checkpoint.load_trained(Model(), folder)
        assert (folder / checkpoint.RECORD).exists()
    checkpoint.remove_unfinished(tmp_path)
    assert all(path.name.startswith("checkpoint-") for path in tmp_path.iterdir())
    if whole != tmp_path / "checkpoint-3":
        write(tmp_path, 3)  # the resumed run comes to the same step


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        write(tmp_path, step, best=5)
    checkpoint.keep_newest(tmp_path, 1, best=5)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20"]
    assert checkpoint.best_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert checkpoint.best_checkpoint(tmp_path / "checkpoint-20") == tmp_path / "checkpoint-20"
