"""Outputs that a user names: whole or not there, through links, and into what is no regular file."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import av
import lavcap
import numpy as np
import pytest
from lavcap import alignment
from lavcap.files import write_whole
from lavcap.study.store import write_runs

import otfuse.demo
from otfuse.demo.output import whole_file
from otfuse.demo.synthesize import write_media


def text(path: Path) -> None:
    write_whole(path, "new\n")


def picture(path: Path) -> None:
    nothing = np.zeros((0, 4, 4, 3), np.uint8)
    shown = alignment.Alignment(1.0, None, np.zeros(0), nothing, np.zeros(0), None, np.zeros(0))
    alignment.draw(path, shown, title="title", lines=["line"])


def runs(path: Path) -> None:
    write_runs(path, {"a": {"test": 1}}, {})


def clip(path: Path) -> None:
    """Matroska, which can be written front to back, from its name."""
    write_media(path, np.zeros((4, 32, 32, 3), np.uint8), None)


WRITERS: dict[Callable[[Path], None], tuple[str, bytes]] = {
    text: ("a.txt", b"new\n"),
    picture: ("a.png", b"\x89PNG"),
    runs: ("a.json", b'{"conditions"'),
    clip: ("a.mkv", b"\x1aE\xdf\xa3"),
}
EVERY = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@EVERY
def test_a_links_target_gets_the_content(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Over two links, one of them relative and from another folder, to a file that is there and one that is not."""
    name, begin = WRITERS[write]
    for target in (tmp_path / "there" / name, tmp_path / "new" / name):
        target.parent.mkdir()
        if target.parent.name == "there":
            target.write_bytes(b"old")
        first, second = tmp_path / f"first-{name}", tmp_path / "links" / name
        second.parent.mkdir(exist_ok=True)
        for link in (first, second):
            link.unlink(missing_ok=True)
        first.symlink_to(os.path.join(target.parent.name, name))
        second.symlink_to(os.path.join("..", first.name))
        write(second)
        assert second.is_symlink() and first.is_symlink() and not target.is_symlink()
        assert target.read_bytes().startswith(begin)
        assert [path.name for path in target.parent.iterdir()] == [name]


@EVERY
def test_a_pipe_stays_one_and_gets_the_content(tmp_path: Path, write: Callable[[Path], None]) -> None:
    name, begin = WRITERS[write]
    pipe = tmp_path / name
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(timeout=60)
    assert read and read[0].startswith(begin) and stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@EVERY
def test_a_device_stays_one(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """By its own name and by a link to it. It is a copy, where nodes can be made, since a failure destroys it."""
    name, _ = WRITERS[write]
    node, link = tmp_path / name, tmp_path / "links" / name
    link.parent.mkdir()
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        node.open("wb").close()
    except PermissionError:
        pytest.skip("device nodes can be made by root alone, and not in every container")
    link.symlink_to(node)
    for path in (node, link):
        write(path)
        assert stat.S_ISCHR(node.stat().st_mode) and link.is_symlink()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, "links"])


@EVERY
def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write) -> None:
    name, _ = WRITERS[write]
    (tmp_path / name).write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("otfuse.demo.output.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"old"


def test_half_a_content_reaches_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "file", pipe):  # with nobody to read it, opening the pipe would wait for ever
        with pytest.raises(KeyError), whole_file(path) as file:
            file.write(b"half")
            raise KeyError
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("name", ["stdout", "fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_the_standard_output_keeps_what_was_printed(tmp_path: Path, name: str, to: str) -> None:
    """Also where it goes to a file: renamed over, or opened anew, that would lose the lines before or after.

    Of /dev, whose own links a failure would destroy, there is a copy.
    """
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    (tmp_path / "fd").symlink_to("/proc/self/fd")
    (tmp_path / "link").symlink_to("stdout")
    path = str(tmp_path / name)  # an absolute name stays as it is
    script = (
        "import sys; from pathlib import Path; from lavcap.files import write_whole\n"
        "print('before'); write_whole(Path(sys.argv[1]), 'content\\n'); print('after')"
    )
    command = [sys.executable, "-c", script, path]
    if to == "pipe":
        printed = subprocess.run(command, stdout=subprocess.PIPE, timeout=100, check=True).stdout
    else:
        with (tmp_path / "out").open("wb") as file:
            subprocess.run(command, stdout=file, timeout=100, check=True)
        printed = (tmp_path / "out").read_bytes()
    assert printed == b"before\ncontent\nafter\n"


def test_nothing_else_renames_a_file_into_place() -> None:
    """By reading: ``os.replace``, ``Path.replace`` and writing by name are left to what knows of links and devices."""
    allowed = {
        ("output.py", "replace"),  # whole_file itself
        ("shards.py", "replace"),  # files of folders that are lavcap's own: a prepared split, a run, a checkpoint
        ("train.py", "replace"),
        ("checkpoint.py", "write_text"),
        ("config_file.py", "write_text"),
    }
    found = set()
    folders = [Path(package.__file__ or "").parent for package in (lavcap, otfuse.demo)]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_rename = node.func.attr == "replace" and (
                len(node.args) == 1 or getattr(node.func.value, "id", "") == "os"  # not str.replace, nor dataclasses'
            )
            if is_rename or node.func.attr in ("write_text", "write_bytes", "rename"):
                found.add((path.name, node.func.attr))
    assert found - {("checkpoint.py", "rename")} == allowed


def test_a_synthetic_clip_is_a_clip(tmp_path: Path) -> None:
    for suffix in (".mp4", ".mkv"):
        write_media(tmp_path / f"a{suffix}", np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4000, np.float32))
        with av.open(str(tmp_path / f"a{suffix}")) as container:
            assert len(list(container.decode(video=0))) == 4
