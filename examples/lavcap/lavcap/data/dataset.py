"""A prepared split as a map: any clip by its index, read from its shard when it is asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lavcap.data.captions import is_selected
from lavcap.data.sample import Sample
from lavcap.data.shards import MANIFEST, SETTINGS, Line, parse_manifest, read_samples


class PreparedDataset(Dataset[Sample]):
    """The kept clips of a split, in the manifest's order; with `ids`, only those that it names.

    Raises:
        FileNotFoundError: nothing was prepared there.
        ValueError: the preparation was not finished, or `ids` names a clip that the split does not hold.
    """

    def __init__(self, folder: str | Path, split: str, ids: Collection[str] | None = None) -> None:
        self.folder = Path(folder) / split
        if not (self.folder / SETTINGS).is_file():
            raise FileNotFoundError(f"no prepared split '{split}' in {folder}: make it with 'lavcap prepare'")
        settings = (self.folder / SETTINGS).read_text(encoding="utf-8")
        manifest = (self.folder / MANIFEST).read_text(encoding="utf-8")
        self.settings, self._lines = kept_clips(settings, manifest, str(self.folder))
        if ids is not None:
            self._lines = [line for line in self._lines if is_selected(line.clip_id, ids)]
            if len(self._lines) < len(ids):
                raise ValueError(f"{len(ids)} ids were asked for, and {self.folder} holds {len(self._lines)} of them")
        if not self._lines:
            raise ValueError(f"{self.folder} holds no clip; {MANIFEST} there says why each was dropped")

    @property
    def clip_ids(self) -> list[str]:
        return [line.clip_id for line in self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        line = self._lines[index]
        with (self.folder / line.shard).open("rb") as shard:
            shard.seek(line.offset)
            members = io.BytesIO(shard.read(line.size))
        (sample,) = read_samples(members)
        return sample

    def check_visual(self, fingerprint: str) -> None:
        """Raise ``ValueError`` if the features come from another picture encoder than this one."""
        if self.settings["visual"] != fingerprint:
            raise ValueError(
                f"the features of {self.folder} were made by {self.settings['visual']}, the config says {fingerprint}: "
                "use the config they were prepared with, or prepare again into another folder"
            )


def kept_clips(settings_text: str, manifest_text: str, where: str) -> tuple[dict[str, Any], list[Line]]:
    """Settings and kept clips of a complete split."""
    settings, lines = json.loads(settings_text), parse_manifest(manifest_text)
    if len(lines) < settings["num_candidates"]:
        raise ValueError(
            f"{where} is unfinished, {len(lines)} of {settings['num_candidates']} clips: run the same 'lavcap prepare' "
            "again, it goes on where it stopped"
        )
    return settings, [line for line in lines if line.kept]
