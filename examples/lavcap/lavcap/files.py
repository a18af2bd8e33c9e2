"""Tables that people write by hand, outputs that are whole or not there, and folders that one process works in."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from otfuse.demo.output import whole_file


class Row(NamedTuple):
    """A line of a table; `line` is its number in the file, from 1, of its first where a field spans several."""

    line: int
    fields: dict[str, str]


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file (RFC 4180, UTF-8), each row with a field for every column.

    Empty columns at the end, blank lines, a byte order mark and line ends of any system are taken as they come.

    Raises:
        ValueError: no header, a column twice, a row with another number of fields than the header, a quote that is not
            closed or closes elsewhere than at a field's end, another encoding; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_table(path, csv.reader(file, strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _read_table(path: Path, reader: Any) -> tuple[list[str], list[Row]]:
    columns: list[str] = []
    rows: list[Row] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: {error}: a field that begins with a quote must end with one, before a comma or "
                'the end of the line; write a quote inside it twice, as in "a ""fast"" dog"'
            ) from None
        if fields is None:
            return columns, rows
        if not fields:
            continue
        if not columns:
            columns = _without_empty_end(fields, 0)
            twice = [name for name, count in Counter(columns).items() if count > 1]
            if twice or not columns:
                what = f"names {', '.join(map(repr, twice))} twice" if twice else "names no column"
                raise ValueError(f"{path}, line {line}: the header {what}: name each column once")
            continue
        fields = _without_empty_end(fields, len(columns))
        missing = columns[len(fields) :]
        if all(name.startswith("reference_") for name in missing):  # of clips that have fewer than others
            fields += [""] * len(missing)
        if len(fields) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} fields where the header has {len(columns)} "
                f"({','.join(columns)}): quote a caption that holds commas, and keep each on one line"
            )
        _check_quotes(path, line, fields)
        rows.append(Row(line, dict(zip(columns, fields))))


def _without_empty_end(fields: list[str], least: int) -> list[str]:
    while len(fields) > least and not fields[-1].strip():
        fields = fields[:-1]
    return fields


def _check_quotes(path: Path, line: int, fields: list[str]) -> None:
    """Refuse a quote that stayed open until a later line's: what lies between would be lost to one field."""
    for field in fields:
        for following in re.split("\r\n|\r|\n", field)[1:]:
            if following.count(",") >= len(fields) - 1 > 0:
                raise ValueError(
                    f"{path}, line {line}: a quote is open over the end of the line, and {following!r} would be part "
                    "of that field: close it, or write the field on one line if it is whole"
                )


def read_json(text: str | bytes, where: str | Path, way_out: str) -> Any:
    """What a JSON file holds; ``ValueError`` that names the file where it is damaged."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}): {way_out}") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """The file has all of `content` (text in UTF-8), or is as it was before; what is no regular file gets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Work in a folder, which is made, as the only process; see :func:`lock`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as file:
        lock(file, folder, command)
        yield


def lock(file: IO[Any], folder: Path, command: str) -> None:
    """Have this process alone work in `folder` until `file`, which lies there, is closed.

    A lock of the process: those that it starts do not have it, and a kill releases it.

    Raises:
        ValueError: another process has it, or the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"another '{command}' is at work in {folder}: wait for it, or end it") from None
        raise ValueError(f"{folder} cannot be locked ({error.strerror}): name a folder on another disk") from None
