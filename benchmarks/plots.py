"""The pictures of a report, as SVG: time by size, shares of the limit, error against time, growth, memory."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.results import Row, by_case, is_ours, shape

COLOURS = {
    "otfuse cpu": "#0b5fff", "otfuse triton": "#0b5fff", "otfuse tpc": "#0b5fff", "otfuse torch": "#6aa0ff",
    "POT ot.batch sinkhorn": "#d1495b", "POT loop, numpy": "#e39aa4", "geomloss solve_batch": "#8f5aa8",
    "ott-jax vmap + jit, kernel mode": "#2e933c", "log domain, eager": "#7d8597",
    "per-element log-domain loop": "#3d3d3d", "log domain, torch.compile": "#b08900",
    "batched scaling loop, bmm": "#00a6a6", "flash-sinkhorn": "#ff7f0e", "Liger-Kernel mHC": "#a0522d",
    "cross-attention (sdpa), no transport": "#c9ada7", "three matrix products alone": "#dfe3e8",
}  # fmt: skip
WORSE = 100  # times our error: no longer the same answer
SETTINGS = {
    "svg.hashsalt": "otfuse", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip


def _styled(picture: Callable[..., str]) -> Callable[..., str]:
    """Settings for the time of a picture: whoever draws in the same process afterwards has their own."""

    @functools.wraps(picture)
    def drawn(*args: Any, **options: Any) -> str:
        import matplotlib

        with matplotlib.rc_context(SETTINGS):
            return picture(*args, **options)

    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def colour(contender: str) -> str:
    return COLOURS.get(contender, "#999999")


@_styled
def bars(rows: Sequence[Row], title: str, most: int = 6) -> str:
    """Median time of everybody in each case, and the quartiles: ours on top, then in the order of time."""
    groups = list(by_case(rows).values())[:most]
    entries = []  # (position, row)
    position = 0.0
    for group in groups:
        ours, *others = group
        ordered = [ours, *sorted(others, key=lambda row: (not is_ours(row), row["median_ms"]))]
        entries += [(position + index, row) for index, row in enumerate(ordered)]
        position += len(ordered) + 1.6
    figure, axes = _figure(8.6, 0.9 + 0.19 * position)
    smallest, largest = (f(row["median_ms"] for _, row in entries) for f in (min, max))
    for at, row in entries:
        median, (low, high) = row["median_ms"], row["quartiles_ms"]
        axes.barh(at, median, color=colour(row["contender"]), height=0.8)
        axes.plot([low, high], [at, at], color="black", linewidth=0.8)
        times = _beside(row, next(group[0] for group in groups if group[0]["case"] == row["case"]))
        axes.text(max(median, high) * 1.06, at, f"{median:.3g} ms{times}", va="center", fontsize=7.5)
    axes.set_yticks([at for at, _ in entries], [row["contender"] for _, row in entries], fontsize=7.5)
    for group in groups:
        top = next(at for at, row in entries if row["case"] == group[0]["case"])
        axes.text(smallest * 0.72, top - 1.05, _heading(group[0]), fontsize=8.5, fontweight="bold", va="center")
    axes.set(xscale="log", xlim=(smallest * 0.7, largest * 4), xlabel="milliseconds a call, median; line: quartiles")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(position - 1.2, -1.9)
    axes.grid(axis="x", color="#e6e8eb")
    return _svg(figure)


def _beside(row: Row, ours: Row) -> str:
    """How many times ours, and how far off, where that is another accuracy."""
    if row is ours:
        return ""
    far = row["error"] is not None and ours["error"] is not None and row["error"] > WORSE * ours["error"]
    off = f", off by {row['error']:.0e}" if far else ""
    return f" ({row['times_ours']:.3g} ×{off})"


def _heading(row: Row) -> str:
    kind = {"attend": "attend", "solve": "solve"}[row["op"]]
    grad = f", with {row['grad']} gradient" if row["grad"] else ""
    return f"{kind} {row['size']} {shape(row)}, {row['dtype']}{grad}"


@_styled
def shares(rows: Sequence[Row]) -> str:
    """Of our fastest in each case: the time that copy or product alone would take, over the time taken."""
    ours = [
        group[0] for group in by_case(rows).values() if is_ours(group[0]) and group[0].get("share_of_limit") is not None
    ]
    figure, axes = _figure(8.6, 1.0 + 0.2 * len(ours))
    kinds = {"copy": "#0b5fff", "product": "#f2a541"}
    for at, row in enumerate(ours):
        share = row["share_of_limit"]
        axes.barh(at, share, color=kinds[row["limit"]], height=0.75)
        axes.text(share + 0.01, at, f"{share:.0%}", va="center", fontsize=7.5)
    for kind, colour_of in kinds.items():
        axes.barh(0, 0, color=colour_of, label=f"bound by the {'copy' if kind == 'copy' else 'matrix product'}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ours)), [f"{_heading(row)}{_stop(row)}" for row in ours], fontsize=7.5)
    axes.set(xlabel="share of the limit, which was workload in the same run")
    axes.set_xlim(0, max(1.1, *(row["share_of_limit"] + 0.1 for row in ours)))
    axes.set_ylim(len(ours) - 0.4, -0.6)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    axes.grid(axis="x", color="#e6e8eb")
    return _svg(figure)


def _stop(row: Row) -> str:
    stop = "" if row["tol"] is None else f", tol {row['tol']:g}"
    return stop + ("" if row["tokens"] == "clustered" else f", {row['tokens']} tokens")


@_styled
def curves(rows: Sequence[Row], title: str) -> str:
    """Distance from the converged plan against time, a point for each number of iterations."""
    figure, axes = _figure(9.4, 4.6)
    for name, points in by_case(rows, "contender").items():
        points = sorted(points, key=lambda row: row["iterations"])
        across, up = ([row[key] for row in points] for key in ("median_ms", "from_converged"))
        ours = name.startswith("otfuse")
        axes.plot(across, up, marker="o", markersize=4, color=colour(name), label=name, linewidth=2.2 if ours else 1.2)
        if points and name == rows[0]["contender"]:
            for row in points:
                where = (row["median_ms"], row["from_converged"])
                axes.annotate(f"{row['iterations']:g}", where, (-4, -11), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds a call, median (beside our points: iterations)")
    axes.set_ylabel("distance from the converged plan, of its size")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#e6e8eb")
    figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)
    return _svg(figure)


@_styled
def growth(rows: Sequence[Row], axis: str) -> str:
    """Time against what grows."""
    figure, axes = _figure(8, 3.8)
    for name, points in by_case(rows, "contender").items():
        points = sorted(points, key=lambda row: row["at"])
        across, up = ([row[key] for row in points] for key in ("at", "median_ms"))
        low, high = ([row["quartiles_ms"][side] for row in points] for side in (0, 1))
        axes.fill_between(across, low, high, color=colour(name), alpha=0.15, linewidth=0)
        axes.plot(across, up, marker="o", markersize=4, color=colour(name), label=name)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="milliseconds a call (band: quartiles)")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["at"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    _label_milliseconds(axes)
    axes.set_title(f"Time against {axis}: {_fixed(rows[0], axis)}", loc="left", fontsize=10)
    axes.grid(color="#e6e8eb")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _label_milliseconds(axes: Any) -> None:
    """1, 2 and 5 of a decade where there are few decades, since one label says nothing of a scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,g}"))


def _fixed(row: Row, axis: str) -> str:
    """What does not grow."""
    names = [name for name in ("B", "N", "M", "D") if name not in axis and (name != "D" or row["op"] == "attend")]
    values = [f"{name} = {row[name]}" for name in names]
    return ", ".join([row["op"], *values, row["dtype"]])


@_styled
def memory(rows: Sequence[Row]) -> str:
    """What is held at once beyond inputs and outputs, in arrays of [B, N, M]."""
    groups = list(by_case(rows).values())
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = _figure(8.6, 0.9 + 0.2 * len(rows))
    at, ticks, drawn = 0.0, [], set()
    for group in groups:
        for row in group:
            name = row["contender"]
            axes.barh(at, row["matrices"], color=colour(name), height=0.8, label=None if name in drawn else name)
            axes.text(row["matrices"] + 0.02, at, f" {row['matrices']:.1f}", va="center", fontsize=7.5)
            ticks.append((at, f"{_heading(row)}{_stop(row)}" if row is group[0] else ""))
            drawn.add(name)
            at += 1
        at += 0.7
    axes.set_yticks(*zip(*ticks), fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="symlog", xlabel="arrays of [B, N, M] in float32 held at once, beyond inputs and outputs")
    axes.set_xlim(0, 3 * max(row["matrices"] for row in rows) + 1)
    axes.set_ylim(at - 1, -0.8)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    axes.grid(axis="x", color="#e6e8eb")
    return _svg(figure)


@_styled
def step(rows: Sequence[Row]) -> str:
    """Milliseconds of each part of a training step, forward and backward, and its share of their sum."""
    figure, axes = _figure(8.6, 1.2 + 0.36 * len(rows))
    for at, row in enumerate(rows):
        forward, whole = row["forward_ms"], max(row["median_ms"], 1e-3)
        transport = row["contender"].startswith("OT")
        axes.barh(at, whole, color="#9dbdff" if transport else "#d5d9e0", height=0.7)
        axes.barh(at, min(forward, whole), color="#0b5fff" if transport else "#7d8597", height=0.7)
        label = f"{_time(row['median_ms'])}, {_percent(row['share'])}" if row["median_ms"] > 0 else "within the noise"
        axes.text(whole * 1.1, at, label, va="center", fontsize=8)
    names = [row["contender"] + (f" (one, × {row['times']})" if row["times"] > 1 else "") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    times = [row["median_ms"] for row in rows]
    axes.set(xscale="log", xlabel="milliseconds in a step, logarithmic; dark: forward, light: backward")
    axes.set_xlim(max(1e-3, min(times) / 3), 12 * max(times))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(f"A training step of LAVCap, batch {rows[0]['batch']}: blue is transport", loc="left", fontsize=10)
    axes.grid(axis="x", color="#e6e8eb")
    return _svg(figure)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
