"""Decodes the sound and the pictures of a clip with PyAV, both from the same moment on.

A captioner of sound alone, or of pictures alone, also takes files that hold only these (:class:`Needs`).

Times come from the file's stamps, never from counting: a late stream, a variable frame rate or a hole in the sound end
up where they belong. Decoding uses one thread a file, so that the same file gives the same bytes on every run; several
files are decoded side by side by processes (:mod:`lavcap.data.prepare`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soxr
from av.stream import Disposition
from PIL import Image

from lavcap.data.sample import SAMPLE_RATE
from otfuse.demo.media import OutOfRange, check, file_url, limit, upright

SECONDS = 10  # of a clip that are used
FRAMES_PER_SECOND = 2
NUM_FRAMES = SECONDS * FRAMES_PER_SECOND
SHORTEST = 1.0  # seconds of sound, and of picture, below which a clip is dropped
READ_THROUGH = 64 << 20  # bytes of a file, more than ten seconds have
EDGE = 1.0  # seconds of sound beyond what is used, at both ends: resampling looks at what is beside a sample
HOLE = 0.05  # seconds between two pieces of sound that count as a hole
NOT_MEDIA = frozenset({"tty", "srt", "webvtt", "ass", "hls", "dash", "concat"})  # FFmpeg's names of texts and lists


class Reason(Enum):
    """Why a clip is not in the prepared set."""

    NO_FILE = "no_file"
    UNREADABLE = "unreadable"
    NO_SOUND = "no_sound"
    NO_PICTURE = "no_picture"
    TOO_SHORT = "too_short"
    OUT_OF_RANGE = "out_of_range"
    NO_CAPTION = "no_caption"
    NOT_SELECTED = "not_selected"


class Dropped(NamedTuple):
    """A clip that is left out: the reason, and what was found."""

    reason: Reason
    detail: str


class Needs(NamedTuple):
    """What a clip must hold; what it holds beyond that is decoded too."""

    sound: bool = True
    picture: bool = True


BOTH = Needs()


class DecodedClip(NamedTuple):
    """Sound, of which peaks above 1 are kept, and what is on the screen every 1 / FRAMES_PER_SECOND seconds."""

    waveform: np.ndarray  # [S] float32, mono, SAMPLE_RATE a second; S = 0 without sound
    pictures: np.ndarray  # [F, P, P, 3] uint8 RGB, F <= NUM_FRAMES; F = 0 without pictures
    file_seconds: float | None = None  # how long the file says it is, from the clip's beginning on


def decode_clip(path: Path, picture_size: int, needs: Needs = BOTH) -> DecodedClip | Dropped:
    """The first SECONDS of a clip from the moment at which both sound and picture have begun, or why there is none.

    Raises:
        OSError: the file could not be read, which is not the clip's fault.
    """
    _read_through(path)
    try:
        return _decode(path, picture_size, needs)
    except av.error.FFmpegError as error:
        return Dropped(Reason.UNREADABLE, error.strerror or type(error).__name__)
    except OutOfRange as error:
        return Dropped(Reason.OUT_OF_RANGE, str(error))
    except MemoryError:
        return Dropped(Reason.OUT_OF_RANGE, "decoding it takes more memory than there is")


def _decode(path: Path, picture_size: int, needs: Needs) -> DecodedClip | Dropped:
    with _open(path) as container:
        if NOT_MEDIA & set(container.format.name.split(",")):
            return Dropped(Reason.UNREADABLE, f"a text or a list of files, '{container.format.name}'")
        sound_streams, picture_streams = (_usable(container, kind) for kind in ("audio", "video"))
        described = ", ".join(_describe(stream) for stream in container.streams) or "none"
        file_end = _end(container)
    if needs.sound and not sound_streams:
        return Dropped(Reason.NO_SOUND, f"its streams: {described}")
    if needs.picture and not picture_streams:
        return Dropped(Reason.NO_PICTURE, f"its streams: {described}")

    sound = _first_decodable(path, sound_streams)
    picture = _first_decodable(path, picture_streams)
    missing = [kind for kind, stream in (("sound", sound), ("picture", picture)) if stream is None]
    if any(getattr(needs, kind) for kind in missing):
        return Dropped(Reason.UNREADABLE, f"no {missing[0]} could be decoded")
    start = max(stream.begin for stream in (sound, picture) if stream is not None)
    waveform = np.zeros(0, np.float32) if sound is None else _read_sound(path, sound.number, start)
    if not np.isfinite(waveform).all():
        return Dropped(Reason.UNREADABLE, "the sound holds NaN or infinity")
    pictures = [] if picture is None else _read_pictures(path, picture.number, start, picture_size)
    heard, seen = len(waveform) / SAMPLE_RATE, len(pictures) / FRAMES_PER_SECOND
    if (needs.sound and heard < SHORTEST) or (needs.picture and seen < SHORTEST):
        return Dropped(Reason.TOO_SHORT, f"{heard:.2f} s of sound and {seen:.1f} s of picture together")
    stacked = np.reshape(pictures, (-1, picture_size, picture_size, 3)).astype(np.uint8, copy=False)
    return DecodedClip(waveform, stacked, None if file_end is None else file_end - start)


def _end(container: Any) -> float | None:
    """Seconds, by the file's stamps, at which it ends; None where its headers do not say."""
    if container.duration is None:
        return None
    return float(container.duration + (container.start_time or 0)) / av.time_base


def _read_through(path: Path) -> None:
    """Have a disk that fails say so itself: FFmpeg does not tell that from a file that is broken."""
    with path.open("rb") as file:
        while file.read(1 << 20) and file.tell() < READ_THROUGH:
            pass


def _open(path: Path) -> Any:
    return av.open(file_url(path), metadata_errors="replace")  # titles are in whatever code their author had


class _Stream(NamedTuple):
    number: int  # among the file's streams
    begin: float  # seconds, the stamp of the first frame that decodes


def _usable(container: Any, kind: str) -> list[int]:
    """Streams of a kind that have a decoder and are no cover picture."""
    return [
        stream.index
        for stream in container.streams
        if stream.type == kind
        and stream.codec_context is not None
        and not stream.disposition & Disposition.attached_pic
    ]


def _describe(stream: Any) -> str:
    return f"{stream.type} {'unknown' if stream.codec_context is None else stream.codec_context.name}"


def _first_decodable(path: Path, indices: list[int]) -> _Stream | None:
    for index in indices:
        for frame in _frames(path, index):
            return _Stream(index, frame.time or 0.0)
    return None


def _frames(path: Path, index: int) -> Iterator[Any]:
    """The frames of one stream; packets that do not decode are skipped, a broken end is the end."""
    with _open(path) as container:
        stream = container.streams[index]
        stream.thread_count = 1
        limit(stream)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                return
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in decoded:
                check(frame)
                yield frame


def _read_sound(path: Path, index: int, start: float) -> np.ndarray:
    """[S] mono samples from `start` on, at most SECONDS of them; holes are silent."""
    samples = np.zeros(SECONDS * SAMPLE_RATE, dtype=np.float32)
    filled = 0
    for time, rate, piece in _runs_of_sound(path, index, start, start + SECONDS):
        resampled = soxr.resample(piece, rate, SAMPLE_RATE)
        first = round((time - start) * SAMPLE_RATE)
        resampled = resampled[max(0, -first) :]
        first = max(0, first)
        count = max(0, min(len(resampled), len(samples) - first))
        samples[first : first + count] = resampled[:count]
        filled = max(filled, first + count) if count else filled
    return samples[:filled]


def _runs_of_sound(path: Path, index: int, start: float, stop: float) -> Iterator[tuple[float, int, np.ndarray]]:
    """Time, rate, mono samples of each stretch without a hole or a change of format, from about `start` to `stop`."""
    pieces: list[np.ndarray] = []
    begin = expected = 0.0
    count = 0  # samples in `pieces`
    shape: tuple[str, str, int] | None = None
    for frame in _frames(path, index):
        time = expected if frame.time is None else frame.time
        if time >= stop:
            break
        frame_shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if shape is None or shape != frame_shape or abs(time - expected) > HOLE:
            if shape is not None and count:
                yield begin, shape[2], np.concatenate(pieces)
            to_float = av.AudioResampler(format="flt")  # channels in turn: PyAV dies of more than eight planes
            pieces, begin, shape, count = [], time, frame_shape, 0
        with np.errstate(invalid="ignore"):  # of NaN and infinity, which are looked for later
            samples = np.concatenate([_mono(part) for part in to_float.resample(frame)])
        samples = samples[: math.ceil((stop + EDGE - time) * shape[2])]
        pieces.append(samples)
        count += len(samples)
        unused = int(min(count / shape[2], start - EDGE - begin))  # whole seconds: the others keep their places
        if unused > 0:
            pieces = [np.concatenate(pieces)[unused * shape[2] :]]
            begin, count = begin + unused, count - unused * shape[2]
        expected = time + frame.samples / frame.sample_rate
    if shape is not None and count:
        yield begin, shape[2], np.concatenate(pieces)


def _mono(frame: Any) -> np.ndarray:
    return np.asarray(frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(1))


def _read_pictures(path: Path, index: int, start: float, size: int) -> list[np.ndarray]:
    """What is on the screen at start + k / FRAMES_PER_SECOND, while the stream lasts."""
    pictures: list[np.ndarray] = []
    shown: Any = None
    end = start
    for frame in _frames(path, index):
        time = end if frame.time is None else frame.time
        if shown is not None:
            while len(pictures) < NUM_FRAMES and start + len(pictures) / FRAMES_PER_SECOND < time:
                pictures.append(_square(shown, size))
        if len(pictures) == NUM_FRAMES:
            return pictures
        shown = frame
        end = time + (float(frame.duration * frame.time_base) if frame.duration else 1.0 / 25.0)
    while len(pictures) < NUM_FRAMES and start + len(pictures) / FRAMES_PER_SECOND < end:
        pictures.append(_square(shown, size))
    return pictures


def _square(frame: Any, size: int) -> np.ndarray:
    """[size, size, 3]: upright, the centre of the shorter side's size scaled to `size` (bicubic), as CLIP takes it."""
    picture = Image.fromarray(np.ascontiguousarray(upright(frame.to_ndarray(format="rgb24"), frame)))
    scale = size / min(picture.size)
    (left, right), (top, bottom) = (_centre(side, max(size, int(side * scale)), size) for side in picture.size)
    # Scaling the centre alone is scaling the whole and cutting: what lies beside the centre is looked at too.
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, right, bottom)))


def _centre(side: int, scaled: int, size: int) -> tuple[float, float]:
    """Begin and end, in pixels of a side, of the `size` pixels in the middle of it when it is `scaled`."""
    begin = (scaled - size) // 2
    return begin * side / scaled, (begin + size) * side / scaled
