"""Makes a clip whose events are seen and heard at known times, as a real media file.

Four kinds of event, each a shape of one colour with a sound of one timbre, come three times each in mixed
order and at random places. One is heard but not seen and one is seen but not heard, so time alone cannot
match them. Behind them, unrelated to them and to each other: hum, hiss, a drifting shade and a silent white
ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from otfuse.demo.output import whole_file

SLOT = 1.0  # seconds from one event to the next
SHOWN = 0.7  # seconds an event lasts
NUM_TIMES = 3  # how often each kind comes
WIDTH, HEIGHT, FPS = 320, 240, 25
RATE = 44100


@dataclass(frozen=True)
class Kind:
    name: str
    colour: str  # of the shape; also its colour in the figure


@dataclass(frozen=True)
class Event:
    kind: int  # index into KINDS
    start: float  # seconds
    end: float
    seen: bool = True
    heard: bool = True


# Colours of Okabe and Ito, told apart by colour-blind readers too.
KINDS = (
    Kind("disc, low tone", "#D55E00"),
    Kind("square, high tone", "#0072B2"),
    Kind("triangle, rising chirp", "#009E73"),
    Kind("cross, noise", "#CC79A7"),
)


def make_events(seed: int = 0) -> list[Event]:
    """Twelve events in mixed order, no kind twice running; one of one kind unseen, one of another unheard."""
    rng = np.random.default_rng(seed)
    order = np.repeat(np.arange(len(KINDS)), NUM_TIMES)
    while (order[1:] == order[:-1]).any():
        order = rng.permutation(order)
    unseen, unheard = (int(np.flatnonzero(order == kind)[1]) for kind in rng.permutation(len(KINDS))[:2])
    starts = np.arange(len(order)) * SLOT + rng.uniform(0.0, SLOT - SHOWN, len(order))
    return [
        Event(int(kind), float(start), float(start + SHOWN), seen=place != unseen, heard=place != unheard)
        for place, (kind, start) in enumerate(zip(order, starts, strict=True))
    ]


def write_synthetic_clip(path: Path, seed: int = 0) -> list[Event]:
    """Write the clip (MPEG-4 video and AAC, which every FFmpeg has) and return its events."""
    events = make_events(seed)
    seconds = len(events) * SLOT
    rng = np.random.default_rng(seed + 1)
    write_media(path, draw_pictures(events, seconds, rng), make_sound(events, seconds, rng))
    return events


def make_sound(events: list[Event], seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Mono samples [num_samples] at RATE, float32."""
    time = np.arange(round(seconds * RATE)) / RATE
    hum = 0.02 * np.sin(2 * np.pi * 110.0 * time) * (1.0 + 0.5 * np.sin(2 * np.pi * 0.13 * time))
    samples = hum + 0.004 * rng.standard_normal(len(time))
    for event in events:
        if event.heard:
            here = (time >= event.start) & (time < event.end)
            since = time[here] - event.start
            fade = np.clip(np.minimum(since, since[-1] - since) / 0.02, 0.0, 1.0)
            samples[here] += 0.3 * fade * _timbre(event.kind, since, rng)
    return samples.astype(np.float32)


def _timbre(kind: int, since: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if kind == 0:
        return np.sin(2 * np.pi * 300.0 * since) + 0.5 * np.sin(2 * np.pi * 600.0 * since)
    if kind == 1:
        return np.sin(2 * np.pi * 1300.0 * since)
    if kind == 2:
        return np.sin(2 * np.pi * (2000.0 * since + 1000.0 * since**2 / SHOWN))
    return 0.5 * rng.standard_normal(len(since))


def draw_pictures(events: list[Event], seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Pictures [num_frames, HEIGHT, WIDTH, 3], uint8, FPS a second."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    places = [(rng.uniform(70, WIDTH - 70), rng.uniform(70, HEIGHT - 70)) for _ in events]
    frames = np.empty((round(seconds * FPS), HEIGHT, WIDTH, 3), dtype=np.uint8)
    for count in range(len(frames)):
        time = count / FPS
        shade = 150.0 + 25.0 * np.sin(x / 90.0 + 0.7 * time) + 15.0 * np.cos(y / 60.0 - 0.4 * time)
        picture = np.stack([shade, 0.96 * shade, 0.90 * shade], axis=-1)
        picture[_shape("ball", x - WIDTH * (0.5 + 0.4 * np.sin(0.9 * time)), y - 30.0)] = 240.0
        for event, (across, down) in zip(events, places, strict=True):
            if event.seen and event.start <= time < event.end:
                colour = KINDS[event.kind].colour.lstrip("#")
                picture[_shape(KINDS[event.kind].name, x - across, y - down)] = list(bytes.fromhex(colour))
        grain = 4.0 * rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32)
        frames[count] = np.clip(picture + grain, 0, 255)
    return frames


def _shape(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pixels, given relative to the middle of the shape, lie in it."""
    if name.startswith("ball"):
        return x**2 + y**2 < 12.0**2
    if name.startswith("disc"):
        return x**2 + y**2 < 52.0**2
    if name.startswith("square"):
        return (abs(x) < 46.0) & (abs(y) < 46.0)
    if name.startswith("triangle"):
        return (y < 48.0) & (y > 2.0 * abs(x) - 60.0)
    return (np.minimum(abs(x), abs(y)) < 18.0) & (np.maximum(abs(x), abs(y)) < 54.0)


def write_media(
    path: Path,
    pictures: np.ndarray | None,
    samples: np.ndarray | None,
    *,
    fps: float = FPS,
    rate: int = RATE,
    sound_codec: str = "aac",
    num_sounds: int = 1,
) -> None:
    """Write pictures [T, H, W, 3] and sound [num_samples] or [num_samples, channels]; whole or not at all.

    Either may be None (no such stream); `num_sounds` streams of sound are written, of which the first is
    `samples` and the others are silent.
    """
    with whole_file(path) as file, av.open(file, "w") as container:
        _encode(
            container,
            pictures,
            samples,
            fps=fps,
            rate=rate,
            sound_codec=sound_codec,
            num_sounds=num_sounds,
        )


def _encode(
    container: Any,
    pictures: np.ndarray | None,
    samples: np.ndarray | None,
    *,
    fps: float,
    rate: int,
    sound_codec: str,
    num_sounds: int,
) -> None:
    streams = []
    # Every stream must be added before the first packet is written.
    if pictures is not None:
        video = container.add_stream("mpeg4", rate=Fraction(fps).limit_denominator(1000))
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt, video.bit_rate = "yuv420p", 1_500_000
        streams.append(video)
    if samples is not None:
        samples = samples.reshape(len(samples), -1)
        layout = "mono" if samples.shape[1] == 1 else "stereo"
        sounds = [container.add_stream(sound_codec, rate=rate, layout=layout) for _ in range(num_sounds)]
        streams.extend(sounds)
    if pictures is not None:
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    if samples is not None:
        for place, stream in enumerate(sounds):
            interleaved = (samples if place == 0 else 0.0 * samples).astype(np.float32).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            container.mux(stream.encode(frame))
    for stream in streams:
        container.mux(stream.encode(None))
