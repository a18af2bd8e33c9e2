"""Checkpoints of a few megabytes: what training changed and nothing that was only read, written whole or not at all.

A run's folder holds ``checkpoint-<step>`` folders. Each has ``trained.safetensors`` (LoRA, projector, whatever else
is trained, statistics that adapt), what resuming needs (optimiser, schedule, random states, the trainer's own record),
``config.yaml``, the tokenizer, and ``checksums.json`` of them all, by which a file that is missing or damaged is found
before any is read. A folder is filled under a name that no reader looks for, synced to disk and renamed,
so one that has its final name is complete, whenever the process was killed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lavcap.config import Config
from lavcap.config_file import load_config
from lavcap.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lavcap.captioner import Captioner

WEIGHTS = "trained.safetensors"
RECORD = "trainer_state.json"
TOKENIZER = "tokenizer"
CONFIG = "config.yaml"
CHECKSUMS = "checksums.json"
_FINISHED = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


class Checkpoint(NamedTuple):
    """A trained captioner, in eval mode, and what it was trained with."""

    captioner: Captioner
    tokenizer: PreTrainedTokenizerBase
    config: Config


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The captioner of a run of ``lavcap train`` (its best on validation) or of one of its checkpoints.

    Raises:
        FileNotFoundError: ``folder`` is neither.
        ValueError: a file is missing or damaged, or the weights do not fit the config that lies beside them.
    """
    from lavcap.captioner import load_captioner
    from lavcap.language import build_tokenizer

    chosen = best_checkpoint(Path(folder))
    if (chosen / CHECKSUMS).is_file():
        verify(chosen, (WEIGHTS, CONFIG, TOKENIZER))
    config = load_config(chosen / CONFIG)
    tokenizer = build_tokenizer(config.language, folder=chosen / TOKENIZER)
    captioner = load_captioner(config, tokenizer, device=device)
    load_trained(captioner, chosen)
    return Checkpoint(captioner.eval(), tokenizer, config)


def save_trained(model: Captioner, folder: Path, *, write: bool = True) -> None:
    """Write what training changed to ``folder``.

    Where the model is sharded over processes, all of them have to call this, the writing one with ``write=True``.
    """
    whole = {name: _whole(value).cpu().contiguous() for name, value in model.trained_state().items()}
    if write:
        save_file(whole, folder / WEIGHTS)


def load_trained(model: Captioner, folder: Path) -> None:
    """Read what :func:`save_trained` wrote into a model of the same config.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
        ValueError: the checkpoint is damaged, or holds other names or shapes than this model trains; the message lists
            them.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}: not a checkpoint of lavcap train")
    try:
        saved, live = load_file(path), model.trained_state()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {_way_out(folder)}") from None
    problems = [f"{name} is missing" for name in live.keys() - saved.keys()]
    problems += [f"{name} is not trained here" for name in saved.keys() - live.keys()]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, here {tuple(live[name].shape)}"
        for name in live.keys() & saved.keys()
        if live[name].shape != saved[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} is of another config: {'; '.join(sorted(problems)[:5])}{more}")
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(_placed_like(value, saved[name]))


def write_checksums(folder: Path) -> None:
    """Of all files of a checkpoint, when they are written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, names: tuple[str, ...] = ("",)) -> None:
    """Raise ``ValueError`` if a file of a checkpoint is missing or has other bytes than were written.

    Args:
        folder: of the checkpoint.
        names: what the names of the files to look at begin with; all of them, unless given.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        raise ValueError(f"{path} is missing, without which nothing says that {folder} is whole: {_way_out(folder)}")
    sums = read_json(path.read_bytes(), path, _way_out(folder))
    for name, written in sums.items():
        if not name.startswith(names):
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: {_way_out(folder)}")
        if _checksum(folder / name) != written:
            raise ValueError(f"{folder / name} is damaged, its checksum is not the one written: {_way_out(folder)}")


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _way_out(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    older = [path for path in checkpoints(folder.parent) if _step(path) < _step(folder)]
    if not older:
        return f"no older checkpoint is beside it; copy it again, or remove {folder} to train anew"
    return f"copy it again, or remove {folder}, and {older[-1]} is taken"


def _step(folder: Path) -> float:
    match = _FINISHED.fullmatch(folder.name)
    return int(match[1]) if match else math.inf


def unfinished(target: Path) -> Path:
    """Where ``target`` is filled before it has its name."""
    return target.with_name(_UNFINISHED + target.name)


def start_folder(target: Path) -> Path:
    """An empty folder to fill; :func:`finish_folder` makes it ``target``."""
    folder = unfinished(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_folder(target: Path) -> None:
    """Sync what was filled to disk and give it its name, which must be free."""
    folder = unfinished(target)
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
    os.rename(folder, target)
    _sync(target.parent)


def remove_folder(target: Path) -> None:
    """Delete a checkpoint, which stops being one before the first of its files goes."""
    doomed = unfinished(target)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(target, doomed)
    shutil.rmtree(doomed)


def keep_newest(run: Path, count: int, best: int | None) -> None:
    """Delete all checkpoints of a run but the ``count`` newest and that of step ``best``."""
    for old in checkpoints(run)[: -max(count, 1)]:
        if old.name != f"checkpoint-{best}":
            remove_folder(old)


def remove_unfinished(run: Path) -> None:
    """Delete what a killed process left half written or half deleted in a run's folder."""
    for leftover in run.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _FINISHED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    """Where to resume from, or None for a run that has to start."""
    found = checkpoints(run)
    return found[-1] if found else None


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the best validation loss; ``run`` may also be a checkpoint itself, which is then taken.

    Raises:
        FileNotFoundError: neither a checkpoint nor a run that has one.
    """
    if (run / WEIGHTS).is_file():
        return run
    latest = latest_checkpoint(run)
    if latest is None:
        raise FileNotFoundError(f"no checkpoint in {run}: name a folder that lavcap train wrote")
    path = latest / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, which names the best checkpoint: {_way_out(latest)}")
    best = read_json(path.read_bytes(), path, _way_out(latest))["best_global_step"]
    return run / f"checkpoint-{best}" if best else latest


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _placed_like(live: Tensor, whole: Tensor) -> Tensor:
    if isinstance(live, DTensor):
        return distribute_tensor(whole.to(live.device), live.device_mesh, live.placements)
    return whole


def _sync(path: Path) -> None:
    """Have a file's or folder's content on disk before anything that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
