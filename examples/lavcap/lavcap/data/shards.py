"""The files of a prepared split: WebDataset shards, their manifest, and the settings they were made with.

    <folder>/<split>/settings.json      what was prepared and how; written first
    <folder>/<split>/shard-000000.tar   two members a clip: <clip_id>.json, <clip_id>.safetensors
    <folder>/<split>/manifest.csv       one line a clip, in order: where it lies, or why it was dropped

A line is added to the manifest after the clip's bytes are on disk, so the manifest says what is done: after a kill,
whatever goes beyond it is cut off and the work goes on behind it (:func:`open_split`). A split is complete when the
manifest has as many lines as the settings announce.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import zlib
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from lavcap.data.decode import Dropped
from lavcap.data.sample import Sample
from lavcap.files import lock, read_json

MANIFEST = "manifest.csv"
SETTINGS = "settings.json"
_BLOCK = 512  # bytes: a tar's members begin at multiples of it
_END_OF_TAR = bytes(2 * _BLOCK)


class Line(NamedTuple):
    """A line of the manifest; the last four say where a kept clip lies and what its bytes are."""

    clip_id: str
    status: str  # "kept" or "dropped"
    reason: str = ""
    detail: str = ""
    num_samples: int = 0
    num_frames: int = 0
    shard: str = ""
    offset: int = 0  # bytes, of both members together
    size: int = 0
    crc32: str = ""  # of these bytes, eight hexadecimal digits; empty in a set prepared before there were checksums

    @property
    def kept(self) -> bool:
        return self.status == "kept"


def parse_manifest(content: bytes, where: str | Path) -> list[Line]:
    """Lines of the manifest at `where`, without a last one that was cut short.

    Raises:
        ValueError: a line is not one; the message names it.
    """
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace")
    header, *rows = [*csv.reader(io.StringIO(whole))] or [[]]
    lines = []
    for number, row in enumerate(rows, start=2):
        try:
            lines.append(_parse(dict(zip(header, row, strict=True))))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{where}, line {number} is damaged: copy the split's folder again, or remove it and prepare it anew"
            ) from None
    return lines


def _parse(fields: dict[str, str]) -> Line:
    if fields["status"] not in ("kept", "dropped"):
        raise ValueError(fields["status"])
    numbers = {
        name: int(fields.pop(name)) for name in ("num_samples", "num_frames", "offset", "size") if name in fields
    }
    return Line(**fields, **numbers)  # type: ignore[arg-type]


def read_manifest(folder: Path) -> list[Line]:
    """The manifest of a split in progress or complete; empty where none was begun."""
    path = folder / MANIFEST
    return parse_manifest(path.read_bytes(), path) if path.is_file() else []


def _format(line: tuple[object, ...]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(" ".join(str(field).split()) for field in line)
    return text.getvalue().encode("utf-8", "backslashreplace")


class SplitWriter:
    """Appends clips to a split's shards and manifest; made by :func:`open_split`, used in a ``with``."""

    def __init__(self, folder: Path, manifest: BinaryIO, lines: list[Line], clips_per_shard: int) -> None:
        self.lines = lines
        self._folder, self._manifest, self._clips_per_shard = folder, manifest, clips_per_shard
        self._num_kept = sum(line.kept for line in lines)
        self._shard: BinaryIO | None = None
        if self._num_kept:
            last = next(line for line in reversed(lines) if line.kept)
            self._shard = (folder / last.shard).open("r+b", buffering=0)
            self._shard.seek(last.offset + last.size)

    def keep(self, clip_id: str, captions: tuple[str, ...], waveform: Tensor, visual: Tensor) -> None:
        shard = shard_name(self._num_kept // self._clips_per_shard)
        if self._num_kept % self._clips_per_shard == 0:
            self._end_shard()
            self._shard = (self._folder / shard).open("xb", buffering=0)
        assert self._shard is not None
        members = tar_members(clip_id, captions, waveform, visual)
        offset = self._shard.tell()
        _write(self._shard, members)
        place = (shard, offset, len(members), checksum(members))
        self._add(Line(clip_id, "kept", "", "", len(waveform), len(visual), *place))
        self._num_kept += 1

    def drop(self, clip_id: str, dropped: Dropped) -> None:
        self._add(Line(clip_id, "dropped", dropped.reason.value, dropped.detail))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with self._manifest, self._shard or nullcontext():
            if error is None:
                self._end_shard()

    def _end_shard(self) -> None:
        """End the tar; doing it again after a kill writes the same bytes."""
        if self._shard is not None:
            _write(self._shard, _END_OF_TAR)
            self._shard.close()
            self._shard = None

    def _add(self, line: Line) -> None:
        _write(self._manifest, _format(line))
        self.lines.append(line)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def open_split(folder: Path, settings: dict[str, Any]) -> SplitWriter:
    """Begin a split, or go on behind the last clip that an earlier run finished.

    Raises:
        ValueError: the split was begun with other settings, or another process is preparing it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_error:
        manifest = on_error.enter_context((folder / MANIFEST).open("a+b", buffering=0))
        lock(manifest, folder, "lavcap prepare")
        _check_settings(folder / SETTINGS, settings)
        manifest.seek(0)
        lines = _on_disk(folder, parse_manifest(manifest.read(), folder / MANIFEST))
        _cut_off(folder, manifest, lines)
        writer = SplitWriter(folder, manifest, lines, settings["clips_per_shard"])
        on_error.pop_all()
    return writer


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb", buffering=0) as file:
            _write(file, json.dumps(settings, indent=1).encode() + b"\n")
        temporary.replace(path)
        return
    begun = read_json(path.read_bytes(), path, "copy it again, or remove the folder and prepare the split anew")
    wanted = json.loads(json.dumps(settings))
    if begun != wanted:
        keys = [key for key in wanted.keys() | begun.keys() if begun.get(key) != wanted.get(key)]
        differing = ", ".join(f"{key} was {begun.get(key)!r}, is {wanted.get(key)!r}" for key in sorted(keys))
        raise ValueError(
            f"{path.parent} was begun with other settings ({differing}): go on with the same, or name another folder"
        )


def _on_disk(folder: Path, lines: list[Line]) -> list[Line]:
    """Lines up to the first whose clip is not there: a file may have been lost, or cut when the power failed."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("shard-*.tar")}
    lost = (i for i, line in enumerate(lines) if line.kept and sizes.get(line.shard, 0) < line.offset + line.size)
    return lines[: next(lost, len(lines))]


def _cut_off(folder: Path, manifest: BinaryIO, lines: list[Line]) -> None:
    """Remove what goes beyond the lines: bytes of the manifest and of the last shard, and later shards."""
    header = _format(Line._fields)
    if lines:
        manifest.truncate(len(header) + sum(len(_format(line)) for line in lines))
    else:
        manifest.truncate(0)
        _write(manifest, header)
    ends = {line.shard: line.offset + line.size for line in lines if line.kept}
    for path in folder.glob("shard-*.tar"):
        if path.name not in ends:
            path.unlink()
        elif path.stat().st_size > ends[path.name] + len(_END_OF_TAR):  # shorter rests are written over
            os.truncate(path, ends[path.name])


def _write(file: BinaryIO, data: bytes) -> None:
    """All of `data`, on disk before this returns."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def tar_members(clip_id: str, captions: tuple[str, ...], waveform: Tensor, visual: Tensor) -> bytes:
    """The two members of a clip; nothing in them depends on the time, the user or the machine."""
    text = json.dumps({"captions": captions}, ensure_ascii=False).encode()
    tensors = safetensors.save({"waveform": waveform.contiguous(), "visual": visual.contiguous()})
    return _member(f"{clip_id}.json", text) + _member(f"{clip_id}.safetensors", tensors)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    padding = bytes(-len(data) % _BLOCK)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + padding


def checksum(members: bytes) -> str:
    """Of a clip's two members, as the manifest has it."""
    return f"{zlib.crc32(members):08x}"


def read_clip(members: bytes, line: Line, location: str) -> Sample:
    """The clip of a manifest's line from the bytes that lie where the line says, in the split at `location`.

    Raises:
        ValueError: they are not those that were written, or of another clip; the message names the shard and the clip.
    """
    if line.crc32 and checksum(members) != line.crc32:
        raise _damaged(line, location, f"its checksum is {checksum(members)} and must be {line.crc32}")
    try:
        with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        expected = [f"{line.clip_id}.json", f"{line.clip_id}.safetensors"]
        if list(content) != expected:
            raise _damaged(line, location, f"{' and '.join(content)} lie there")
        text, tensors = (content[name] for name in expected)
        captions, clip = tuple(json.loads(text)["captions"]), safetensors.load(tensors)
    except (tarfile.TarError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise _damaged(line, location, str(error)) from None
    return Sample(line.clip_id, clip["waveform"], clip["visual"].to(torch.float32), captions)


def _damaged(line: Line, location: str, what: str) -> ValueError:
    return ValueError(
        f"{location}/{line.shard} is damaged: clip {line.clip_id}, {line.size} bytes from {line.offset} on, cannot be "
        f"read ({what}): copy the shard again from where it was prepared, or remove it there and run the same "
        "'lavcap prepare' again"
    )
