"""A prepared split as a map: any clip by its index, read from its shard when it is asked for.

Where it lies is a path or any URL that fsspec reads (``s3://``, ``gs://``, ``https://``, with the package that its
message names): a clip is one range of bytes, so training reads from object storage with the sampler it has on a disk.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import fsspec
from torch.utils.data import Dataset

from lavcap.data.captions import is_selected
from lavcap.data.sample import Sample
from lavcap.data.shards import MANIFEST, SETTINGS, Line, parse_manifest, read_clip
from lavcap.files import read_json


class PreparedDataset(Dataset[Sample]):
    """The kept clips of a split, in the manifest's order; with `ids`, only those that it names.

    Raises:
        FileNotFoundError: nothing was prepared there.
        ValueError: the preparation was not finished, or `ids` names a clip that the split does not hold.
    """

    def __init__(self, folder: str | Path, split: str, ids: Collection[str] | None = None) -> None:
        self.location = split_location(folder, split)
        self.settings, self._lines = read_split(self.location)
        if ids is not None:
            self._lines = [line for line in self._lines if is_selected(line.clip_id, ids)]
            if len(self._lines) < len(ids):
                raise ValueError(f"{len(ids)} ids were asked for, and {self.location} holds {len(self._lines)} of them")
        if not self._lines:
            raise ValueError(f"{self.location} holds no clip; {MANIFEST} there says why each was dropped")

    @property
    def clip_ids(self) -> list[str]:
        return [line.clip_id for line in self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        line = self._lines[index]
        members = read_bytes(f"{self.location}/{line.shard}", line.offset, line.offset + line.size)
        return read_clip(members, line, self.location)

    def check_visual(self, fingerprint: str) -> None:
        """Raise ``ValueError`` if the features come from another picture encoder than this one."""
        if self.settings["visual"] != fingerprint:
            raise ValueError(
                f"the features of {self.location} were made by {self.settings['visual']}, the config says "
                f"{fingerprint}: use the config they were prepared with, or prepare again into another folder"
            )


def split_location(folder: str | Path, split: str) -> str:
    return f"{str(folder).rstrip('/')}/{split}"


def read_split(location: str) -> tuple[dict[str, Any], list[Line]]:
    """Settings and kept clips of a complete split."""
    try:
        content = read_bytes(f"{location}/{SETTINGS}")
    except FileNotFoundError:
        raise FileNotFoundError(f"no prepared split {location}: make it with 'lavcap prepare'") from None
    settings = read_json(content, f"{location}/{SETTINGS}", "copy it again, or remove the folder and prepare it anew")
    lines = parse_manifest(read_bytes(f"{location}/{MANIFEST}"), f"{location}/{MANIFEST}")
    if len(lines) < settings["num_candidates"]:
        raise ValueError(
            f"{location} is unfinished, {len(lines)} of {settings['num_candidates']} clips: run the same "
            "'lavcap prepare' again, it goes on where it stopped"
        )
    return settings, [line for line in lines if line.kept]


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file, or a range of it. The file system is looked up at each call: it may not outlive a fork."""
    system, path = fsspec.core.url_to_fs(url)
    return bytes(system.cat_file(path, start=start, end=end))
