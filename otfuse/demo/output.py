"""Files that a user names are written whole or not at all, and what is no regular file is written through."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to fill, which becomes the content of `path` at the end of the ``with``, unless that raises.

    Links are followed: their target gets the content. A device, a pipe or an open file of this process
    (``/dev/stdout``) stays what it is and gets the bytes; anything else is replaced in one step.
    """
    through = _opened(path)
    if through is None:
        with _replacing(Path(os.path.realpath(path))) as file:
            yield file
        return
    memory = _Memory(os.fspath(path))
    yield memory
    sys.stdout.flush()  # what was printed comes first
    with open(through, "wb") as file:
        file.write(memory.getbuffer())


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    partial = target.with_name(f".partial-{target.name}")
    try:
        with open(str(partial), "wb") as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


class _Memory(io.BytesIO):
    """With a name, by which encoders choose a format."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def _opened(path: str | Path) -> int | str | None:
    """What to open to write through `path`: a descriptor of this process, or the path; None for a regular file."""
    here = os.path.abspath(path)
    for _ in range(40):  # links, as many as Linux follows
        folder, name = os.path.split(here)
        if os.path.realpath(folder) == f"/proc/{os.getpid()}/fd" and name.isdecimal():
            return os.dup(
                int(name)
            )  # opened anew, a regular file would be cut or overwritten where it is being written
        if not os.path.islink(here):
            break
        here = os.path.join(os.path.realpath(folder), os.readlink(here))
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
    return None if is_regular else os.fspath(path)
