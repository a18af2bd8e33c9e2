"""The built-in front end: log-mel tokens of the sound, colour, edge and change descriptors of the pictures.

Light on purpose: formulas only, nothing trained. What it hears is loudness and timbre; what it sees is where
which colours, edges and changes are.
"""

from __future__ import annotations

import numpy as np
import torch

from otfuse.demo.decode import SAMPLE_RATE

NUM_MELS = 64
WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
TOKENS_PER_SECOND = 6.4  # 64 sound tokens for ten seconds, as in LAVCap
GRID = 4  # pictures are described on GRID x GRID cells
NUM_HUES = 8
HUE_SHARE = 2.0  # weight of the hues of the whole picture beside the cells
LOG_FLOOR = 1e-5  # added to the energy: what is below -50 dB of a full-scale mel band is silence


def hertz_to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """HTK's scale: 2595 log10(1 + hertz / 700)."""
    return np.asarray(2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0))


def mel_to_hertz(mel: np.ndarray | float) -> np.ndarray:
    return np.asarray(700.0 * (10.0 ** (np.asarray(mel) / 2595.0) - 1.0))


def mel_bank(num_mels: int = NUM_MELS, num_fft: int = 512, rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Triangles of height one, evenly spaced in mel from 0 to rate / 2: [num_mels, num_fft // 2 + 1]."""
    corners = mel_to_hertz(np.linspace(0.0, hertz_to_mel(rate / 2), num_mels + 2))
    hertz = np.arange(num_fft // 2 + 1) * rate / num_fft
    low, mid, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (hertz - low) / (mid - low), (high - hertz) / (high - mid)
    return torch.from_numpy(np.maximum(0.0, np.minimum(rising, falling))).float()


def band_hertz(num_mels: int = NUM_MELS, rate: int = SAMPLE_RATE) -> np.ndarray:
    """The frequency at which each mel band peaks: [num_mels]."""
    return mel_to_hertz(np.linspace(0.0, hertz_to_mel(rate / 2), num_mels + 2))[1:-1]


def log_mel(samples: np.ndarray) -> torch.Tensor:
    """Log energies [NUM_MELS, num_windows], one window every HOP samples, in nepers of power."""
    signal = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    window = torch.hann_window(WINDOW, device=signal.device)
    spectrum = torch.stft(signal, 512, HOP, WINDOW, window, pad_mode="constant", return_complex=True)
    power = spectrum.abs().square() / (WINDOW / 4) ** 2  # a full-scale sine peaks at one
    return (mel_bank() @ power + LOG_FLOOR).log()


def sound_tokens(spectrogram: torch.Tensor, seconds: float) -> tuple[torch.Tensor, np.ndarray]:
    """Means of the log-mel windows in equal stretches: tokens [N, NUM_MELS] and their middle times [N]."""
    num_tokens = max(1, round(seconds * TOKENS_PER_SECOND))
    tokens = torch.nn.functional.adaptive_avg_pool1d(spectrogram, num_tokens).mT
    return tokens.contiguous(), (np.arange(num_tokens) + 0.5) * seconds / num_tokens


def picture_tokens(frames: np.ndarray) -> torch.Tensor:
    """What is where and of which colour: [M, 6 * GRID**2 + NUM_HUES] for frames [M, H, W, 3].

    On a grid of cells: brightness, two opponent colours, saturation, edges, and change since the picture
    before. For the whole picture, since things move: how much there is of each hue. Both parts count as fixed
    shares of the whole, whatever varies more in this clip.
    """
    pictures = torch.from_numpy(frames).float().permute(0, 3, 1, 2) / 255.0  # [M, 3, H, W]
    red, green, blue = pictures.unbind(1)
    grey = (red + green + blue) / 3.0
    saturation = pictures.amax(1) - pictures.amin(1)
    edges = torch.zeros_like(grey)
    edges[:, :-1] += grey.diff(dim=1).abs()
    edges[:, :, :-1] += grey.diff(dim=2).abs()
    change = torch.zeros_like(grey)
    change[1:] = grey.diff(dim=0).abs()
    maps = torch.stack([grey, red - green, 0.5 * (red + green) - blue, saturation, edges, change], dim=1)
    cells = torch.nn.functional.adaptive_avg_pool2d(maps, GRID).flatten(1)
    return torch.cat([_unit_variance(cells), HUE_SHARE * _unit_variance(hue_amounts(pictures))], dim=1)


def hue_amounts(pictures: torch.Tensor) -> torch.Tensor:
    """Mean saturation of the pixels around each hue, red first: [M, NUM_HUES] for [M, 3, H, W]."""
    red, green, blue = pictures.unbind(1)
    saturation = pictures.amax(1) - pictures.amin(1)
    turn = torch.atan2(3.0**0.5 * (green - blue), 2.0 * red - green - blue) / (2.0 * torch.pi)
    hue = (turn % 1.0) * NUM_HUES  # [M, H, W], 0 is red, NUM_HUES / 3 is green
    distance = (hue[:, None] - torch.arange(NUM_HUES, device=hue.device)[:, None, None]).abs()
    near = (1.0 - torch.minimum(distance, NUM_HUES - distance)).clamp_min(0.0)  # [M, NUM_HUES, H, W]
    return (near * saturation[:, None]).mean((2, 3))


def _unit_variance(tokens: torch.Tensor) -> torch.Tensor:
    """Centred and scaled to variances that add up to one; deviations below 0.01 in all count for little."""
    centred = tokens - tokens.mean(0)
    return centred / (centred.square().sum(1).mean().sqrt() + 0.01)
