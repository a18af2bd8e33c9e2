"""Waveforms to log-mel spectrograms, a batch at a time, in torch operations that any device runs.

Every clip's spectrogram is what it would be alone: reflection, mean and floor are its own, not the batch's.

Letters: B clips, S samples at 16 kHz, F frames, K mel bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lavcap.config import CEDFrontEnd, KaldiFrontEnd, KaldiPadding

SAMPLE_RATE = 16_000
NUM_MELS = 64
NUM_FFT = 512
HOP = 160
PATCH = 16  # frames and mel bins of a CED patch


class Spectrogram(NamedTuple):
    """What a front end returns."""

    mel: Tensor  # [B, K, F] float32
    num_frames: Tensor  # [B]: frames that are the clip's own
    num_patches: Tensor  # [B]: patches along time that take part


class CEDLogMel(nn.Module):
    """CED's own: centred STFT with reflection, power, 64 HTK mels, decibels no lower than 120 below the clip's maximum.

    A clip has ``samples // 160 + 1`` frames; frames behind its end hold its floor. Only whole patches take part, as in
    the original, which drops the frames of an unfinished one.
    """

    max_patches = 63  # the length of CED's position embedding
    max_samples = (max_patches * PATCH + PATCH - 2) * HOP + HOP - 1
    zero_level = 0.0  # what a zero before normalisation would be: there is none here
    first_frame = 0.0  # seconds: the middle of the first window
    window: Tensor
    mel_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(NUM_FFT), persistent=False)
        self.register_buffer("mel_scale", htk_mel_scale().to(torch.float32), persistent=False)  # [257, K]

    def forward(self, waveform: Tensor, num_samples: Tensor) -> Spectrogram:
        """waveform [B, S], num_samples [B]."""
        check_waveform(waveform, num_samples, self.max_samples)
        frames = _reflect(waveform, num_samples).unfold(1, NUM_FFT, HOP)  # [B, F, 512]
        power = torch.fft.rfft(frames * self.window).abs().square()  # [B, F, 257]
        mel = (power @ self.mel_scale).mT  # [B, K, F]
        decibels = 10 * mel.clamp_min(1e-10).log10()
        num_frames = num_samples // HOP + 1
        own = torch.arange(mel.shape[2], device=mel.device) < num_frames[:, None]  # [B, F]
        floor = decibels.masked_fill(~own[:, None], -torch.inf).amax((1, 2), keepdim=True) - 120
        decibels = torch.maximum(decibels, floor).where(own[:, None], floor)
        return Spectrogram(_at_least_a_patch(decibels), num_frames, (num_frames // PATCH).clamp_min(1))

    @property
    def band_hertz(self) -> Tensor:
        """[K]: the middle of each mel bin."""
        return _htk_edges()[1:-1]


class KaldiLogMel(nn.Module):
    """LAVCap's: Kaldi's filter bank of the clip less its mean, in 1024 frames, scaled by the data set's statistics.

    25 ms symmetric Hann, 10 ms hop, whole windows only, DC removal, pre-emphasis 0.97, 64 Kaldi mels from 20 Hz to
    8 kHz, natural logarithm.
    """

    max_patches = 64
    max_samples = 400 + (max_patches * PATCH - 1) * HOP + HOP - 1
    mean, scale = -4.346, 4.332
    zero_level = (0 - mean) / scale
    first_frame = 200 / SAMPLE_RATE
    window: Tensor
    mel_scale: Tensor

    def __init__(self, padding: KaldiPadding = KaldiPadding.MASKED) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("window", torch.hann_window(400, periodic=False), persistent=False)
        self.register_buffer("mel_scale", kaldi_mel_scale().to(torch.float32), persistent=False)  # [257, K]

    def forward(self, waveform: Tensor, num_samples: Tensor) -> Spectrogram:
        """waveform [B, S], num_samples [B]."""
        check_waveform(waveform, num_samples, self.max_samples)
        num_total = self.max_patches * PATCH
        samples = 400 + (num_total - 1) * HOP
        own = torch.arange(samples, device=waveform.device) < num_samples[:, None]
        x = nn.functional.pad(waveform, (0, samples - waveform.shape[1]))
        mean = x.where(own, 0).sum(1, keepdim=True) / num_samples[:, None]
        frames = (x - mean).where(own, 0).unfold(1, 400, HOP)  # [B, 1024, 400]
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat((frames[:, :, :1], frames[:, :, :-1]), 2)
        power = torch.fft.rfft((frames - 0.97 * before) * self.window, NUM_FFT).abs().square()
        mel = (power @ self.mel_scale).mT  # [B, K, 1024]
        log_mel = mel.clamp_min(torch.finfo(torch.float32).eps).log()
        num_frames = ((num_samples - 400) // HOP + 1).clamp_min(0)
        behind = torch.arange(num_total, device=waveform.device) >= num_frames[:, None]
        return self._pad((log_mel - self.mean) / self.scale, behind, num_frames)

    @property
    def band_hertz(self) -> Tensor:
        """[K]: the middle of each mel bin."""
        return 700 * torch.expm1(_kaldi_edges()[1:-1] / 1127)

    def _pad(self, mel: Tensor, behind: Tensor, num_frames: Tensor) -> Spectrogram:
        """What lies behind the clip: silence that takes no part, or what the public code makes of it."""
        if self.padding is KaldiPadding.PUBLIC_CODE:
            mel = mel.masked_fill(behind[:, None], self.zero_level)
            return Spectrogram(mel, num_frames, torch.full_like(num_frames, self.max_patches))
        silence = (math.log(torch.finfo(torch.float32).eps) - self.mean) / self.scale
        num_patches = (num_frames + PATCH - 1) // PATCH
        return Spectrogram(mel.masked_fill(behind[:, None], silence), num_frames, num_patches.clamp_min(1))


FrontEnd = CEDLogMel | KaldiLogMel


def build_front_end(config: CEDFrontEnd | KaldiFrontEnd) -> FrontEnd:
    return KaldiLogMel(config.padding) if isinstance(config, KaldiFrontEnd) else CEDLogMel()


def check_waveform(waveform: Tensor, num_samples: Tensor, max_samples: int) -> None:
    """Raise ValueError where shapes are wrong or the clips are longer than the encoder's window."""
    if waveform.ndim != 2 or num_samples.shape != waveform.shape[:1]:
        raise ValueError(
            f"waveform must be [B, S] and num_samples [B]; got {list(waveform.shape)} and {list(num_samples.shape)}"
        )
    if waveform.shape[1] > max_samples:
        raise ValueError(
            f"a clip of {waveform.shape[1] / SAMPLE_RATE:.2f} s is longer than the audio encoder's "
            f"{max_samples / SAMPLE_RATE:.2f} s: cut it (lavcap prepare cuts to 10 s)"
        )


def htk_mel_scale() -> Tensor:
    """[257, 64] float64: triangles between 0 and 8 kHz, equally wide in HTK mels, linear in Hz, peak one."""
    hertz = torch.linspace(0, SAMPLE_RATE / 2, NUM_FFT // 2 + 1, dtype=torch.float64)
    return _triangles(hertz, _htk_edges())


def _htk_edges() -> Tensor:
    """[66] Hz."""
    return 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), NUM_MELS + 2).double() / 2595) - 1)


def kaldi_mel_scale() -> Tensor:
    """[257, 64] float64: Kaldi's triangles between 20 Hz and 8 kHz, linear in mels; the Nyquist bin takes no part."""

    bins = 1127 * torch.log1p(torch.arange(NUM_FFT // 2, dtype=torch.float64) * SAMPLE_RATE / NUM_FFT / 700)
    return nn.functional.pad(_triangles(bins, _kaldi_edges()), (0, 0, 0, 1))


def _kaldi_edges() -> Tensor:
    """[66] mels."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (20, SAMPLE_RATE / 2))
    return low + (high - low) / (NUM_MELS + 1) * torch.arange(NUM_MELS + 2, dtype=torch.float64)


def _triangles(bins: Tensor, edges: Tensor) -> Tensor:
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0)


def _reflect(waveform: Tensor, num_samples: Tensor) -> Tensor:
    """[B, S + 512]: each clip reflected at its own two ends, as a centred STFT of it alone would be."""
    size = waveform.shape[1]
    place = (torch.arange(-NUM_FFT // 2, size + NUM_FFT // 2, device=waveform.device)).abs()[None]  # [1, S + 512]
    last = num_samples[:, None] - 1
    place = torch.where(place > last, 2 * last - place, place)
    # Behind the reflection nothing is the clip's own; what stands there reaches no frame of it.
    return waveform.gather(1, place.clamp(0, max(size - 1, 0)).expand(waveform.shape[0], -1))


def _at_least_a_patch(mel: Tensor) -> Tensor:
    missing = PATCH - mel.shape[2]
    return mel if missing <= 0 else torch.cat((mel, mel[:, :, -1:].expand(-1, -1, missing)), 2)
