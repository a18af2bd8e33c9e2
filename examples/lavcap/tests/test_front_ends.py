"""The two spectrograms against published formulae in float64, Kaldi's own code, and each clip alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lavcap.audio.augment import spec_augment
from lavcap.audio.front_ends import CEDLogMel, KaldiLogMel, Spectrogram
from lavcap.config import Fill, KaldiPadding, SpecAugment


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """A chord that swells, over noise, off centre: every mel bin and the mean have something in them."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16000
    chord = sum(np.sin(2 * np.pi * f * t) for f in (110, 440, 2500, 6100))
    return (0.1 * chord * t / t[-1] + 0.01 * rng.standard_normal(samples) + 0.05).astype(np.float32)


def batch(*clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(clip) for clip in clips]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def ced_float64(x: np.ndarray) -> np.ndarray:
    """Torchaudio's MelSpectrogram and AmplitudeToDB formulae, a frame and a bin at a time. [K, F]"""
    x = np.pad(x.astype(np.float64), 256, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    power = np.array([abs(np.fft.rfft(x[s : s + 512] * window)) ** 2 for s in range(0, len(x) - 511, 160)])
    mels = np.linspace(2595 * np.log10(1 + 0 / 700), 2595 * np.log10(1 + 8000 / 700), 66)
    points = 700 * (10 ** (mels / 2595) - 1)
    slopes = points[None] - np.linspace(0, 8000, 257)[:, None]
    gaps = np.diff(points)
    fb = np.maximum(0, np.minimum(-slopes[:, :-2] / gaps[:-1], slopes[:, 2:] / gaps[1:]))
    decibels = 10 * np.log10(np.maximum(power @ fb, 1e-10)).T
    return np.maximum(decibels, decibels.max() - 120)


def kaldi_float64(x: np.ndarray) -> np.ndarray:
    """Kaldi's filter bank, a frame at a time, scaled as LAVCap does. [K, F]"""
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    centres = mel(20) + (mel(8000) - mel(20)) / 65 * np.arange(66)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    columns = []
    for start in range(0, len(x) - 399, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = np.concatenate((frame[:1] * (1 - 0.97), frame[1:] - 0.97 * frame[:-1])) * window
        power = abs(np.fft.rfft(frame, 512)) ** 2
        column = np.zeros(64)
        for k in range(256):
            position = (mel(k * 16000 / 512) - centres[0]) / (centres[1] - centres[0])
            for m in (int(position) - 1, int(position)):  # the bin lies on one triangle's fall and the next one's rise
                if 0 <= m < 64 and position > 0:
                    column[m] += power[k] * (1 - abs(position - (m + 1)))
        columns.append(np.log(np.maximum(column, np.finfo(np.float32).eps)))
    return (np.array(columns).T + 4.346) / 4.332


@pytest.mark.parametrize("samples", [160_000, 89_537, 513])
def test_ced_is_the_published_formula(samples: int) -> None:
    x = sound(samples)
    mel, num_frames, num_patches = CEDLogMel()(*batch(x))
    expected = ced_float64(x)
    assert num_frames.item() == expected.shape[1] == samples // 160 + 1
    assert num_patches.item() == max(1, expected.shape[1] // 16)
    # Single precision: 7e-5 dB at most, measured.
    np.testing.assert_allclose(mel[0, :, : expected.shape[1]].numpy(), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("samples", [160_000, 89_537])
def test_kaldi_is_the_published_formula(samples: int) -> None:
    x = sound(samples)
    mel, num_frames, num_patches = KaldiLogMel()(*batch(x))
    expected = kaldi_float64(x)
    assert mel.shape == (1, 64, 1024) and num_frames.item() == expected.shape[1]
    assert num_patches.item() == -(-expected.shape[1] // 16)
    np.testing.assert_allclose(mel[0, :, : expected.shape[1]].numpy(), expected, rtol=0, atol=1e-4)


def test_kaldi_is_kaldis() -> None:
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is in the extra 'test'")
    x = sound(160_000)
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = 64
    kaldi = knf.OnlineFbank(options)
    kaldi.accept_waveform(16000, (x - x.mean()).tolist())
    kaldi.input_finished()
    theirs = (np.array([kaldi.get_frame(i) for i in range(kaldi.num_frames_ready)]).T + 4.346) / 4.332
    assert theirs.shape == (64, 998)
    ours = KaldiLogMel()(*batch(x)).mel[0, :, :998].numpy()
    exact = kaldi_float64(x)
    # As near to the exact answer as Kaldi's own single precision is.
    assert abs(ours - exact).mean() <= 2 * abs(theirs - exact).mean()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("front_end", [CEDLogMel(), KaldiLogMel()], ids=["ced", "kaldi"])
def test_a_clip_is_the_same_alone_and_padded_beside_a_louder_one(front_end: torch.nn.Module) -> None:
    short, long = sound(50_000, seed=1), 20 * sound(160_000, seed=2)
    alone, together = front_end(*batch(short)), front_end(*batch(long, short))
    frames = int(alone.num_frames)
    torch.testing.assert_close(together.mel[1, :, :frames], alone.mel[0, :, :frames], rtol=0, atol=1e-5)
    assert together.num_frames[1] == alone.num_frames[0] and together.num_patches[1] == alone.num_patches[0]


def test_the_floor_is_the_clips_own() -> None:
    quiet = CEDLogMel()(*batch(sound(16_000), 1e-4 * sound(16_000))).mel[1]
    assert quiet.min() >= quiet.max() - 120


def test_what_lies_behind_a_kaldi_clip() -> None:
    waveform = batch(sound(80_000))
    masked, public = KaldiLogMel()(*waveform), KaldiLogMel(KaldiPadding.PUBLIC_CODE)(*waveform)
    torch.testing.assert_close(public.mel[:, :, 498:], torch.full((1, 64, 526), 4.346 / 4.332))  # loud
    assert masked.mel[:, :, 498:].max() < -2.6  # silence
    assert torch.equal(masked.mel[:, :, :498], public.mel[:, :, :498])
    assert masked.num_patches.item() == 32 and public.num_patches.item() == 64


def test_errors_name_the_length() -> None:
    with pytest.raises(ValueError, match=r"a clip of 11\.00 s is longer than the audio encoder's 10\.\d\d s"):
        CEDLogMel()(torch.zeros(1, 176_000), torch.tensor([176_000]))
    with pytest.raises(ValueError, match=r"waveform must be \[B, S\]"):
        KaldiLogMel()(torch.zeros(16_000), torch.tensor([16_000]))


@pytest.mark.parametrize(("front_end", "longest"), [(CEDLogMel(), 63), (KaldiLogMel(), 64)], ids=["ced", "kaldi"])
def test_the_longest_clip_fills_the_position_embedding(front_end: torch.nn.Module, longest: int) -> None:
    samples = front_end.max_samples
    assert front_end(torch.zeros(1, samples), torch.tensor([samples])).num_patches.item() == longest


def masked_bands(fill: Fill) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mel = torch.randn(64, 64, 200)
    spectrogram = Spectrogram(mel, torch.tensor([200, 120] * 32), torch.tensor([12, 7] * 32))
    return mel, spec_augment(spectrogram, SpecAugment(1, 40, 1, 24, fill), zero_level=1.0).mel


def test_spec_augment_hides_bands_within_the_clip() -> None:
    mel, out = masked_bands(Fill.MEAN)
    hidden = out != mel
    rows, columns = hidden.sum(2).amax(1), hidden.sum(1).amax(1)  # the longest run along time, along mels
    assert not hidden[1::2, :, 120:].any()
    assert 0 < (hidden.all(2).sum(1)[::2]).float().mean() < 24 and hidden.all(1).sum(1).max() <= 40
    assert rows.max() == 200 and columns.max() == 64  # whole bands
    assert len({tuple(h.flatten().tolist()) for h in hidden}) > 60  # every clip has its own
    for clip, length in ((0, 200), (1, 120)):
        level = mel[clip, :, :length].mean()
        torch.testing.assert_close(out[clip][hidden[clip]], level.expand(int(hidden[clip].sum())))


def test_spec_augment_as_in_the_public_code() -> None:
    mel, out = masked_bands(Fill.PUBLIC_CODE)
    assert set(out[out != mel].tolist()) == {1.0}
