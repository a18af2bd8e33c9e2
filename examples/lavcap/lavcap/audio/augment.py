"""SpecAugment: bands of time and of frequency hidden while training."""

from __future__ import annotations

import torch
from torch import Tensor

from lavcap.audio.front_ends import Spectrogram
from lavcap.config import Fill, SpecAugment


def spec_augment(spectrogram: Spectrogram, config: SpecAugment, zero_level: float) -> Spectrogram:
    """The spectrogram with each clip's own bands hidden, drawn from torch's generator of its device.

    A band is at most as wide as the config says, and within the clip. What is hidden becomes the clip's mean level, or,
    as in the public code, what a zero before normalisation comes to.
    """
    mel, num_frames, _ = spectrogram
    num_clips, num_mels, frames = mel.shape
    hidden = torch.zeros(num_clips, num_mels, frames, dtype=torch.bool, device=mel.device)
    for _ in range(config.time_masks):
        hidden |= _bands(num_frames.clamp(max=frames), frames, config.time_width)[:, None, :]
    for _ in range(config.mel_masks):
        hidden |= _bands(torch.full_like(num_frames, num_mels), num_mels, config.mel_width)[:, :, None]
    if config.fill is Fill.PUBLIC_CODE:
        return spectrogram._replace(mel=mel.masked_fill(hidden, zero_level))
    own = (torch.arange(frames, device=mel.device) < num_frames[:, None])[:, None]  # [B, 1, F]
    level = mel.where(own, 0).sum((1, 2)) / (num_frames.clamp(1, frames) * num_mels)
    return spectrogram._replace(mel=torch.where(hidden & own, level[:, None, None], mel))


def _bands(extent: Tensor, size: int, width: int) -> Tensor:
    """[B, size] bool: one band a clip, 0 to ``width`` places wide, anywhere within the first ``extent`` places."""
    draw = torch.rand(2, extent.shape[0], device=extent.device)
    wide = (draw[0] * (width + 1)).long().clamp(max=width).minimum(extent)
    start = (draw[1] * (extent - wide + 1)).long().minimum(extent - wide)
    place = torch.arange(size, device=extent.device)
    return (place >= start[:, None]) & (place < (start + wide)[:, None])
