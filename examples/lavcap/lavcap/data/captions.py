"""Reads captions in AudioCaps' format: ``audiocap_id,youtube_id,start_time,caption``, one line a caption."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lavcap.files import read_table

COLUMNS = ("youtube_id", "start_time", "caption")  # those that are read; audiocap_id and others may stand beside them
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]+")


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions of each clip ``<youtube_id>_<start>``, in the file's order; a clip of empty captions has none.

    Raises:
        ValueError: no table (:func:`lavcap.files.read_table`), a column is missing, or an id or a start is not one; the
            message names the line.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no caption file {path}; it has the columns audiocap_id,youtube_id,start_time,caption")
    columns, rows = read_table(path)
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; its first line is {columns}, and must name "
            "youtube_id, start_time and caption as AudioCaps' files do"
        )
    clips: dict[str, list[str]] = {}
    for line, fields in rows:
        _check_number(fields, rows[0].fields, f"{path}, line {line}")
        clip_id = _clip_id(fields, f"{path}, line {line}")
        caption = " ".join(fields["caption"].split())
        clips.setdefault(clip_id, []).extend([caption] if caption else [])
    return {clip_id: tuple(captions) for clip_id, captions in clips.items()}


def read_ids(path: Path) -> frozenset[str]:
    """Clip ids or YouTube ids, one a line, as in AudioCaps' list of the 944 test clips that papers report on."""
    ids = frozenset(path.read_text(encoding="utf-8-sig").split())
    if not ids:
        raise ValueError(f"{path} holds no id; it must hold one clip id or YouTube id a line")
    return ids


def youtube_id(clip_id: str) -> str:
    """The part before the last underscore: ids themselves may hold underscores."""
    return clip_id.rpartition("_")[0]


def is_selected(clip_id: str, ids: Collection[str]) -> bool:
    return clip_id in ids or youtube_id(clip_id) in ids


def _check_number(row: dict[str, str], first: dict[str, str], where: str) -> None:
    """Refuse the rest of a caption that was broken over two lines and has as many commas as a row."""
    number = row.get("audiocap_id", "").strip()
    if " " in number or (first.get("audiocap_id", "").strip().isdecimal() and not f"0{number}".isdecimal()):
        raise ValueError(
            f"{where}: audiocap_id {number!r} must be a number, as in the first line: if it is the rest of a caption, "
            "join it to the line before and quote the caption; the column can be left out"
        )


def _clip_id(row: dict[str, str], where: str) -> str:
    name, start = row["youtube_id"].strip(), row["start_time"].strip()
    if not _YOUTUBE_ID.fullmatch(name):
        raise ValueError(f"{where}: youtube_id {name!r} must consist of letters, digits, '-' and '_'")
    if not re.fullmatch(r"\d+(\.0+)?", start):
        raise ValueError(f"{where}: start_time {start!r} must be a whole number of seconds")
    return f"{name}_{int(float(start))}"
