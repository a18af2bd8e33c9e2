"""Reads the sound and the pictures of a clip with PyAV, on one clock.

Times come from the file's own stamps, never from counting, so a late stream, a variable frame rate or a hole
in the sound end up where they belong. Whatever decodes is used; what did not is told in `Clip.notes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame

from otfuse.demo.media import OutOfRange, check, file_url, limit, upright

SAMPLE_RATE = 16000  # samples a second after resampling, mono
FRAMES_PER_SECOND = 2  # pictures a second that become tokens
PICTURE_SIZE = 160  # pixels, the longer side of a kept picture
SHORTEST = 1.0  # seconds of sound and picture together, below which there is nothing to align
HOLE = 0.05  # seconds between two pieces of sound that count as a hole

Read = TypeVar("Read")

WAY_OUT = "pass a clip with sound and picture (mp4, mkv, webm, ...), or no --clip at all to have one made"


class ClipError(ValueError):
    """A clip that cannot be used: the text names the file, what is wrong with it, and the way out."""


@dataclass(frozen=True)
class Clip:
    """The stretch of a clip for which both sound and picture were decoded."""

    path: Path
    start: float  # seconds, on the file's clock
    seconds: float
    samples: np.ndarray  # [num_samples], float32, mono, SAMPLE_RATE a second
    frames: np.ndarray  # [M, height, width, 3], uint8: the picture nearest to k / 2 seconds
    frame_times: np.ndarray  # [M], seconds after `start`: the stamps of those pictures
    notes: tuple[str, ...]


def read_clip(path: str | Path, max_seconds: float = 30.0) -> Clip:
    """Decode up to `max_seconds` of a clip; raise `ClipError` for what holds no usable sound and picture."""
    path = Path(path)
    _check_file(path)
    try:
        return _read_clip(path, max_seconds)
    except OutOfRange as error:
        raise ClipError(f"clip '{path}' holds {error}: {WAY_OUT}") from error
    except MemoryError as error:
        raise ClipError(f"clip '{path}' takes more memory than there is: {WAY_OUT}") from error


def _read_clip(path: Path, max_seconds: float) -> Clip:
    notes: list[str] = []
    with _open(path) as container:
        described = ", ".join(_describe(stream) for stream in container.streams) or "none"
        sound_streams = _usable(container.streams, "audio")
        picture_streams = _usable(container.streams, "video")
        declared = _declared_seconds(container)
    if not sound_streams:
        raise ClipError(f"clip '{path}' has no sound (its streams: {described}): {WAY_OUT}")
    if not picture_streams:
        raise ClipError(f"clip '{path}' has no picture (its streams: {described}): {WAY_OUT}")

    stop = max(begin for _, begin in sound_streams + picture_streams) + max_seconds + 1.0
    sound = _first_decodable(sound_streams, "audio", lambda index: _read_sound(path, index, stop, notes), notes)
    if sound is None:
        raise ClipError(f"clip '{path}': no sound could be decoded (its streams: {described}): {WAY_OUT}")
    samples, sound_start = sound
    sound_end = sound_start + len(samples) / SAMPLE_RATE

    picture = _first_decodable(
        picture_streams,
        "video",
        lambda index: _read_pictures(path, index, sound_start, sound_end, stop, notes),
        notes,
    )
    if picture is None:
        raise ClipError(f"clip '{path}': no picture could be decoded (its streams: {described}): {WAY_OUT}")
    frames, frame_times, start, picture_end = picture

    seconds = min(sound_end, picture_end, start + max_seconds) - start
    if seconds < SHORTEST:
        raise ClipError(
            f"clip '{path}': sound and picture together decode for {max(seconds, 0.0):.2f} s only, and at "
            f"least {SHORTEST:.0f} s is needed (sound {sound_start:.2f} to {sound_end:.2f} s, picture until "
            f"{picture_end:.2f} s): {WAY_OUT}"
        )
    if seconds < min(declared, max_seconds) - 0.5:
        notes.append(f"the file says {declared:.1f} s; sound and picture were both there for {seconds:.1f} s of it")
    num_frames = min(len(frames), round(seconds * FRAMES_PER_SECOND))
    first = round((start - sound_start) * SAMPLE_RATE)
    return Clip(
        path=path,
        start=start,
        seconds=seconds,
        samples=samples[first : first + round(seconds * SAMPLE_RATE)],
        frames=np.stack(frames[:num_frames]),
        frame_times=np.array(frame_times[:num_frames]) - start,
        notes=tuple(notes),
    )


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ClipError(f"clip '{path}' does not exist: check the path, or {WAY_OUT}")
    if not path.is_file():
        raise ClipError(f"clip '{path}' is not a file: {WAY_OUT}")
    if path.stat().st_size == 0:
        raise ClipError(f"clip '{path}' is empty (0 bytes): {WAY_OUT}")


def _open(path: Path) -> av.container.InputContainer:
    try:
        return av.open(file_url(path))
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(f"clip '{path}' cannot be read as sound or video ({reason}): {WAY_OUT}") from error


def _declared_seconds(container: av.container.InputContainer) -> float:
    """What the headers promise, which a truncated file does not keep; 0 where they say nothing."""
    promised = [0.0 if container.duration is None else container.duration / av.time_base]
    for stream in container.streams.video:
        if stream.frames and stream.average_rate:
            promised.append(float(stream.frames / stream.average_rate))
    return max(promised)


def _describe(stream: Stream) -> str:
    if stream.codec_context is None:
        return f"{stream.type} of an unknown format"
    cover = " (an attached still)" if stream.disposition & Disposition.attached_pic else ""
    return f"{stream.type} {stream.codec_context.name}{cover}"


def _usable(streams: av.container.StreamContainer, kind: str) -> list[tuple[int, float]]:
    """Index and start, in seconds, of each stream of a kind that has a decoder and is not a cover picture."""
    found = []
    for stream in streams:
        if stream.type != kind or stream.codec_context is None or stream.disposition & Disposition.attached_pic:
            continue
        begin = 0.0 if stream.start_time is None else float(stream.start_time * stream.time_base)
        found.append((stream.index, begin))
    return found


def _first_decodable(
    streams: list[tuple[int, float]], kind: str, read: Callable[[int], Read | None], notes: list[str]
) -> Read | None:
    """What `read` returns for the first stream that yields anything, or None."""
    for place, (index, _) in enumerate(streams):
        result = read(index)
        if result is not None:
            if len(streams) > 1:
                notes.append(f"{kind} stream {place + 1} of {len(streams)} is used")
            return result
    return None


def _decoded(path: Path, index: int, notes: list[str]) -> Iterator[Any]:
    """The frames of one stream; damaged packets are skipped and counted, a broken end ends it."""
    damaged = 0
    with _open(path) as container:
        stream = container.streams[index]
        stream.thread_type = "AUTO"
        limit(stream)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.error.FFmpegError:
                damaged += 1
                break
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                check(frame)
                yield frame
    if damaged:
        notes.append(f"{damaged} damaged packet(s) of stream {index} skipped")


def _read_sound(path: Path, index: int, stop: float, notes: list[str]) -> tuple[np.ndarray, float] | None:
    """Mono samples at SAMPLE_RATE and the time of the first one; holes are silent."""
    runs: list[tuple[float, list[np.ndarray]]] = []
    resampler: av.AudioResampler | None = None
    shape, expected = None, 0.0

    def drain(frame: AudioFrame | None) -> None:
        assert resampler is not None
        runs[-1][1].extend(piece.to_ndarray()[0] for piece in resampler.resample(frame))

    for frame in _decoded(path, index, notes):
        time = expected if frame.time is None else frame.time
        if time >= stop:
            break
        if resampler is None or shape != _sound_shape(frame) or abs(time - expected) > HOLE:
            if resampler is not None:
                drain(None)
            to_float = av.AudioResampler(format="flt")  # channels in turn: PyAV dies of eight planes
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
            runs.append((time, []))
            shape = _sound_shape(frame)
        for part in to_float.resample(frame):
            drain(_mono(part, math.ceil((stop - time) * frame.sample_rate)))
        expected = time + frame.samples / frame.sample_rate
    if resampler is None:
        return None
    drain(None)

    start = min(time for time, _ in runs)
    pieces = [(round((time - start) * SAMPLE_RATE), np.concatenate(run)) for time, run in runs if run]
    if not pieces:
        return None
    samples = np.zeros(max(first + len(piece) for first, piece in pieces), dtype=np.float32)
    for first, piece in pieces:
        samples[first : first + len(piece)] = piece
    return samples, start


def _mono(frame: AudioFrame, most: int) -> AudioFrame:
    """The mean of the channels, of `most` samples at most: one frame can hold hours."""
    samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)[:most].mean(1)
    mono = AudioFrame.from_ndarray(samples[None].astype(np.float32, copy=False), format="fltp", layout="mono")
    mono.sample_rate = frame.sample_rate
    return mono


def _sound_shape(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _read_pictures(
    path: Path, index: int, sound_start: float, sound_end: float, stop: float, notes: list[str]
) -> tuple[list[np.ndarray], list[float], float, float] | None:
    """The picture nearest to each k / 2 seconds after sound and picture have both begun.

    Returns the pictures, their times, the time of k = 0, and the time at which the last picture ends.
    """
    frames: list[np.ndarray] = []
    times: list[float] = []
    before: tuple[float, VideoFrame] | None = None
    start = end = 0.0
    for frame in _decoded(path, index, notes):
        time = end if frame.time is None else frame.time
        if before is None:
            start = max(time, sound_start)
        while (wanted := start + len(frames) / FRAMES_PER_SECOND) <= time and wanted < sound_end:
            nearest = (time, frame)
            if before is not None and wanted - before[0] <= time - wanted:
                nearest = before
            frames.append(_small(nearest[1]))
            times.append(nearest[0])
        before = (time, frame)
        end = time + (float(frame.duration * frame.time_base) if frame.duration else 1.0 / 25.0)
        if time >= stop:
            break
    if before is None:
        return None
    while (wanted := start + len(frames) / FRAMES_PER_SECOND) < min(end, sound_end):
        frames.append(_small(before[1]))
        times.append(before[0])
    return frames, times, start, end


def _small(frame: VideoFrame) -> np.ndarray:
    """RGB with the longer side at PICTURE_SIZE, turned the way the file asks for (telephones store it so)."""
    scale = PICTURE_SIZE / max(frame.width, frame.height)
    width, height = (max(8, round(side * scale)) for side in (frame.width, frame.height))
    picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(upright(picture, frame))
