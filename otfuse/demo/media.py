"""What every decoder of media files needs: a name that FFmpeg takes for a file, sizes it can bear, upright pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

MOST_PIXELS = 1 << 26  # of a picture: 8192 x 8192
LOWEST_RATE = 1000  # samples of sound a second; resampling makes 16 of each, and more of each below


class OutOfRange(ValueError):
    """A file asks for more than is good for the machine; the text says what it holds and what is read."""


def file_url(path: Path) -> str:
    """For FFmpeg, which takes what comes before a colon in a plain name for a protocol."""
    return f"file:{os.path.abspath(path)}"


def limit(stream: Any) -> None:
    """Before a stream is decoded: refuse pictures above MOST_PIXELS, or skip them where the size changes midway.

    Raises:
        OutOfRange: the stream's header names such a size.
    """
    if stream.type == "video":
        _check_pixels(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}


def check(frame: Any) -> None:
    """Raise :class:`OutOfRange` for a frame of too many pixels, or of sound of too low a rate."""
    if hasattr(frame, "sample_rate"):
        if frame.sample_rate < LOWEST_RATE:
            raise OutOfRange(f"sound of {frame.sample_rate} samples a second, of which {LOWEST_RATE} at least are read")
    else:
        _check_pixels(frame.width, frame.height)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise OutOfRange(f"pictures of {width} x {height} pixels, of which {MOST_PIXELS:,} at most are read")


def upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """A frame's picture [H, W, 3] turned and mirrored as its file asks, as FFmpeg's ``autorotate`` does.

    The file's display matrix sends a point (x, y) to (a x + c y, b x + d y); what lies between two quarter turns goes
    to the nearer one.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return picture
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(stored), np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):  # x becomes y
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
