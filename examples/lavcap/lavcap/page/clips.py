"""What the page shows of each clip: sound and pictures from the media files, or the sound of the prepared set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavcap.alignment import Alignment, align
from lavcap.caption import needs
from lavcap.data.dataset import PreparedDataset
from lavcap.data.decode import Dropped, decode_clip
from lavcap.data.prepare import media_files
from lavcap.evaluation import Evaluation, Origin, ScoredClip

THUMBNAIL = 72  # pixels, the side of a picture on the page


class ShownClip(NamedTuple):
    clip: ScoredClip
    alignment: Alignment | None
    plan: Tensor | None  # [N, M]
    missing: str  # what cannot be shown, and why; empty where all can


def shown_clips(evaluation: Evaluation, media: Path | None, data: str | None = None) -> Iterator[ShownClip]:
    """Every clip of an evaluation, in its order.

    Args:
        evaluation: from :func:`lavcap.evaluation.read_evaluation`.
        media: folder of the media files; without it there are no pictures.
        data: prepared set, where it is no longer where the evaluation read it.
    """
    files = None if media is None else media_files(media)
    prepared = _Prepared(data, evaluation.origin)
    for clip in evaluation.clips:
        plan = evaluation.origin.plans.get(clip.clip_id)
        waveform, pictures, missing = _material(clip.clip_id, files, prepared, evaluation.origin)
        alignment = None
        if waveform is not None:
            alignment = align(evaluation.origin.config, waveform, pictures, plan)
        yield ShownClip(clip, alignment, plan, missing)


class _Prepared:
    """The sound of a prepared split's clips, where it can be read."""

    def __init__(self, data: str | None, origin: Origin) -> None:
        self._clips: PreparedDataset | None = None
        self.why_not = ""
        try:
            self._clips = PreparedDataset(data or origin.data, origin.split)
            self._places = {clip_id: place for place, clip_id in enumerate(self._clips.clip_ids)}
        except (FileNotFoundError, ValueError) as error:
            if data is not None:  # asked for by name
                raise
            self.why_not = str(error)

    def waveform(self, clip_id: str) -> Tensor | None:
        if self._clips is None or clip_id not in self._places:
            return None
        return self._clips[self._places[clip_id]].waveform


def _material(
    clip_id: str, files: Mapping[str, Path] | None, prepared: _Prepared, origin: Origin
) -> tuple[Tensor | None, np.ndarray, str]:
    """Waveform [S] or None, pictures [F, P, P, 3], and what is missing."""
    no_pictures = np.zeros((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)
    if files is None:
        missing = "No pictures: 'lavcap report' was not given --media, the folder of the media files."
    elif clip_id not in files:
        missing = f"No media file {clip_id}: --media names the folder that has it."
    else:
        found = decode_clip(files[clip_id], THUMBNAIL, needs(origin.config))
        if not isinstance(found, Dropped):
            return torch.from_numpy(found.waveform), found.pictures, ""
        missing = f"{files[clip_id].name}: {found.reason.value}, {found.detail}."
    waveform = prepared.waveform(clip_id)
    if waveform is None:
        missing += f" No sound: {prepared.why_not or 'the prepared set has no such clip'}."
    return waveform, no_pictures, missing
