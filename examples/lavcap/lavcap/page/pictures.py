"""Pictures of a clip, small enough to be inlined by the hundred: WebP and PNG as data addresses, lines as SVG."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm, to_hex
from PIL import Image

from lavcap.alignment import Alignment
from lavcap.data.decode import FRAMES_PER_SECOND
from otfuse.viz import MOST_LIFT, lift, preferred_pairs

QUALITY = 55  # of WebP
LINES_WIDE, LINES_HIGH = 1000, 120  # units of the lines' drawing


def spectrogram(alignment: Alignment) -> str:
    """Low bands below, a pixel a window and band."""
    mel = alignment.spectrogram
    assert mel is not None
    low, high = np.percentile(mel, [5.0, 99.5])
    scaled = ((mel - low) / max(high - low, 1.0)).clip(0, 1)
    return _address(colormaps["magma"](scaled[::-1])[..., :3], "WEBP")


def filmstrip(alignment: Alignment) -> str:
    """All pictures side by side."""
    return _address(np.concatenate(list(alignment.frames), axis=1) / 255, "WEBP")


def heat_map(plan: np.ndarray) -> str:
    """The lift of a plan [T, F] as in :func:`otfuse.viz.plan_heatmap`, a pixel an entry."""
    shades = LogNorm(1.0, MOST_LIFT)(lift(plan).clip(1.0, MOST_LIFT))
    return _address(colormaps["Blues"](shades)[..., :3], "PNG")


def lines(alignment: Alignment) -> str:
    """SVG paths from sound (top) to picture (bottom) for the pairs that the plan prefers."""
    assert alignment.plan is not None
    across = LINES_WIDE / alignment.seconds
    middle, bottom = LINES_HIGH // 2, LINES_HIGH
    paths = []
    for row, column, strength in preferred_pairs(alignment.plan):
        time = alignment.moment_times[row]
        x, y = round(across * time), round(across * (alignment.frame_times[column] + 0.5 / FRAMES_PER_SECOND))
        colour = to_hex(colormaps["viridis"](0.15 + 0.75 * time / alignment.seconds))
        paths.append(
            f'<path style="--s:{strength:.2f}" stroke="{colour}" d="M{x} 0C{x} {middle} {y} {middle} {y} {bottom}"/>'
        )
    return "".join(paths)


def strongest(alignment: Alignment, count: int = 3) -> list[tuple[float, float, float]]:
    """Seconds of sound, of picture, and the lift of the pairs that a plan prefers most, each sound and picture once."""
    assert alignment.plan is not None
    ratio = lift(alignment.plan)
    chosen: list[tuple[int, int]] = []
    for row, column, _ in reversed(preferred_pairs(alignment.plan)):
        if all(row != r and column != c for r, c in chosen):
            chosen.append((row, column))
    return [
        (float(alignment.moment_times[r]), float(alignment.frame_times[c]), float(ratio[r, c]))
        for r, c in chosen[:count]
    ]


def _address(colours: np.ndarray, kind: str) -> str:
    """A data address of [H, W, 3] values from 0 to 1."""
    file = io.BytesIO()
    settings = {"quality": QUALITY, "method": 6} if kind == "WEBP" else {"optimize": True}
    Image.fromarray((colours * 255).round().astype(np.uint8)).save(file, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
