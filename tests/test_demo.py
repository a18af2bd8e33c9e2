"""The demo: decoding whatever comes, a front end that computes what it says, a real alignment."""

# ruff: noqa: E402 (what needs an extra is imported after the question whether it is there)

from __future__ import annotations

import io
import itertools
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av", reason="the demo's tests need PyAV: pip install 'otfuse[demo]'")
pytest.importorskip("matplotlib", reason="the demo's tests need matplotlib: pip install 'otfuse[demo]'")
pytest.importorskip("ot", reason="the demo's tests need POT: pip install 'otfuse[demo]'")

import otfuse
from otfuse import viz
from otfuse._backends.cpu.backend import CpuBackend
from otfuse.demo import check, features, main, recovery, shared_space, synthesize, timing
from otfuse.demo.decode import SAMPLE_RATE, ClipError, read_clip
from otfuse.demo.pipeline import choose_backend
from otfuse.demo.synthesize import Event, write_media

CLIPS = Path(__file__).parents[1].parent / "shared" / "data" / "clips"
COLOURS = np.array([[200, 40, 40], [40, 180, 40], [40, 60, 200], [200, 190, 40]])  # of the clips' seconds, in turn


def colour_seconds(seconds: float, fps: float = 25.0) -> np.ndarray:
    """Pictures [T, 48, 64, 3] of one colour for each second, COLOURS in turn."""
    times = np.arange(round(seconds * fps)) / fps
    colours = COLOURS[times.astype(int) % len(COLOURS)].astype(np.uint8)
    return np.broadcast_to(colours[:, None, None, :], (len(times), 48, 64, 3)).copy()


def sine(seconds: float, hertz: float = 500.0, rate: int = 44100, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def peak_hertz(samples: np.ndarray, rate: int = SAMPLE_RATE) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


def colour_index(frame: np.ndarray) -> int:
    return int(np.abs(COLOURS - frame.mean((0, 1))).sum(1).argmin())


def assert_is_the_clip(clip, seconds: float = 4.0, hertz: float = 500.0) -> None:
    """The clip of `colour_seconds` and `sine`: lengths, colours at their times, and the tone."""
    assert clip.seconds == pytest.approx(seconds, abs=0.15)
    assert len(clip.samples) == round(clip.seconds * SAMPLE_RATE)
    assert len(clip.frames) == round(2 * clip.seconds)
    assert np.abs(clip.frame_times - np.arange(len(clip.frames)) / 2).max() < 0.07
    assert [colour_index(frame) for frame in clip.frames] == [int(t + 1e-3) % 4 for t in clip.frame_times]
    assert peak_hertz(clip.samples) == pytest.approx(hertz, abs=1.0)
    loudness = np.sqrt(np.mean(clip.samples[2000:-4000] ** 2))
    assert loudness == pytest.approx(0.4 / 2**0.5, rel=0.02)


# ---- decoding ----


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_any_rate_and_channels(tmp_path, rate, channels):
    path = tmp_path / "clip.mp4"
    write_media(path, colour_seconds(4.0), sine(4.0, rate=rate, channels=channels), rate=rate)
    assert_is_the_clip(read_clip(path))


@pytest.mark.parametrize("fps", [12.5, 8.0, 30.0])
def test_takes_the_picture_nearest_to_each_half_second(tmp_path, fps):
    path = tmp_path / "clip.mp4"
    write_media(path, colour_seconds(4.0, fps), sine(4.0), fps=fps)
    clip = read_clip(path)
    assert_is_the_clip(clip)
    wanted = np.arange(8) / 2
    stamps = np.arange(round(4.0 * fps)) / fps
    nearest = np.abs(stamps[None, :] - wanted[:, None]).min(1)
    np.testing.assert_allclose(np.abs(clip.frame_times - wanted), nearest, atol=1e-3)


def test_takes_the_first_of_several_sounds_and_says_so(tmp_path):
    path = tmp_path / "clip.mkv"
    write_media(path, colour_seconds(4.0), sine(4.0, hertz=700.0), num_sounds=2)
    clip = read_clip(path)
    assert_is_the_clip(clip, hertz=700.0)
    assert "audio stream 1 of 2 is used" in clip.notes


def test_keeps_late_sound_on_the_clock(tmp_path):
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for picture in colour_seconds(4.0):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        samples = (sine(3.0, rate=16000)[:, 0] * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 16000, Fraction(1, 16000)  # begins at 1 s
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        container.mux(video.encode(None))
    clip = read_clip(path)
    assert clip.start == pytest.approx(1.0, abs=0.01)
    assert clip.seconds == pytest.approx(3.0, abs=0.05)
    assert [colour_index(frame) for frame in clip.frames] == [1, 1, 2, 2, 3, 3]


def test_stops_at_max_seconds(tmp_path):
    path = tmp_path / "clip.mp4"
    write_media(path, colour_seconds(4.0), sine(4.0))
    clip = read_clip(path, max_seconds=2.0)
    assert clip.seconds == pytest.approx(2.0)
    assert len(clip.frames) == 4 and len(clip.samples) == 2 * SAMPLE_RATE
    assert clip.notes == ()


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_uses_what_is_left_of_a_truncated_clip_and_says_so(tmp_path, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    pictures = np.random.default_rng(0).integers(0, 255, (200, 48, 64, 3), dtype=np.uint8)  # evenly large
    write_interleaved(whole, pictures, sine(8.0, rate=16000), rate=16000)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    clip = read_clip(cut)
    assert 2.0 < clip.seconds < 6.0
    assert len(clip.frames) == round(2 * clip.seconds)
    assert any("8.0 s" in note and f"{clip.seconds:.1f} s" in note for note in clip.notes), clip.notes


def write_interleaved(path: Path, pictures: np.ndarray, samples: np.ndarray, rate: int) -> None:
    """As a camera writes: sound and picture by turns, 25 pictures a second."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        step = rate // 25
        for count, picture in enumerate(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            piece = (samples[count * step : (count + 1) * step, 0] * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(piece[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, count * step, Fraction(1, rate)
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def bad_clip(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "silent":
        write_media(path, colour_seconds(2.0), None)
    elif kind == "blind":
        write_media(path, None, sine(2.0))
    elif kind == "short":
        write_media(path, colour_seconds(0.4), sine(0.4))
    elif kind == "text":
        path.write_text("These are notes about a clip, not the clip.\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "beheaded":
        write_media(path, colour_seconds(2.0), sine(2.0))
        path.write_bytes(path.read_bytes()[:5000])  # an mp4 without its index, which comes last
    elif kind == "cover":
        path = path.with_suffix(".mp3")
        write_song_with_cover(path)
    return path


def write_song_with_cover(path: Path) -> None:
    """An MP3 whose only "video" is the picture on its sleeve, as an ID3 APIC frame."""
    write_media(path, None, sine(2.0), sound_codec="mp3")
    row = b"\x00" + b"\xc0\x30\x30" * 8
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * 8)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    body = b"\x00image/png\x00\x03\x00" + png
    apic = b"APIC" + struct.pack(">I", len(body)) + b"\x00\x00" + body
    size = bytes((len(apic) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\x00\x00" + size + apic + path.read_bytes())


BAD_CLIPS = {
    "silent": "has no sound",
    "blind": "has no picture",
    "short": "at least 1 s is needed",
    "text": "cannot be read as sound or video",
    "empty": "is empty (0 bytes)",
    "folder": "is not a file",
    "beheaded": "cannot be read as sound or video",
    "cover": "an attached still",
    "missing": "does not exist",
}


@pytest.mark.parametrize("kind", BAD_CLIPS)
def test_bad_clip_is_refused_in_words(tmp_path, capsys, kind):
    path, out = bad_clip(kind, tmp_path), tmp_path / "out"
    assert main(["--clip", str(path), "--out", str(out), "--backend", "torch"]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and BAD_CLIPS[kind] in message and "--clip" in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_cover_picture_is_no_picture(tmp_path):
    with pytest.raises(ClipError, match="has no picture"):
        read_clip(bad_clip("cover", tmp_path))


# ---- the front end ----


def test_mel_bank_follows_the_formula():
    bank = features.mel_bank(num_mels=5, num_fft=512, rate=16000)
    top = 2595 * np.log10(1 + 8000 / 700)
    corners = [700 * (10 ** (k * top / 6 / 2595) - 1) for k in range(7)]
    for band, (low, mid, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for bin_ in (3, 17, 60, 130, 255):
            hertz = bin_ * 16000 / 512
            expected = max(0.0, min((hertz - low) / (mid - low), (high - hertz) / (high - mid)))
            assert float(bank[band, bin_]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hertz", [400.0, 1000.0, 3100.0])
def test_a_sine_is_loudest_in_its_band(hertz):
    spectrogram = features.log_mel(sine(2.0, hertz, rate=SAMPLE_RATE)[:, 0])
    band = int(spectrogram.mean(1).argmax())
    centres = features.band_hertz()
    assert band == np.abs(centres - hertz).argmin()
    tokens, times = features.sound_tokens(spectrogram, 2.0)
    assert tokens.shape == (13, features.NUM_MELS) and (tokens.argmax(1) == band).all()
    np.testing.assert_allclose(times, (np.arange(13) + 0.5) * 2.0 / 13)


def test_ten_seconds_give_the_tokens_of_lavcap():
    tokens, _ = features.sound_tokens(features.log_mel(np.zeros(10 * SAMPLE_RATE, np.float32)), 10.0)
    assert len(tokens) == 64
    assert torch.allclose(tokens, torch.tensor(features.LOG_FLOOR).log())  # silence is the floor


def test_hues_are_told_apart_wherever_they_are():
    pictures = torch.zeros(3, 3, 32, 32)
    pictures[0, 0, :16] = 1.0  # red above
    pictures[1, 0, 16:] = 1.0  # red below
    pictures[2, 2, :16] = 1.0  # blue above
    amounts = features.hue_amounts(pictures)
    torch.testing.assert_close(amounts[0], amounts[1])
    assert float(amounts[0, 0]) == pytest.approx(0.5, abs=1e-6)
    blue = features.NUM_HUES * 2 / 3  # shared by the two neighbours of 240 degrees
    shares = amounts[2, [int(blue), int(blue) + 1]]
    torch.testing.assert_close(shares, torch.tensor([1 - blue % 1, blue % 1]) * 0.5, atol=1e-5, rtol=0)
    assert float(amounts.sum()) == pytest.approx(1.5, abs=1e-5)


# ---- the shared space ----


def timed_noise(
    seed: int, num_sound: int, num_pictures: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(num_sound, 20, generator=generator)
    pictures = torch.randn(num_pictures, 30, generator=generator)
    return sound, pictures, (np.arange(num_sound) + 0.5) / 6.4, np.arange(num_pictures) / 2


def test_finds_a_planted_correlation_it_has_not_seen():
    sound, pictures, sound_times, picture_times = timed_noise(0, 128, 40)
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(40, 2, generator=generator)
    partner = np.abs(sound_times[:, None] - picture_times[None, :]).argmin(1)
    sound = sound + 5 * common[partner] @ torch.randn(2, 20, generator=generator)
    pictures = pictures + 5 * common @ torch.randn(2, 30, generator=generator)
    space = shared_space.share(sound, pictures, sound_times, picture_times)
    assert space.held_out_cosine > 0.4
    assert space.rank == 0 and space.beats_chance


def test_finds_nothing_in_noise():
    """Averaged over draws: a fit that saw its own answers would be far above zero."""
    spaces = [shared_space.share(*timed_noise(seed, 64, 20)) for seed in range(12)]
    assert abs(np.mean([space.held_out_cosine for space in spaces])) < 0.08
    ranks = np.array([space.rank / len(space.shifted_cosines) for space in spaces])
    assert 0.2 < ranks.mean() < 0.8

    sound, pictures, sound_times, picture_times = timed_noise(0, 64, 20)
    partner = np.abs(sound_times[:, None] - picture_times[None, :]).argmin(1)
    x, y = shared_space.whiten(sound), shared_space.whiten(pictures)[partner]
    everything = np.ones((64, 64), dtype=bool)
    assert shared_space.mean_cosine(shared_space.cross_map(x, y, everything), y) > 0.3


def test_cross_map_is_the_formula_for_each_token():
    sound, pictures, *_ = timed_noise(3, 12, 12)
    kept = np.random.default_rng(0).random((12, 12)) > 0.4
    mapped = shared_space.cross_map(sound.double(), pictures.double(), kept)
    for i in range(12):
        x, y = sound.double()[kept[i]], pictures.double()[kept[i]]
        covariance = (x - x.mean(0)).mT @ (y - y.mean(0)) / len(x)
        torch.testing.assert_close(mapped[i], (sound.double()[i] - x.mean(0)) @ covariance)


def test_nothing_to_hear_is_no_error():
    """A constant sound has no components; its tokens are zero and the plan is the uniform one."""
    _, pictures, sound_times, picture_times = timed_noise(0, 32, 10)
    space = shared_space.share(torch.ones(32, 20), pictures, sound_times, picture_times)
    plan = otfuse.sinkhorn_attend(space.x[None], space.y[None], return_plan=True, backend="torch").plan
    torch.testing.assert_close(plan, torch.full((1, 32, 10), 1 / 320), atol=1e-7, rtol=1e-4)


# ---- scoring ----


def test_recovery_of_known_plans():
    events = [
        Event(0, 0.0, 1.0),
        Event(1, 1.0, 2.0),
        Event(0, 2.0, 3.0, seen=False),
        Event(1, 3.0, 4.0, heard=False),
    ]
    sound_times, picture_times = np.arange(16) / 4 + 0.125, np.arange(8) / 2 + 0.25
    uniform = np.full((16, 8), 1 / 128)
    score = recovery.recovery(uniform, events, sound_times, picture_times)
    # Heard: 8 tokens of kind 0 and 4 of kind 1; seen: 2 pictures of kind 0 and 4 of kind 1, of 8.
    assert score.share == pytest.approx(score.chance) == pytest.approx((8 * 2 / 8 + 4 * 4 / 8) / 12)
    assert score.ceiling == pytest.approx((2 / 8 + 4 / 16) / (12 / 16))
    assert (score.num_heard, score.unseen_share) == (3, pytest.approx(2 / 8))
    heard = recovery.token_labels(events, sound_times, "heard")
    seen = recovery.token_labels(events, picture_times, "seen")
    right = (heard[:, None] == seen[None, :]) + 1e-9
    score = recovery.recovery(right, events, sound_times, picture_times)
    assert score.share == pytest.approx(1.0) and score.num_found == 3


def test_pot_check_fails_for_a_wrong_plan():
    x, y, *_ = timed_noise(0, 30, 12)
    y = y[:, :20]
    plan = otfuse.sinkhorn_attend(x[None], y[None], return_plan=True, backend="torch").plan[0]
    assert all(found.holds for found in check.compare_with_pot(x, y, plan, 0.1, 50, "torch"))
    wrong = plan.clone()
    wrong[3, 4] *= 1.01
    assert not check.compare_with_pot(x, y, wrong, 0.1, 50, "torch")[0].holds
    assert not check.compare_with_pot(x, y, plan * torch.nan, 0.1, 50, "torch")[0].holds


def test_the_timed_loop_computes_the_same():
    x, y, *_ = timed_noise(0, 64, 20)
    x, y = x.view(2, 32, 20), y[:, :20].reshape(2, 10, 20)
    ours = otfuse.sinkhorn_attend(x, y, num_iters=20, backend="torch")
    loop_x, loop_y = timing.per_item_loop(x, y, 0.1, 20)
    torch.testing.assert_close(ours.x, loop_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.y, loop_y, atol=1e-5, rtol=1e-5)


# ---- pictures ----


def test_lift_is_one_for_the_product_plan_and_zero_without_mass():
    a, b = np.array([0.2, 0.8, 0.0]), np.array([0.5, 0.25, 0.25])
    expected = np.ones((3, 3))
    expected[2] = 0.0
    np.testing.assert_allclose(viz.lift(torch.tensor(np.outer(a, b))), expected)


def test_lines_join_the_preferred_pairs():
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    plan = np.full((6, 3), 1e-3)
    plan[np.arange(6), np.arange(6) % 3] = 1.0
    assert viz.plan_lines(ax, plan, np.arange(6.0), 10.0 + np.arange(3.0)) == 6
    ends = sorted((patch.get_path().vertices[0][0], patch.get_path().vertices[-1][0]) for patch in ax.patches)
    assert ends == [(float(row), 10.0 + row % 3) for row in range(6)]
    assert viz.plan_lines(Figure().add_subplot(), np.ones((4, 3)), np.arange(4), np.arange(3)) == 0


def test_preferred_pairs_come_faintest_first():
    pairs = viz.preferred_pairs(torch.tensor([[4.0, 1.0], [1.0, 6.0]]))
    assert [pair[:2] for pair in pairs] == [(0, 0), (1, 1)] and pairs[-1].strength == 1.0
    assert viz.preferred_pairs(np.ones((4, 3))) == []


@pytest.mark.parametrize("without", ["plan", "sound", "pictures"])
def test_the_figure_leaves_out_what_there_is_not(without: str) -> None:
    spectrogram = None if without == "sound" else np.arange(12.0).reshape(3, 4)
    frames = np.zeros((0 if without == "pictures" else 2, 8, 8, 3), np.uint8)
    times = np.arange(len(frames)) / 2
    name = "costs $5, not $6"  # no formula
    figure = viz.alignment_figure(
        None, spectrogram, frames, sound_times=[], picture_times=times, seconds=1.0, title=name
    )
    figure.savefig(io.BytesIO())
    words = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert words == {"sound": ["no sound"], "pictures": ["no picture"], "plan": []}[without]
    assert len(figure.axes) == 2  # neither lines nor heat map nor colour bar
    images = [len(ax.images) for ax in figure.axes]
    assert images == [int(without != "sound"), len(frames)]


def test_heatmap_shows_the_lift():
    from matplotlib.figure import Figure

    plan = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) ** 6
    image = viz.plan_heatmap(Figure().add_subplot(), plan, row_label="sound", column_label="picture")
    np.testing.assert_allclose(image.get_array(), viz.lift(plan).clip(1.0, viz.MOST_LIFT))
    assert (image.axes.get_ylabel(), image.axes.get_xlabel()) == ("sound", "picture")


def assert_is_a_picture(path: Path) -> None:
    """A PNG of 1600 x 900 whose parts (spectrogram, lines, frames, heat map) are more than background."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1600, 900)
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    for part in (
        np.s_[150:350, 100:1100],
        np.s_[360:670, 100:1100],
        np.s_[690:800, 100:1100],
        np.s_[150:700, 1230:1560],
    ):
        assert picture[part].std() > 0.02, part


# ---- the whole ----


def test_synthetic_clip_is_recovered(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--backend", "torch"]) == 0
    report = capsys.readouterr().out
    assert "11 heard events" in report and "ot.batch, rows first" in report and "batch 32" in report
    assert_is_a_picture(tmp_path / "alignment.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment.png", "synthetic.mp4"]

    clip, events = read_clip(tmp_path / "synthetic.mp4"), synthesize.make_events()
    assert clip.seconds == pytest.approx(12.0, abs=0.05)
    score = score_of(clip, events)
    assert score.share > 0.8 * score.ceiling > 4 * score.chance
    assert score.num_found >= 9 and score.unseen_share > 2 * score.chance
    wrong = [score_of(clip, events, shift) for shift in (15, 30, 45, 60)]
    assert np.mean([one.share for one in wrong]) < 2 * score.chance


@pytest.mark.parametrize("seed", [1, 2])
def test_recovery_is_no_luck_of_one_seed(tmp_path, seed):
    events = synthesize.write_synthetic_clip(tmp_path / "clip.mp4", seed)
    score = score_of(read_clip(tmp_path / "clip.mp4"), events)
    assert score.share > 0.7 * score.ceiling and score.share > 3 * score.chance


def score_of(clip, events, shift: int = 0) -> recovery.Recovery:
    sound, sound_times = features.sound_tokens(features.log_mel(clip.samples), clip.seconds)
    pictures = features.picture_tokens(clip.frames)
    space = shared_space.share(sound, pictures, sound_times, clip.frame_times, shift)
    plan = otfuse.sinkhorn_attend(space.x[None], space.y[None], return_plan=True, backend="torch").plan[0]
    return recovery.recovery(plan.numpy(), events, sound_times, clip.frame_times)


def test_synthetic_events_are_mixed_and_partly_one_sided():
    events = synthesize.make_events()
    kinds = [event.kind for event in events]
    assert sorted(kinds) == sorted([*range(4)] * 3) and kinds != sorted(kinds)
    assert sum(not event.seen for event in events) == sum(not event.heard for event in events) == 1
    assert all(left.end < right.start for left, right in itertools.pairwise(events))


def test_an_unwritable_picture_leaves_nothing_behind(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    write_media(clip, colour_seconds(2.0), sine(2.0))
    out = tmp_path / "out"
    (out / "alignment.png").mkdir(parents=True)  # in the way
    assert main(["--clip", str(clip), "--out", str(out), "--backend", "torch"]) == 2
    assert str(out) in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["alignment.png"]


def test_unknown_backend_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), "--backend", "abacus"]) == 2
    message = capsys.readouterr().err
    assert "abacus" in message and "torch" in message
    assert not (tmp_path / "out").exists()


def test_auto_is_what_the_functions_take():
    """And no emulator or interpreter, which run on a CPU too, but only by name."""
    assert choose_backend("auto", "cpu") == "cpu"


def test_unusable_backend_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CpuBackend, "unavailable", lambda backend: ["its compiler is on holiday"])
    assert main(["--out", str(tmp_path / "out"), "--backend", "cpu"]) == 2
    assert "its compiler is on holiday" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["av", "matplotlib", "ot"])
def test_missing_extra_is_named(tmp_path, capsys, monkeypatch, module):
    def absent(name):
        return None if name == module else object()

    monkeypatch.setattr("importlib.util.find_spec", absent)
    assert main(["--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "pip install 'otfuse[demo]'" in message and message.count("\n") == 1


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the real clips are not here ({CLIPS})")
@pytest.mark.parametrize("path", sorted(CLIPS.glob("*.mp4")), ids=lambda path: path.stem)
def test_real_clip(tmp_path, capsys, path):
    assert main(["--clip", str(path), "--out", str(tmp_path), "--backend", "torch"]) == 0
    report = capsys.readouterr().out
    clip = read_clip(path)
    assert f"{round(6.4 * clip.seconds)} of sound" in report and f"x {round(2 * clip.seconds)} of picture" in report
    assert clip.seconds > 5.5 and np.abs(clip.frame_times - np.arange(len(clip.frames)) / 2).max() <= 0.021
    assert report.count("\nPOT ") == 2 and "FAILED" not in report
    assert_is_a_picture(tmp_path / "alignment.png")
