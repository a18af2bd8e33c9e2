"""What lavcap's decoder and that of otfuse's demo have in common: upright pictures, memory, names."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from lavcap.caption import failed
from lavcap.data import decode as ours
from lavcap.data.decode import DecodedClip, Dropped, Reason, decode_clip
from lavcap.data.sample import SAMPLE_RATE
from media import grey, tone, write_clip

from otfuse.demo import decode as demo
from otfuse.demo import media
from otfuse.demo.decode import ClipError, read_clip
from otfuse.demo.media import LOWEST_RATE


def first_picture(path: Path) -> np.ndarray:
    clip = decode_clip(path, 64)
    assert isinstance(clip, DecodedClip), clip
    return clip.pictures[0]


def first_picture_of_the_demo(path: Path) -> np.ndarray:
    return read_clip(path).frames[0]


DECODERS = pytest.mark.parametrize("picture_of", [first_picture, first_picture_of_the_demo], ids=["lavcap", "demo"])

# Display matrices (a, b, c, d), and the filters that FFmpeg's autorotate puts in for them (fftools/ffmpeg_filter.c).
ORIENTATIONS = {
    (1, 0, 0, 1): [],
    (-1, 0, 0, 1): [("hflip", None)],
    (1, 0, 0, -1): [("vflip", None)],
    (-1, 0, 0, -1): [("hflip", None), ("vflip", None)],
    (0, 1, -1, 0): [("transpose", "clock")],
    (0, -1, 1, 0): [("transpose", "cclock")],
    (0, 1, 1, 0): [("transpose", "cclock_flip")],
    (0, -1, -1, 0): [("transpose", "clock_flip")],
}


def quarters(_: float = 0.0) -> np.ndarray:
    picture = grey(40, (64, 96))
    picture[:32, 48:], picture[32:, :48], picture[32:, 48:] = 90, 150, 220
    return picture


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The MP4 file with this display matrix in every track."""
    a, b, c, d = (number << 16 for number in matrix)
    as_it_is = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    film, *tracks = path.read_bytes().split(as_it_is)
    assert len(tracks) == 3  # behind the film's own and those of both tracks
    path.write_bytes(film + as_it_is + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000).join(tracks))
    return path


def filtered(picture: np.ndarray, filters: list[tuple[str, str | None]]) -> np.ndarray:
    graph = Graph()
    height, width = picture.shape[:2]
    nodes = [graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 25))]
    nodes += [graph.add(name, *([] if value is None else [value])) for name, value in filters]
    nodes += [graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    graph.push(av.VideoFrame.from_ndarray(picture, format="rgb24"))
    return graph.pull().to_ndarray(format="rgb24")


def corners(picture: np.ndarray) -> list[float]:
    """Means of the four quarters, without what lies near their edges."""
    height, width = (side // 2 for side in picture.shape[:2])
    return [picture[y + 8 : y + height - 8, x + 8 : x + width - 8].mean() for y in (0, height) for x in (0, width)]


@DECODERS
@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_pictures_are_turned_and_mirrored_as_ffmpeg_does(tmp_path: Path, picture_of: Callable, matrix) -> None:
    found = picture_of(with_matrix(write_clip(tmp_path / "a.mp4", picture=quarters), matrix))
    expected = filtered(quarters(), ORIENTATIONS[matrix])
    assert np.abs(np.array(corners(found)) - corners(expected)).max() < 4
    if picture_of is first_picture_of_the_demo:  # lavcap's pictures are squares
        assert (found.shape[0] > found.shape[1]) == (expected.shape[0] > expected.shape[1])


def write_one_packet(path: Path, rate: int, count: int, size: tuple[int, int] = (48, 64)) -> Path:
    """Two pictures of a second each, [H, W] grey, and all of the sound, `count` samples of 8 bits, in one packet."""
    with av.open(str(path), "w") as container:
        height, width = size
        pictures = container.add_stream("ffv1", rate=1, width=width, height=height, pix_fmt="gray")
        sound = container.add_stream("pcm_u8", rate=rate, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.full((1, count), 128, np.uint8), format="u8", layout="mono")
        heard.pts, heard.sample_rate, heard.time_base = 0, rate, Fraction(1, rate)
        packets = [packet for one in (heard, None) for packet in sound.encode(one)]
        for index in range(2):
            shown = av.VideoFrame.from_ndarray(np.full(size, 99, np.uint8), format="gray")
            shown.pts, shown.time_base = index, Fraction(1, 1)
            packets += pictures.encode(shown)
        for packet in [*packets, *pictures.encode()]:
            container.mux(packet)
    return path


LARGE = {
    "thin": {"rate": 8000, "count": 16_000, "size": (1, 16_000)},
    "slow": {"rate": 8, "count": 400_000},
    "long": {"rate": 1000, "count": 20_000_000},
}
MEASURE = """
import resource, sys
from pathlib import Path
from lavcap.data.decode import decode_clip
from otfuse.demo.decode import ClipError, read_clip
def demo(path):
    try: return read_clip(path)
    except ClipError as error: return error
read = demo if sys.argv[1] == "demo" else lambda path: decode_clip(path, 224)
read(Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read(Path(sys.argv[3]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("decoder", ["lavcap", "demo"])
@pytest.mark.parametrize("kind", LARGE)
def test_a_small_file_takes_no_gigabytes(tmp_path: Path, kind: str, decoder: str) -> None:
    """At its most, in a process of its own that has decoded a clip before. Unbounded they took 1.3 GB to 3.3 GB."""
    plain = write_clip(tmp_path / "plain.mkv")
    large = write_one_packet(tmp_path / "large.mkv", **LARGE[kind])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, decoder, plain, large], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 600e6


def test_what_is_cut_before_scaling_is_what_was_cut_after(tmp_path: Path) -> None:
    """A picture three times as wide as high, of which the middle third is a ramp."""

    def ramp(_: float) -> np.ndarray:
        picture = grey(0, (64, 192))
        picture[:, 64:128] = np.linspace(40, 200, 64, dtype=np.uint8)[None, :, None]
        return picture

    clip = decode_clip(write_clip(tmp_path / "a.mkv", picture=ramp), 32)
    assert isinstance(clip, DecodedClip)
    inner = clip.pictures[0, :, 2:-2].mean((0, 2))
    assert np.abs(inner - np.linspace(40, 200, 64).reshape(32, 2).mean(1)[2:-2]).max() < 3


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (LARGE["slow"], f"sound of 8 samples a second, of which {LOWEST_RATE} at least are read"),
        (
            {"rate": 8000, "count": 16_000, "size": (60, 70)},
            "pictures of 70 x 60 pixels, of which 4,000 at most are read",
        ),
    ],
    ids=["slow", "large"],
)
def test_what_is_out_of_range_is_dropped_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict, detail: str
) -> None:
    monkeypatch.setattr(media, "MOST_PIXELS", 4000)  # in place of 67 million
    path = write_one_packet(tmp_path / "a.mkv", **content)
    found = decode_clip(path, 32)
    assert isinstance(found, Dropped) and found == (Reason.OUT_OF_RANGE, detail)
    assert f"is out of range ({detail}): convert it" in str(failed(path, found).error)
    with pytest.raises(ClipError, match=rf"a.mkv' holds {detail}: pass a clip"):
        read_clip(path)


def test_a_clip_that_takes_all_memory_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    path = write_clip(tmp_path / "a.mkv")
    monkeypatch.setattr(ours, "_decode", exhausted)
    monkeypatch.setattr(demo, "_read_clip", exhausted)
    found = decode_clip(path, 32)
    assert isinstance(found, Dropped) and found.reason is Reason.OUT_OF_RANGE and "more memory" in found.detail
    with pytest.raises(ClipError, match="takes more memory than there is"):
        read_clip(path)


def test_sound_long_before_the_picture_leaves_the_rest_in_place(tmp_path: Path) -> None:
    """Whole seconds of it are cut off before resampling."""
    clip = decode_clip(write_clip(tmp_path / "a.mkv", 7.0, picture_start=4.5, sound=lambda t: t / 8), 32)
    assert isinstance(clip, DecodedClip)
    assert len(clip.waveform) == 5 * SAMPLE_RATE // 2
    ramp = (4.5 + np.arange(len(clip.waveform)) / SAMPLE_RATE) / 8
    assert np.abs(clip.waveform - ramp)[:-400].max() < 1e-3


def test_many_channels_are_averaged_by_the_demo_too(tmp_path: Path) -> None:
    clip = read_clip(write_clip(tmp_path / "a.mkv", sound=lambda t: np.stack([16 * tone(t)] + 15 * [np.zeros_like(t)])))
    expected = tone(np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    assert len(clip.samples) == 2 * SAMPLE_RATE and np.abs(clip.samples - expected)[400:-400].max() < 1e-3


@DECODERS
@pytest.mark.parametrize(
    "name", ["2026-11-30T12:30:00.mkv", "concat:a|b.mkv", "http:/x.mkv", "50%20.mkv", b"lat\xe9in.mkv"]
)
def test_names_are_names_and_no_protocols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_of: Callable, name: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    path.parent.mkdir(exist_ok=True)
    write_clip(tmp_path / "plain.mkv").rename(path)
    assert picture_of(path).std() < 3  # the evenly grey first picture
