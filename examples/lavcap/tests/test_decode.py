"""Decoding against media whose sound and pictures are known."""

from __future__ import annotations

import errno
import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from lavcap.data.decode import DecodedClip, Dropped, Reason, decode_clip
from lavcap.data.sample import SAMPLE_RATE
from media import REAL_DATA, grey, half_second_steps, tone, write_clip


def decode(path: Path, size: int = 32) -> DecodedClip:
    clip = decode_clip(path, size)
    assert isinstance(clip, DecodedClip), clip
    return clip


def levels(clip: DecodedClip) -> np.ndarray:
    return clip.pictures.mean((1, 2, 3))


def test_ten_seconds_of_a_longer_clip_are_kept(tmp_path: Path) -> None:
    clip = decode(write_clip(tmp_path / "a.mkv", 11.0))
    assert clip.waveform.shape == (10 * SAMPLE_RATE,) and clip.waveform.dtype == np.float32
    assert clip.pictures.shape == (20, 32, 32, 3) and clip.pictures.dtype == np.uint8
    assert np.abs(levels(clip) - (10 + 10 * np.arange(20))).max() < 2  # two pictures a second, each in its place


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_sound_is_resampled_and_averaged_over_channels(tmp_path: Path, channels: int) -> None:
    def first_of_many(times: np.ndarray) -> np.ndarray:
        return np.stack([tone(times) * channels] + [np.zeros_like(times)] * (channels - 1))

    clip = decode(write_clip(tmp_path / "a.mkv", sound=first_of_many))
    expected = tone(np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    inner = slice(400, -400)  # a filter has no sound to look at beyond the ends
    assert len(clip.waveform) == 2 * SAMPLE_RATE
    assert np.abs(clip.waveform - expected)[inner].max() < 1e-4


def test_peaks_above_one_stay(tmp_path: Path) -> None:
    clip = decode(write_clip(tmp_path / "a.mkv", sound=lambda t: 3.0 * tone(t)))
    assert 1.49 < clip.waveform.max() < 1.51


def test_both_begin_when_the_later_one_does(tmp_path: Path) -> None:
    clip = decode(write_clip(tmp_path / "a.mkv", 3.0, picture_start=1.0, sound=lambda t: t / 4))
    assert len(clip.waveform) == 2 * SAMPLE_RATE and len(clip.pictures) == 4
    ramp = (1.0 + np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE) / 4
    assert np.abs(clip.waveform - ramp)[400:-400].max() < 1e-3
    assert np.abs(levels(clip) - [30, 40, 50, 60]).max() < 2


def test_holes_are_silent_and_what_follows_stays_in_place(tmp_path: Path) -> None:
    clip = decode(write_clip(tmp_path / "a.mkv", 3.0, sound_holes=((1.0, 2.0),)))
    second = [clip.waveform[k * SAMPLE_RATE : (k + 1) * SAMPLE_RATE] for k in range(3)]
    power = [float(np.mean(piece[800:-800] ** 2)) for piece in second]
    assert power == pytest.approx([0.125, 0.0, 0.125], abs=1e-3)


def test_the_centre_of_the_picture_is_cut_out(tmp_path: Path) -> None:
    def framed(_: float) -> np.ndarray:
        picture = grey(0, (64, 160))
        picture[:, 48:112] = 200
        return picture

    clip = decode(write_clip(tmp_path / "a.mkv", picture=framed), size=64)
    assert clip.pictures.shape[1:] == (64, 64, 3)
    assert clip.pictures[:, :, 4:-4].min() > 180  # the bars at left and right are gone


def test_pictures_are_turned_as_the_file_asks(tmp_path: Path) -> None:
    """Telephones store pictures as the sensor lies, and how to turn them: here by a quarter to the right."""

    def corner(_: float) -> np.ndarray:
        picture = grey(20, (64, 64))
        picture[:32, :32] = 220  # at the upper left
        return picture

    path = write_clip(tmp_path / "a.mp4", picture=corner)
    content = path.read_bytes()
    as_it_is = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    film, *tracks = content.split(as_it_is)
    assert len(tracks) == 3  # behind the film's own and those of both tracks
    path.write_bytes(film + as_it_is + turned.join(tracks))
    clip = decode(path, size=64)
    quarters = [clip.pictures[:, y : y + 24, x : x + 24].mean() for y in (4, 36) for x in (4, 36)]
    assert np.abs(np.array(quarters) - [20, 220, 20, 20]).max() < 6  # at the upper right


def test_same_file_same_bytes(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3.0)
    first, second = decode(path), decode(path)
    assert first.waveform.tobytes() == second.waveform.tobytes()
    assert first.pictures.tobytes() == second.pictures.tobytes()


def _cut_short(path: Path) -> Path:
    whole = write_clip(path.with_name("whole.mp4"))
    path.write_bytes(whole.read_bytes()[:3000])
    return path


def _bytes(content: bytes):
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("make", "reason", "detail"),
    [
        (_bytes(b""), Reason.UNREADABLE, "Invalid data"),
        (_bytes(b"no media at all" * 100), Reason.UNREADABLE, "Invalid data"),
        (_cut_short, Reason.UNREADABLE, "Invalid data"),
        (
            _bytes(b"1\n00:00:00,000 --> 00:00:02,000\nsubtitles\n\n"),
            Reason.UNREADABLE,
            "a text or a list of files, 'srt'",
        ),
        (lambda p: write_clip(p, sound=None), Reason.NO_SOUND, "video mpeg4"),
        (lambda p: write_clip(p, picture=None), Reason.NO_PICTURE, "audio aac"),
        (lambda p: write_clip(p, 0.5), Reason.TOO_SHORT, " s of sound and 0.5 s of picture"),
        (lambda p: write_clip(p, 3.0, picture_start=2.5), Reason.TOO_SHORT, "0.5 s of picture"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, make, reason: Reason, detail: str) -> None:
    found = decode_clip(make(tmp_path / "a.mp4"), 32)
    assert isinstance(found, Dropped) and found.reason is reason
    assert detail in found.detail


def test_titles_in_another_code_do_not_lose_the_clip(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", title="titleXX")
    path.write_bytes(path.read_bytes().replace(b"titleXX", b"titl\xe9 \xfc"))  # Latin-1
    assert len(decode(path).pictures) == 4


def test_a_disk_that_fails_is_not_the_clips_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped, a clip would be gone for good; so this ends the run, which goes on when the disk does."""
    path = write_clip(tmp_path / "a.mkv")

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda self, mode: Failing(self, mode))
    with pytest.raises(OSError, match="Input/output error"):
        decode_clip(path, 32)


def test_no_damage_ends_the_run(tmp_path: Path) -> None:
    """Bytes at random places, at the head above all: every file is decoded or dropped."""
    files = [write_clip(tmp_path / name).read_bytes() for name in ("a.mkv", "a.mp4")]
    generator = random.Random(7)
    found = []
    for number in range(60):
        content = bytearray(files[number % 2])
        region = 4000 if number % 4 < 2 else len(content)
        for _ in range(generator.choice((1, 20, 500))):
            content[generator.randrange(region)] = generator.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(content)
        found.append(decode_clip(path, 32))
    kept = [clip for clip in found if isinstance(clip, DecodedClip)]
    reasons = {clip.reason for clip in found if isinstance(clip, Dropped)}
    assert 10 < len(kept) < 60 and Reason.UNREADABLE in reasons
    assert all(np.isfinite(clip.waveform).all() and len(clip.pictures) >= 2 for clip in kept)


def test_damaged_pictures_do_not_lose_the_clip(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 4.0)
    content = bytearray(path.read_bytes())
    content[len(content) * 9 // 10 :] = bytes(len(content) - len(content) * 9 // 10)
    path.write_bytes(content)
    clip = decode(path)
    assert 2 * SAMPLE_RATE < len(clip.waveform) < 4 * SAMPLE_RATE
    assert np.abs(levels(clip)[:4] - half_second_levels(4)).max() < 2


def half_second_levels(count: int) -> np.ndarray:
    return np.array([half_second_steps(k / 2).mean() for k in range(count)])


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real clips (../shared/data) are not here")
@pytest.mark.parametrize(("name", "samples", "frames"), [("6BJ455B1aAs_0", 89165, 12), ("bX2vDaHL26U_60", 159968, 20)])
def test_real_clips(name: str, samples: int, frames: int) -> None:
    clip = decode(REAL_DATA / "clips" / f"{name}.mp4", 224)
    assert clip.waveform.shape == (samples,) and clip.pictures.shape == (frames, 224, 224, 3)
    assert 0.5 < np.abs(clip.waveform).max() < 1.5
    assert clip.pictures.std() > 20
