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


def whole_run(run: Path) -> Path:
    """Two checkpoints as training leaves them; the newer."""
    for step in (1, 2):
        folder = checkpoint.start_folder(run / f"checkpoint-{step}")
        checkpoint.save_trained(Model(), folder)
        (folder / checkpoint.RECORD).write_text(json.dumps({"best_global_step": 2}))
        (folder / checkpoint.TOKENIZER).mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.CONFIG, "tokenizer/tokenizer.json"):
            (folder / name).write_bytes(name.encode() * 100)
        checkpoint.write_checksums(folder)
        checkpoint.finish_folder(run / folder.name.removeprefix(".unfinished-"))
    return run / "checkpoint-2"


def test_every_file_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    """A byte flipped, the end cut off, nothing left, or no file: each is told of, with the checkpoint to go on from."""
    newest = whole_run(tmp_path)
    checkpoint.verify(newest)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 8  # seven and their checksums
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (bytes(flipped), content[: len(content) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError) as error:
                checkpoint.verify(newest)
            if path.name != checkpoint.CHECKSUMS or damaged is None:  # a flipped sum blames the file that it is of
                what = "missing" if damaged is None else "damaged"
                assert str(error.value).startswith(f"{path} is {what}")
            assert str(error.value).endswith(f"remove {newest}, and {tmp_path / 'checkpoint-1'} is taken")
            path.write_bytes(content)
    checkpoint.verify(newest)
    (newest / "test").mkdir()
    (newest / "test" / "captions.csv").touch()  # an evaluation may lie in it
    checkpoint.verify(newest)


def test_without_an_older_checkpoint_it_says_so(tmp_path: Path) -> None:
    newest = whole_run(tmp_path)
    checkpoint.remove_folder(tmp_path / "checkpoint-1")
    (newest / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer.pt is missing: no older checkpoint is beside it; copy it again"):
        checkpoint.verify(newest)
    moved = newest.rename(tmp_path / "mine")
    (moved / checkpoint.CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"mine/checksums.json is missing, without which nothing says"):
        checkpoint.verify(moved)


def test_captions_need_no_optimiser_and_no_damaged_weights(tmp_path: Path) -> None:
    newest = whole_run(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
    with pytest.raises(ValueError, match="section"):  # of the stand-in for a config: so far it got
        checkpoint.load_checkpoint(newest)
    path = newest / checkpoint.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of a weight: safetensors alone would read another number
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trained.safetensors is damaged, its checksum is not"):
        checkpoint.load_checkpoint(newest)
    path.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"trained.safetensors is damaged \(.*: copy it again, or remove"):
        checkpoint.load_trained(Model(), newest)


@pytest.mark.parametrize("content", [b"", b"{", None])
def test_a_damaged_record_names_itself(tmp_path: Path, content: bytes | None) -> None:
    path = whole_run(tmp_path) / checkpoint.RECORD
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checkpoint.best_checkpoint(tmp_path)
    assert str(error.value).startswith(str(path)) and f"{tmp_path / 'checkpoint-1'} is taken" in str(error.value)
