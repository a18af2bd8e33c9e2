"""Killed at any moment, preparation goes on and ends with the bytes of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from lavcap.data import shards
from lavcap.data.dataset import PreparedDataset
from lavcap.data.prepare import Job, prepare
from media import MEAN_COLOURS, write_captions_file, write_clip

NUM_KEPT = 5  # in shards of two


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(NUM_KEPT):
        write_clip(folder / f"clip_{number}.mkv", 1.0 + number / 4)
    write_clip(folder / "silent_3.mkv", 1.0, sound=None)
    rows = [("clip", number, f"caption {number}") for number in range(NUM_KEPT)]
    rows.insert(3, ("silent", 3, "none"))
    write_captions_file(folder / "captions.csv", rows)
    return folder


def job(media: Path, folder: Path) -> Job:
    return Job(media, media / "captions.csv", folder, "train", clips_per_shard=2)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "train").iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(media: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    prepare(job(media, folder), MEAN_COLOURS, workers=0)
    whole = content(folder)
    assert sorted(whole) == ["manifest.csv", "settings.json", *(f"shard-00000{n}.tar" for n in range(3))]
    return whole


class Killed(BaseException):
    """Stands for the end of the process: nothing of the program handles it."""


def kill_in_write(monkeypatch: pytest.MonkeyPatch, number: int, share: float) -> list[int]:
    """Die in write `number`, when `share` of its bytes are on disk; the list counts the writes."""
    write, count = shards._write, [0]

    def dying(file: BinaryIO, data: bytes) -> None:
        count[0] += 1
        if count[0] == number:
            write(file, data[: int(len(data) * share)])
            raise Killed
        write(file, data)

    monkeypatch.setattr(shards, "_write", dying)
    return count


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_after_a_kill_in_any_write(
    media: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    number = 0
    died = True
    while died:
        number += 1
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            kill_in_write(patch, number, share)
            try:
                prepare(job(media, folder), MEAN_COLOURS, workers=0)
                died = False
            except Killed:
                pass
        prepare(job(media, folder), MEAN_COLOURS, workers=0)
        assert content(folder) == uninterrupted, f"write {number}"
    assert number - 1 == 2 + 2 * NUM_KEPT + 1 + 3  # settings, header, clips and their lines, a drop, ends of shards


def test_after_kills_in_every_run(
    media: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            kill_in_write(patch, 4, 0.7)
            try:
                prepare(job(media, tmp_path), MEAN_COLOURS, workers=0)
                break
            except Killed:
                kills += 1
                assert kills < 20, "no run gets further than the one before"
    assert content(tmp_path) == uninterrupted and kills >= NUM_KEPT


def test_a_lost_end_of_a_shard_is_made_again(media: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """A power failure can keep the manifest and lose what was written before it."""
    prepare(job(media, tmp_path), MEAN_COLOURS, workers=0)
    (tmp_path / "train" / "shard-000002.tar").unlink()
    os.truncate(tmp_path / "train" / "shard-000001.tar", 1000)
    prepare(job(media, tmp_path), MEAN_COLOURS, workers=0)
    assert content(tmp_path) == uninterrupted


@pytest.mark.parametrize(("after_lines", "workers"), [(1, 0), (4, 1)])
def test_after_sigkill(
    media: Path, uninterrupted: dict[str, bytes], tmp_path: Path, after_lines: int, workers: int
) -> None:
    script = Path(__file__).with_name("killed_prepare.py")
    command = [sys.executable, str(script), str(media), str(media / "captions.csv"), str(tmp_path), str(workers)]
    manifest = tmp_path / "train" / "manifest.csv"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not manifest.exists() or manifest.read_bytes().count(b"\n") < 1 + after_lines:
            assert process.poll() is None and time.monotonic() < deadline, "ended or stuck before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert content(tmp_path) != uninterrupted
    with pytest.raises(ValueError, match=r"unfinished, [1-5] of 6 clips: run the same 'lavcap prepare' again"):
        PreparedDataset(tmp_path, "train")
    prepare(job(media, tmp_path), MEAN_COLOURS, workers=0)
    assert content(tmp_path) == uninterrupted
