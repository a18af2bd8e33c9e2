"""Result file to pictures (SVG): the arms, how they learn, the sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavcap.study.ceilings import OBSERVERS, ceiling
from lavcap.study.conditions import Condition, arms, sweeps
from lavcap.study.statistics import estimate
from lavcap.study.store import Runs
from lavcap.study.tables import FUSION_NAMES, LOSS_NAMES, by_seed, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"none": "#777777", "similarity": "#1f6fb4", "assignment": "#c8571b"}
LIMITS = ("sound alone", "both, without times", "both, each in its own order")


def write_plots(runs: Runs, folder: Path) -> list[Path]:
    """``study-arms.svg``, ``study-learning.svg`` and ``study-sweeps.svg`` in ``folder``."""
    from matplotlib import rc_context

    drawn: dict[str, Callable[[Runs], Figure]] = {"arms": plot_arms, "learning": plot_learning, "sweeps": plot_sweeps}
    folder.mkdir(parents=True, exist_ok=True)
    # Ids drawn from a fixed salt, and no date: the same runs give the same file.
    with rc_context({"svg.hashsalt": "lavcap", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        for name, draw in drawn.items():
            draw(runs).savefig(folder / f"study-{name}.svg", metadata={"Date": None})
    return [folder / f"study-{name}.svg" for name in drawn]


def plot_arms(runs: Runs) -> Figure:
    """Pair accuracy of every arm: a dot a seed, mean and 95 % interval beside them, and the task's ceilings."""
    figure, (ax,) = _figure(9, 5.2)
    for limit in LIMITS:
        share = float(ceiling(OBSERVERS[limit]).pair)
        ax.axvline(100 * share, color="#bbbbbb", linewidth=1, linestyle="--", zorder=0)
        ax.annotate(limit, (100 * share, -0.75), (0, 4), textcoords="offset points", rotation=30, fontsize=8)
    rows = arms()
    for row, arm in enumerate(rows):
        values = [100 * value for value in by_seed(runs, arm, "pair").values()]
        _dots(ax, values, row, COLOURS[arm.loss], upright=False)
    ax.set_yticks(range(len(rows)), [f"{FUSION_NAMES[a.fusion].replace('`', '')}; {LOSS_NAMES[a.loss]}" for a in rows])
    ax.set_ylim(len(rows) - 0.5, -0.75)
    ax.set_xlim(0, 100)
    ax.set_xlabel("pairs of object and sound named right, at their place (% of test clips' parts)")
    return figure


def plot_learning(runs: Runs) -> Figure:
    """Cross-entropy while training, by fusion and loss, mean over seeds."""
    fusions = ("concatenation", "cross_attention", "plan", "barycentric")
    figure, axes = _figure(11, 3.2, 4, share=True)
    for ax, fusion in zip(axes, fusions):
        for loss, colour in COLOURS.items():
            curves = [_curve(runs[key]) for key in _keys(runs, Condition(fusion, loss))]
            if curves:
                steps = [step for step, _ in curves[0]]
                means = [sum(values) / len(values) for values in zip(*([y for _, y in curve] for curve in curves))]
                ax.plot(steps, means, color=colour, label=LOSS_NAMES[loss])
        ax.set_title(FUSION_NAMES[fusion].replace("`", ""), fontsize=10)
        ax.set_xlabel("step")
    axes[0].set_ylabel("cross-entropy, one batch")
    if axes[-1].lines:
        axes[-1].legend(title="OT loss", frameon=False)
    return figure


def plot_sweeps(runs: Runs) -> Figure:
    """Pair accuracy over what was swept, a dot a seed, mean and 95 % interval."""
    figure, axes = _figure(11, 3.2, len(sweeps()), share=True)
    for ax, (name, conditions) in zip(axes, sweeps().items()):
        for place, one in enumerate(conditions):
            values = [100 * value for value in by_seed(runs, one, "pair").values()]
            _dots(ax, values, place, COLOURS[one.loss], upright=True)
        ax.set_xticks(range(len(conditions)), [value_of(one, name) for one in conditions])
        ax.set_xlim(-0.5, len(conditions) - 0.5)
        ax.set_ylim(0, 100)
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("pairs named right (%)")
    return figure


def _dots(ax: Axes, values: Sequence[float], place: int, colour: str, *, upright: bool) -> None:
    """Seeds as dots, beside them mean and interval; nothing where nothing was run."""
    if not values:
        return
    mean, half, count = estimate(values)
    beside = [place + 0.22] * count
    dots, centre = (beside, values) if upright else (values, beside), (place - 0.1, mean)
    ax.plot(*dots, "o", color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0)
    x, y = centre if upright else centre[::-1]
    half = 0.0 if count == 1 else half
    ax.errorbar(
        x,
        y,
        yerr=half if upright else None,
        xerr=None if upright else half,
        fmt="s",
        color=colour,
        markersize=5,
        capsize=3,
        linewidth=1.3,
    )


def _curve(run: dict[str, Any]) -> list[tuple[int, float]]:
    return [(step, cross_entropy) for step, cross_entropy, _ in run["losses"]]


def _keys(runs: Runs, condition: Condition) -> list[str]:
    return [key for seed in by_seed(runs, condition, "pair") if (key := replace(condition, seed=seed).key) in runs]


def _figure(width: float, height: float, panels: int = 1, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=share, squeeze=False).flat)
