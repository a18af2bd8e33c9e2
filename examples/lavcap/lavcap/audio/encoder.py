"""The audio side of the captioner: front end, augmentation, CED."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavcap.audio.augment import spec_augment
from lavcap.audio.ced import CED, SHAPES, AudioTokens
from lavcap.audio.ced_weights import load_ced
from lavcap.audio.front_ends import build_front_end
from lavcap.config import AudioConfig
from lavcap.precision import full_precision


class AudioEncoder(nn.Module):
    """Waveform to tokens. The front end computes in float32, under autocast too."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.front_end = build_front_end(config.front_end)
        settings = config.front_end
        self.ced = CED(
            SHAPES[config.size],
            self.front_end.max_patches,
            settings.batch_norm,
            config.pool_frequency,
            settings.momentum,
        )

    @property
    def width(self) -> int:
        return self.ced.width

    def forward(self, waveform: Tensor, num_samples: Tensor) -> AudioTokens:
        """waveform [B, S] at 16 kHz, num_samples [B]."""
        with full_precision(waveform.device), torch.no_grad():
            spectrogram = self.front_end(waveform.float(), num_samples)
            if self.training and self.config.spec_augment is not None:
                spectrogram = spec_augment(spectrogram, self.config.spec_augment, self.front_end.zero_level)
        return self.ced(spectrogram)


def load_audio_encoder(config: AudioConfig) -> AudioEncoder:
    """With the weights of ``config.checkpoint``, or random ones drawn from ``config.seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = AudioEncoder(config)
    if config.checkpoint is not None:
        load_ced(encoder.ced, config.checkpoint)
    return encoder
