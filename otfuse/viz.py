"""Pictures of a transport plan: as a heat map, as lines, and both between a spectrogram and its pictures.

Arrays or tensors in, matplotlib figures out; matplotlib is imported only when a function is called. What is
shown is the *lift* `plan / (a b)`, with `a` and `b` the plan's own row and column sums: 1 where the plan does
what it would do without looking at the tokens, more where it prefers a pair. The plan itself has entries of
about 1 / (N M) everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INK = "#333333"
MOST_LIFT = 16.0  # the heat map runs from 1 to MOST_LIFT, logarithmically
MAX_THUMBNAILS = 24


class Span(NamedTuple):
    """Something known to go on for a while, in one of the two sides."""

    start: float  # seconds
    end: float
    label: str
    colour: str


class Pair(NamedTuple):
    """A row and a column of a plan, and by how much it prefers them: 1 for the pair that it prefers most."""

    row: int
    column: int
    strength: float


def lift(plan: Any) -> np.ndarray:
    """How many times more mass a pair has than under the product of the marginals: [N, M], 0 for no mass."""
    plan = _array(plan).astype(np.float64)
    product = plan.sum(1, keepdims=True) * plan.sum(0, keepdims=True) / max(plan.sum(), np.finfo(float).tiny)
    return np.divide(plan, product, out=np.zeros_like(plan), where=product > 0)


def preferred_pairs(plan: Any) -> list[Pair]:
    """The two best pairs of each row of a plan [N, M] and the best of each column, the faintest first.

    Best is what exceeds the product of the marginals most; pairs that do not exceed it are left out.
    """
    plan = _array(plan).astype(np.float64)
    excess = plan - plan.sum(1, keepdims=True) * plan.sum(0, keepdims=True) / plan.sum()
    best = np.zeros(plan.shape, dtype=bool)
    np.put_along_axis(best, np.argsort(excess, axis=1)[:, -2:], True, axis=1)
    best[excess.argmax(0), np.arange(plan.shape[1])] = True
    rows, columns = np.nonzero(best & (excess > 1e-9 * plan.max()))
    faintest_first = np.argsort(excess[rows, columns])
    return [
        Pair(int(row), int(column), float(excess[row, column] / excess.max()))
        for row, column in zip(rows[faintest_first], columns[faintest_first], strict=True)
    ]


def plan_heatmap(
    ax: Axes,
    plan: Any,
    *,
    extent: tuple[float, float, float, float] | None = None,
    row_label: str = "x tokens",
    column_label: str = "y tokens",
) -> AxesImage:
    """Draw the lift of a plan [N, M], x tokens downwards, and return the image (for a colour bar).

    `extent` is (left, right, bottom, top) of the axes in their own units; token numbers without it.
    """
    from matplotlib.colors import LogNorm

    image = ax.imshow(
        lift(plan).clip(1.0, MOST_LIFT),
        norm=LogNorm(1.0, MOST_LIFT),
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    ax.set_xlabel(column_label)
    ax.set_ylabel(row_label)
    return image


def plan_lines(
    ax: Axes, plan: Any, row_positions: Any, column_positions: Any, *, colours: Sequence[Any] | None = None
) -> int:
    """Join x tokens (top) and y tokens (bottom) where the plan prefers a pair; returns the number of lines.

    Drawn are the pairs of :func:`preferred_pairs`; width and opacity follow their strength. `colours` gives one
    colour per row.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    tops, bottoms = _array(row_positions), _array(column_positions)
    pairs = preferred_pairs(plan)
    for row, column, strength in pairs:
        top, bottom = tops[row], bottoms[column]
        curve = Path(
            [(top, 1.0), (top, 0.5), (bottom, 0.5), (bottom, 0.0)],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        patch = PathPatch(
            curve,
            fill=False,
            edgecolor=INK if colours is None else colours[row],
            linewidth=0.5 + 2.7 * strength,
            alpha=0.15 + 0.7 * strength,
            clip_on=False,
        )
        ax.add_patch(patch)
    ax.set_ylim(0.0, 1.0)
    ax.axis("off")
    return len(pairs)


def alignment_figure(
    plan: Any,
    spectrogram: Any,
    frames: Any,
    *,
    sound_times: Any,
    picture_times: Any,
    seconds: float,
    title: str,
    caption: str = "",
    footnote: str = "",
    band_hertz: Any = None,
    sound_spans: Sequence[Span] = (),
    picture_spans: Sequence[Span] = (),
    row_colours: Sequence[Any] | None = None,
) -> Figure:
    """Spectrogram above, pictures below, the plan between them as lines and beside them as a heat map.

    Args:
        plan: [N, M], rows are sound tokens and columns pictures; None leaves lines and heat map out.
        spectrogram: [bands, windows], spread over `seconds`, low bands first; None where there is no sound.
        frames: [M, H, W, 3], uint8; none of them (M = 0) where there is no picture.
        sound_times: [N], middles of the sound tokens in seconds.
        picture_times: [M], seconds.
        seconds: length of what is shown.
        title: the line at the top; `caption` is the smaller one below it, `footnote` the one at the bottom.
        band_hertz: [bands], middle frequency of each band; without it the frequency axis has no numbers.
        sound_spans: what is known to be heard when, drawn above the spectrogram.
        picture_spans: the same for what is seen; the heat map frames the pairs of spans with equal labels.
        row_colours: one colour per sound token for its lines; by time, if not given.

    Returns:
        A figure of 16 x 9 inches; `figure.savefig(path)` gives 1600 x 900 pixels.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    sound_times, picture_times = _array(sound_times), _array(picture_times)
    if row_colours is None:
        row_colours = [colormaps["viridis"](0.9 * time / seconds) for time in sound_times]
    with rc_context(
        {
            "font.size": 13,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(16, 9), dpi=100, facecolor="white")
        # What stands between two dollar signs is no formula: these are captions and names of files.
        figure.text(0.06, 0.955, title, fontsize=22, fontweight="bold", va="center", parse_math=False)
        figure.text(0.06, 0.912, caption, va="center", parse_math=False)
        figure.text(0.06, 0.025, footnote, fontsize=11.5, va="center", parse_math=False)
        width, split = (0.64, (0.245, 0.605)) if plan is not None else (0.92, (0.4, 0.5))
        top = figure.add_axes((0.06, split[1], width, 0.84 - split[1]))
        bottom = figure.add_axes((0.06, 0.07, width, split[0] - 0.07))
        _draw_spectrogram(top, spectrogram, seconds, band_hertz, sound_spans)
        _draw_frames(bottom, _array(frames), picture_times, seconds)
        if plan is not None:
            middle = figure.add_axes((0.06, split[0], width, split[1] - split[0]))
            plan_lines(middle, plan, sound_times, picture_times, colours=row_colours)
            middle.set_xlim(0.0, seconds)
            _draw_heatmap(figure, plan, picture_times, seconds, sound_spans, picture_spans)
        for ax in (top, bottom):
            ax.set_xlim(0.0, seconds)
    return figure


def _draw_heatmap(
    figure: Figure,
    plan: Any,
    picture_times: np.ndarray,
    seconds: float,
    sound_spans: Sequence[Span],
    picture_spans: Sequence[Span],
) -> None:
    """The plan at the right of the figure, over seconds of sound and of picture, with its colour bar."""
    heat = figure.add_axes((0.765, 0.205, 0.215, 0.635))
    # A picture's column is centred on its time.
    step = (picture_times[-1] - picture_times[0]) / max(len(picture_times) - 1, 1) or seconds
    left, right = picture_times[0] - 0.5 * step, picture_times[-1] + 0.5 * step
    image = plan_heatmap(
        heat, plan, extent=(left, right, seconds, 0.0), row_label="sound (s)", column_label="picture (s)"
    )
    heat.plot([0.0, right], [0.0, right], ":", color=INK, linewidth=1.0)
    heat.set_ylim(seconds, 0.0)
    _frame_equal_spans(heat, sound_spans, picture_spans)
    bar = figure.colorbar(image, cax=figure.add_axes((0.765, 0.115, 0.215, 0.018)), orientation="horizontal")
    bar.set_ticks([1, 2, 4, 8, 16], labels=["≤ 1", "2", "4", "8", "≥ 16"])
    bar.ax.minorticks_off()
    bar.set_label("mass, in units of the plan without alignment", fontsize=11.5)


def _draw_spectrogram(ax: Axes, spectrogram: Any, seconds: float, band_hertz: Any, spans: Sequence[Span]) -> None:
    ax.xaxis.tick_top()
    ax.xaxis.set_major_formatter("{x:g} s")
    ax.tick_params(axis="x", pad=14 if spans else 1)
    if spectrogram is None:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no sound", transform=ax.transAxes, ha="center", va="center")
        return
    spectrogram = _array(spectrogram)
    num_bands = len(spectrogram)
    low, high = np.percentile(spectrogram, [5.0, 99.5])
    extent = (0.0, seconds, 0.0, float(num_bands))
    ax.imshow(
        spectrogram,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=extent,
        vmin=low,
        vmax=max(high, low + 1),
    )
    ax.set_ylabel("sound (kHz)")
    ax.set_yticks([])
    if band_hertz is not None:
        hertz = np.array([500.0, 1000.0, 2000.0, 4000.0])
        ax.set_yticks(np.interp(hertz, _array(band_hertz), np.arange(num_bands) + 0.5), ["0.5", "1", "2", "4"])
    for span in spans:
        ax.plot(
            [span.start, span.end],
            [1.05, 1.05],
            color=span.colour,
            linewidth=7,
            solid_capstyle="butt",
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )


def _frame_equal_spans(ax: Axes, rows: Sequence[Span], columns: Sequence[Span]) -> None:
    from matplotlib.patches import Rectangle

    for row in rows:
        for column in columns:
            if row.label == column.label:
                corner, width, height = (
                    (column.start, row.start),
                    column.end - column.start,
                    row.end - row.start,
                )
                ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=row.colour, linewidth=2.0))


def _draw_frames(ax: Axes, frames: np.ndarray, times: np.ndarray, seconds: float) -> None:
    """Thumbnails in two staggered rows, each hanging from its time; not all of them where they are many."""
    ax.set_ylim(0.0, 1.0)
    ax.axis("off")
    if not len(frames):
        ax.text(0.5, 0.5, "no picture", transform=ax.transAxes, ha="center", va="center")
        return
    step = -(-len(frames) // MAX_THUMBNAILS)
    shown = np.arange(0, len(frames), step)
    slot = seconds / len(shown)
    box = ax.get_window_extent()
    pixels_a_second = box.width / seconds
    height, width = frames.shape[1:3]
    wide = min(1.62 * slot, 0.41 * box.height * width / height / pixels_a_second)
    tall = wide * pixels_a_second * height / width / box.height
    ax.plot(times, np.full(len(times), 0.985), "|", color=INK, markersize=7, markeredgewidth=1.5, clip_on=False)
    for place, index in enumerate(shown):
        top = 0.93 if place % 2 == 0 else 0.93 - tall - 0.05
        ax.plot([times[index]] * 2, [0.985, top], color=INK, linewidth=1.0, zorder=0, clip_on=False)
        left, right = times[index] - 0.5 * wide, times[index] + 0.5 * wide
        ax.imshow(frames[index], extent=(left, right, top - tall, top), aspect="auto", zorder=1, clip_on=False)
    ax.set_ylim(0.0, 1.0)  # imshow has moved it


def _array(values: Any) -> np.ndarray:
    """A numpy array of an array, a list, or a tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)
