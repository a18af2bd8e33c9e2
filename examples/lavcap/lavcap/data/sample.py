"""What the data hands to the model: one clip, and a padded batch of clips.

Letters: B clips, S sound samples, F pictures, V width of a picture's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE = 16000  # sound samples a second, mono


class Sample(NamedTuple):
    """One prepared clip."""

    clip_id: str  # <youtube_id>_<start>
    waveform: Tensor  # [S] float32, SAMPLE_RATE a second, mono; peaks may exceed 1
    visual: Tensor  # [F, V] float32, CLIP's projected features of the pictures
    captions: tuple[str, ...]


class RawBatch(NamedTuple):
    """Clips side by side, padded with zeros to the longest; the model makes masks of the lengths."""

    clip_ids: list[str]
    waveform: Tensor  # [B, S] float32
    num_samples: Tensor  # [B] int64, how many of the S are sound
    visual: Tensor  # [B, F, V] float32
    num_frames: Tensor  # [B] int64, how many of the F are pictures
    captions: list[tuple[str, ...]]


def collate(samples: Sequence[Sample]) -> RawBatch:
    """Pad clips with zeros to the longest of them and stack them, in the order given."""
    if not samples:
        raise ValueError("collate got no sample: a batch needs at least one clip")
    widths = {sample.visual.shape[1] for sample in samples}
    if len(widths) > 1:
        raise ValueError(
            f"collate got features of different widths {sorted(widths)}: these clips were prepared with different "
            "picture encoders; prepare them again with one"
        )
    return RawBatch(
        clip_ids=[sample.clip_id for sample in samples],
        waveform=pad_sequence([sample.waveform for sample in samples], batch_first=True),
        num_samples=torch.tensor([len(sample.waveform) for sample in samples]),
        visual=pad_sequence([sample.visual for sample in samples], batch_first=True),
        num_frames=torch.tensor([len(sample.visual) for sample in samples]),
        captions=[sample.captions for sample in samples],
    )
