"""Media files with known sound and pictures, and prepared splits without media, for the tests of the data."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from lavcap.data.prepare import PictureFeatures
from lavcap.data.shards import open_split

RATE = 44100
FPS = 20
REAL_DATA = Path(__file__).parents[4] / "shared" / "data"

Sound = Callable[[np.ndarray], np.ndarray]  # [S] seconds to [S] mono or [channels, S] samples
Picture = Callable[[float], np.ndarray]  # seconds to [H, W, 3] uint8


def tone(times: np.ndarray) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * times)


def grey(level: float, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size, 3), level, dtype=np.uint8)


def half_second_steps(time: float) -> np.ndarray:
    """A grey that gets lighter by 10 every half second."""
    return grey(10 + 10 * int(2 * time + 1e-6))


def write_clip(
    path: Path,
    seconds: float = 2.0,
    *,
    sound: Sound | None = tone,
    picture: Picture | None = half_second_steps,
    picture_start: float = 0.0,
    sound_holes: tuple[tuple[float, float], ...] = (),
    rate: int = RATE,
    title: str = "",
) -> Path:
    """A Matroska or MP4 file of float sound (nothing is lost) and MPEG-4 pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        packets: list[tuple[float, av.Packet]] = []
        if picture is not None:
            packets += _pictures(container, seconds, picture, picture_start)
        if sound is not None:
            packets += _sound(container, seconds, sound, sound_holes, rate)
        for _, packet in sorted(packets, key=lambda pair: pair[0]):
            container.mux(packet)
    return path


def _pictures(container, seconds: float, picture: Picture, start: float) -> list[tuple[float, av.Packet]]:
    height, width = picture(0.0).shape[:2]
    stream = container.add_stream("mpeg4", rate=FPS, width=width, height=height, pix_fmt="yuv420p", bit_rate=4_000_000)
    packets = []
    for index in range(round((seconds - start) * FPS)):
        frame = av.VideoFrame.from_ndarray(picture(start + index / FPS), format="rgb24")
        frame.pts = index + round(start * FPS)
        frame.time_base = Fraction(1, FPS)
        packets += stream.encode(frame)
    return [(float(packet.dts * packet.time_base), packet) for packet in packets + stream.encode()]


def _sound(container, seconds: float, sound: Sound, holes, rate: int) -> list[tuple[float, av.Packet]]:
    lossless = container.format.name == "matroska"
    samples = np.atleast_2d(sound(np.arange(round(seconds * rate)) / rate)).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 16: "hexadecagonal"}[len(samples)]
    stream = container.add_stream("pcm_f32le" if lossless else "aac", rate=rate, layout=layout)
    block = rate // 50 if lossless else 1024
    packets = []
    for first in range(0, samples.shape[1], block):
        if any(begin <= first / rate < end for begin, end in holes):
            continue
        piece = np.ascontiguousarray(samples[:, first : first + block])
        if lossless:  # one row, channels taking turns
            frame = av.AudioFrame.from_ndarray(piece.T.reshape(1, -1), format="flt", layout=layout)
        else:
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
        frame.pts, frame.sample_rate, frame.time_base = first, rate, Fraction(1, rate)
        packets += stream.encode(frame)
    return [(float(packet.dts * packet.time_base), packet) for packet in packets + stream.encode()]


def write_captions_file(path: Path, rows: Iterable[tuple[str, object, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
        writer.writerows((number, *row) for number, row in enumerate(rows))
    return path


def mean_colours(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float().mean((1, 2)).to(torch.bfloat16)


MEAN_COLOURS = PictureFeatures(32, mean_colours, "mean colours")  # [F, 3]: a picture encoder that can be checked by eye


def write_split(folder: Path, split: str, num_clips: int, clips_per_shard: int) -> list[str]:
    """A complete split of short clips: clip i has i + 1 samples of value i, and 1 + i % 3 pictures."""
    ids = [f"{split}-{i:03d}_{i}" for i in range(num_clips)]
    with open_split(folder / split, settings(num_clips, clips_per_shard)) as writer:
        for i, clip_id in enumerate(ids):
            visual = torch.full((1 + i % 3, 4), float(i), dtype=torch.bfloat16)
            writer.keep(clip_id, (f"caption {i}", f"wörter {i}"), torch.full((i + 1,), float(i)), visual)
    return ids


def settings(num_clips: int, clips_per_shard: int) -> dict[str, object]:
    return {"num_candidates": num_clips, "clips_per_shard": clips_per_shard, "visual": "constants"}
