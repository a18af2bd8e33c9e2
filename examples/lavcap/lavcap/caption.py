"""Captions of media files, whatever they are: a file that cannot be captioned says why and stops no other.

missing, a folder, not media, damaged    no caption
without sound, or without picture        no caption, unless the captioner does not use what is missing
shorter than a second                    no caption
pictures too large, sound too slow       no caption
longer than ten seconds                  the first ten are captioned, and a note says so
cut off, or damaged further on           what can be decoded is captioned, and a note says so
silent                                   captioned, and a note says so
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavcap.alignment import Alignment, align
from lavcap.checkpoint import Checkpoint
from lavcap.config import AudioOnly, Config, GenerationConfig, VisualOnly
from lavcap.data.decode import (
    FRAMES_PER_SECOND,
    SECONDS,
    SHORTEST,
    DecodedClip,
    Dropped,
    Needs,
    Reason,
    decode_clip,
)
from lavcap.data.sample import SAMPLE_RATE, Sample, collate
from lavcap.evaluate import Written, caption_batch
from lavcap.visual import build_visual_encoder, preprocess

BARELY = 0.5  # seconds beyond, or short of, what is expected that are not worth a note
SILENCE_DB = -70.0  # peak below which a clip is called silent, relative to full scale


class Result(NamedTuple):
    """What became of a file: either a caption and what it is of, or why not."""

    path: Path
    caption: str | None = None
    seconds: float | None = None  # of the clip that the caption is of
    notes: tuple[str, ...] = ()
    alignment: Alignment | None = None
    plan: Tensor | None = None  # [N, M]; None where the fusion has none
    reason: Reason | None = None
    error: str | None = None  # what is wrong with the file, and what to do


class FileCaptioner:
    """A trained captioner with the picture encoder that it was trained with."""

    def __init__(self, checkpoint: Checkpoint, generation: GenerationConfig | None = None) -> None:
        self.checkpoint = checkpoint
        self.generation = generation or checkpoint.config.generation
        self.needs = needs(checkpoint.config)
        device = next(checkpoint.captioner.parameters()).device
        self._encoder = build_visual_encoder(checkpoint.config.visual).to(device) if self.needs.picture else None
        self._picture_size = 224 if self._encoder is None else self._encoder.image_size

    def caption(self, paths: Sequence[Path]) -> Iterator[Result]:
        """A result for each file, in order; ``generation.batch_size`` of them are captioned at once."""
        size = self.generation.batch_size
        for first in range(0, len(paths), size):
            some = paths[first : first + size]
            found = [self._decode(path) for path in some]
            written = iter(self._write([clip for clip in found if isinstance(clip, DecodedClip)]))
            for path, clip in zip(some, found):
                yield failed(path, clip) if isinstance(clip, Dropped) else self._result(path, clip, next(written))

    def _decode(self, path: Path) -> DecodedClip | Dropped:
        try:
            return decode_clip(path, self._picture_size, self.needs)
        except FileNotFoundError:
            return Dropped(Reason.NO_FILE, "")
        except OSError as error:
            return Dropped(Reason.UNREADABLE, error.strerror or str(error))

    def _write(self, clips: Sequence[DecodedClip]) -> list[Written]:
        if not clips:
            return []
        samples = [Sample("", torch.from_numpy(clip.waveform), self._features(clip), ()) for clip in clips]
        return caption_batch(self.checkpoint, collate(samples), self.generation)

    @torch.no_grad()
    def _features(self, clip: DecodedClip) -> Tensor:
        """[F, V], as ``lavcap prepare`` stores and the data set reads them."""
        config = self.checkpoint.config.visual
        if self._encoder is None:
            return torch.zeros(0, config.projection)
        pixels = preprocess(torch.from_numpy(clip.pictures), self._encoder.image_size)
        stored = getattr(torch, config.precision.value)
        return self._encoder.encode(pixels).to("cpu", stored).float()

    def _result(self, path: Path, clip: DecodedClip, written: Written) -> Result:
        alignment = align(self.checkpoint.config, torch.from_numpy(clip.waveform), clip.pictures, written.plan)
        notes = tuple(_notes(clip, self.needs))
        return Result(path, written.caption, _seconds(clip, self.needs), notes, alignment, written.plan)


def needs(config: Config) -> Needs:
    """What a captioner has to be given."""
    return Needs(not isinstance(config.fusion, VisualOnly), not isinstance(config.fusion, AudioOnly))


def failed(path: Path, dropped: Dropped) -> Result:
    """What a user is told of a file that cannot be captioned."""
    reason, detail = dropped
    if reason is Reason.NO_FILE:
        error = "does not exist: check the path"
    elif path.is_dir():
        error = "is a folder: name the files in it, as in FOLDER/*.mp4"
    elif reason is Reason.NO_SOUND:
        error = (
            f"holds no sound ({detail}), and this captioner listens: give a file with sound, or use a captioner that "
            f"was trained with fusion.kind {VisualOnly.kind}"
        )
    elif reason is Reason.NO_PICTURE:
        error = (
            f"holds no moving picture ({detail}), and this captioner looks: give a video, or use a captioner that was "
            f"trained with fusion.kind {AudioOnly.kind}"
        )
    elif reason is Reason.TOO_SHORT:
        error = f"is too short, {detail}: give a clip of {SHORTEST:g} s at least"
    elif reason is Reason.OUT_OF_RANGE:
        error = (
            f"holds what is out of range ({detail}): convert it, as with 'ffmpeg -i FILE -vf scale=-2:360 -ar 16000 "
            "smaller.mp4'"
        )
    else:
        error = (
            f"cannot be read as sound and picture ({detail}): give a media file such as MP4; if it is one, it is "
            "damaged, so fetch it again, or see whether 'ffprobe' reads it"
        )
    return Result(path, reason=reason, error=error)


def _seconds(clip: DecodedClip, needs: Needs) -> float:
    return len(clip.waveform) / SAMPLE_RATE if needs.sound else len(clip.pictures) / FRAMES_PER_SECOND


def _notes(clip: DecodedClip, needs: Needs) -> Iterator[str]:
    if clip.file_seconds is not None and clip.file_seconds > SECONDS + BARELY:
        yield (
            f"it is {clip.file_seconds:.1f} s long, and the caption is of its first {SECONDS} s: cut it into pieces to "
            "caption the rest"
        )
    expected = min(clip.file_seconds or 0.0, SECONDS)
    parts = [("sound", needs.sound, len(clip.waveform) / SAMPLE_RATE)]
    parts += [("picture", needs.picture, len(clip.pictures) / FRAMES_PER_SECOND)]
    for kind, needed, there in parts:
        if needed and there < expected - BARELY:
            yield f"of {expected:.1f} s only {there:.1f} s have {kind}: the rest is missing or damaged"
    if needs.sound and peak_db(clip.waveform) < SILENCE_DB:
        left = "by the pictures alone" if needs.picture else "about nothing that was heard"
        yield f"it is silent (peak below {SILENCE_DB:g} dB of full scale): the caption is {left}"


def peak_db(waveform: np.ndarray) -> float:
    """Of [S] samples, relative to full scale."""
    peak = float(np.abs(waveform).max(initial=0.0))
    return 20 * float(np.log10(peak)) if peak > 0 else -np.inf
