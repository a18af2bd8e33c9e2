"""Result files for people: a page with pictures, a summary for a screen, what became slower.

``python -m benchmarks.report FILE… --page PAGE.md`` writes a Markdown page, the latest file first, and its pictures
into ``images/`` beside it, ``--html PAGE.html`` the same as one file that opens anywhere, ``--speed PICTURE.svg`` the
picture of the README, from the latest file. ``--compare OLD NEW`` says what became slower beyond the noise, and exits
with 1 if anything did. ``--summary`` prints a line for each case timed on a GPU, and the goals set for it.
"""

from __future__ import annotations

import argparse
import html
import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.gpu import goals
from benchmarks.results import Result, Row, by_case, compare, read, shape, where

DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SPEED = ("lavcap", 4), ("lavcap", 32), ("square", 1)  # what the picture of the README shows
INTRODUCTION = (
    "Made by `benchmarks/report.py` from the files named in the headings; times are medians, in milliseconds a call. "
    "Every answer was held against the float64 specification before anything was timed. The **error** is the distance "
    "from it over the size of what was computed; what attention adds to a token is a hundredth or so of the token, so "
    "half-precision outputs, rounded as a whole, lose a good part of it whoever computes them. **Against** says which "
    "order of iterations an answer was held against, or that it was the converged plan. The **share of the limit** is "
    "the time that a copy of the bytes that must move, or a matrix product of as many operations, would take on the "
    "same machine in the same run, over the time taken."
)
Point = tuple[float, float]  # what grows, and the time
# Up to which exponent each word holds.
WORDS = (
    (0.15, "hardly grows"),
    (0.75, "grows less than in proportion"),
    (1.25, "grows in proportion"),
    (1.75, "grows faster than in proportion"),
    (2.25, "grows with the square"),
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff }
h1, h2, h3 { line-height: 1.2; margin-top: 2em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top }
th { border-bottom: 2px solid #8c959f }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
td:nth-child(n+3) { white-space: nowrap }
figure { margin: 1rem 0 }
figure svg { max-width: 100%; height: auto }
figcaption { color: #57606a; font-size: 0.9rem }
code { background: #f2f4f6; padding: 0 0.25em }
"""


def page(results: Sequence[Result], title: str) -> list[Block]:
    blocks: list[Block] = [Heading(title, 1), Text(INTRODUCTION), *owed(results)]
    for result in results:
        blocks += of_result(result)
    return blocks


def owed(results: Sequence[Result]) -> list[Block]:
    seen = {result.conditions.get("device", "cuda" if "gpu" in result.conditions else "cpu") for result in results}
    missing = {"cuda": "an NVIDIA GPU", "hpu": "an Intel Gaudi"}
    lacking = [name for device, name in missing.items() if device not in seen]
    if not lacking:
        return []
    return [Text(f"**Owed:** no file here is of {' or of '.join(lacking)}: nothing here says how fast they are.")]


def of_result(result: Result) -> list[Block]:
    facts = result.conditions
    blocks: list[Block] = [Heading(result.name), Text(condition_line(facts))]
    blocks += [Text(line) for line in (limit_line(facts),) if line]
    blocks += by_size(result) + share(result) + accuracy(result) + memory(result) + scaling(result) + step(result)
    return blocks + everything(result) + left_out(result)


def by_size(result: Result) -> list[Block]:
    found: list[Block] = []
    titles = {
        "solve": "The solver alone: cost given, plan out",
        "attend": "sinkhorn_attend: tokens in, attended tokens out",
    }
    for op, title in titles.items():
        for grad in (None, "unroll"):
            rows = _common(result.suite(op), op, grad)
            if rows:
                name = f"{result.name}-{op}-{grad or 'forward'}"
                what = title + ("" if grad is None else ", forward and backward")
                svg = plots.bars(rows, what)
                found.append(Figure(name, f"{what}; clustered tokens, 50 iterations.", svg))
    return [Heading("Time by size", 3), *found] if found else []


def _common(rows: Sequence[Row], op: str, grad: str | None) -> list[Row]:
    """All iterations on clustered tokens, in the dtype most often workload."""
    found = list(where(rows, op=op, grad=grad, tol=None, tokens="clustered"))
    dtypes = [row["dtype"] for row in found]
    return list(where(found, dtype=max(dtypes, key=dtypes.count))) if dtypes else []


def speed(result: Result) -> str:
    """The picture of the README."""
    rows = [row for row in _common(result.suite("solve"), "solve", None) if (row["size"], row["B"]) in SPEED]
    attend = [row for row in _common(result.suite("attend"), "attend", None) if (row["size"], row["B"]) in SPEED[1:2]]
    facts = result.conditions
    clock = ", processor time" if facts.get("clock") == "processor" else ""
    where_run = f"{facts['machine']}, {facts['threads']} thread(s){clock}, {facts['date']}"
    return plots.bars(rows + attend, f"Milliseconds a call, and how many times ours\n({where_run})")


def share(result: Result) -> list[Block]:
    rows = result.suite("attend") + result.suite("solve")
    if not any(row.get("share_of_limit") is not None for row in rows):
        return []
    caption = "Share of the limit, of our fastest backend in each case."
    return [Heading("Share of the limit", 3), Figure(f"{result.name}-limit", caption, plots.shares(rows))]


def accuracy(result: Result) -> list[Block]:
    rows = result.suite("accuracy")
    blocks: list[Block] = [Heading("Error against time", 3)] if rows else []
    for epsilon in sorted({row["epsilon"] for row in rows}, reverse=True):
        of_epsilon = list(where(rows, epsilon=epsilon))
        what = f"solve {shape(of_epsilon[0])}, epsilon {epsilon:g}"
        caption = f"{what}: distance from the converged plan against time, for more and more iterations."
        blocks.append(Figure(f"{result.name}-accuracy-{epsilon:g}", caption, plots.curves(of_epsilon, what)))
        blocks.append(_to_accuracy(of_epsilon))
    return blocks


def _to_accuracy(rows: Sequence[Row]) -> Table:
    """The least time that was workload with an answer as good as that."""
    head = ["milliseconds to a distance of", *(f"{distance:g}" for distance in DISTANCES)]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = list(where(rows, contender=name))
        times = [[row["median_ms"] for row in own if row["from_converged"] <= distance] for distance in DISTANCES]
        lines.append([name, *(f"{min(found):.3g}" if found else "–" for found in times)])
    return Table(head, lines)


def memory(result: Result) -> list[Block]:
    rows = result.suite("memory")
    if not rows:
        return []
    head = ["case", "contender", "beyond MB", "arrays of [B, N, M]", "promised MB, at most", "inputs MB", "outputs MB"]
    lines = [[
        row["case"].removeprefix("memory of "), row["contender"], f"{row['extra_mb']:.2f}", f"{row['matrices']:.2f}",
        "–" if row["promised_mb"] is None else f"{row['promised_mb']:.2f}", f"{row['inputs_mb']:.2f}",
        f"{row['outputs_mb']:.2f}",
    ] for row in rows]  # fmt: skip
    caption = "The most memory held at once beyond inputs and outputs."
    figure = Figure(f"{result.name}-memory", caption, plots.memory(rows))
    return [Heading("Memory", 3), figure, Table(head, lines)]


def scaling(result: Result) -> list[Block]:
    rows = result.suite("scaling")
    blocks: list[Block] = [Heading("How time grows", 3)] if rows else []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        of_axis = list(where(rows, axis=axis))
        name = f"{result.name}-growth-{re.sub(r'[^a-z]', '', axis.lower())}"
        blocks.append(Figure(name, f"Time against {axis}.", plots.growth(of_axis, axis)))
        said = []
        for contender in dict.fromkeys(row["contender"] for row in of_axis):
            points = [(row["at"], row["median_ms"]) for row in where(of_axis, contender=contender)]
            equal = "equal" in axis and len(points) > 1
            said.append(f"`{contender}`: {largest_step(points) if equal else in_words(points, axis)}.")
        blocks.append(List(said))
    return blocks


def step(result: Result) -> list[Block]:
    rows = result.suite("step")
    if not rows:
        return []
    lines = [[
        row["contender"], f"{row['median_ms']:.3g}", f"{row['forward_ms']:.3g}", f"{row['backward_ms']:.3g}",
        f"{row['share']:.3%}",
    ] for row in rows]  # fmt: skip
    caption = (
        "Where the time of a training step of LAVCap goes; of the decoder one layer was timed, times their number."
    )
    figure = Figure(f"{result.name}-budget", caption, plots.step(rows))
    return [figure, Table(["part", "milliseconds", "forward", "backward", "share"], lines)]


def everything(result: Result) -> list[Block]:
    blocks: list[Block] = []
    for suite in dict.fromkeys(row["suite"] for row in result.rows):
        rows = [row for row in result.suite(suite) if "times_ours" in row]
        if rows:
            blocks += [Heading(f"All rows of {suite}", 3), table(rows)]
    return blocks


def table(rows: Sequence[Row]) -> Table:
    """One row per measurement, ours first in each case."""
    rated = any(row.get("share_of_limit") is not None for row in rows)
    head = ["case", "contender", "median ms", "quartiles", "times ours", "error", "against"]
    head += ["GB/s", "GFLOP/s", "share of limit"] if rated else []
    return Table(head, [_line(row, rated) for group in by_case(rows).values() for row in group])


def _line(row: Row, rated: bool) -> list[str]:
    low, high = row["quartiles_ms"]
    name = row["contender"] + (f" ({row['note']})" if row["note"] else "")
    line = [row["case"], name, f"{row['median_ms']:.3g}", f"{low:.3g} … {high:.3g}", f"{row['times_ours']:.3g}"]
    line += ["–" if row["error"] is None else f"{row['error']:.1e}", row.get("against") or "–"]
    if rated and row.get("share_of_limit") is None:
        return line + ["–"] * 3
    if rated:
        line += [f"{row[key]:.3g}" for key in ("gb_per_s", "gflop_per_s")]
        line += [f"{row['share_of_limit']:.0%} ({row['limit']})"]
    return line


def left_out(result: Result) -> list[Block]:
    blocks: list[Block] = []
    if result.absent:
        said = [
            f"{name}: {why} ({len(of)} {'case' if len(of) == 1 else 'cases'})"
            for name, reasons in result.absent.items()
            for why, of in reasons.items()
        ]
        blocks += [Heading("Absent", 3), List(said)]
    if result.not_run:
        blocks += [Heading("Not run", 3), List([f"{case}: {why}" for case, why in result.not_run.items()])]
    return blocks


def condition_line(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    gpu = ""
    if "gpu" in facts:
        clocks = ", ".join(f"{name} {value}" for name, value in (facts["gpu"]["clocks"] or {}).items())
        gpu = f"driver {facts['gpu']['driver']}, CUDA {facts['gpu']['cuda']}, {clocks or 'clocks unknown'}, "
    clock = {"processor": "processor time", "wall": "wall clock", "device": "device time"}.get(facts.get("clock"))
    said = "; ".join(text for text in (facts.get("note"), clock) if text)
    note = f" ({said})" if said else ""
    return (
        f"{facts['date']}, {facts['machine']}{note}, {gpu}{facts['cores']} cores, {facts['threads']} thread(s), "
        f"Python {facts['python']}, {versions}, commit {facts['commit'] or 'unknown'}."
    )


def limit_line(facts: dict[str, Any]) -> str:
    """What the machine reached in the same run; empty where that was not measured."""
    if not facts.get("limits"):
        return ""
    products = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in facts["limits"]["product_gflop_per_s"].items())
    copy = facts["limits"]["copy_gb_per_s"]
    return f"In the same run a copy reached {copy:.3g} GB/s, and a matrix product {products} (GFLOP/s)."


def slope(points: Sequence[Point]) -> float:
    """The exponent p of time ~ size^p, by least squares."""
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def word(exponent: float) -> str:
    return next((text for limit, text in WORDS if exponent < limit), "grows faster than with the square")


def in_words(points: Sequence[Point], axis: str) -> str:
    """Of the smaller and the larger half apart: the cost of a call shows in the one, that of the work in the other."""
    points = sorted(points)
    if len(points) < 4:
        return f"{len(points)} points are too few to tell how time grows with {axis}"
    middle = len(points) // 2
    halves = points[: middle + 1], points[middle:]
    said = []
    for half in halves:
        exponent = slope(half)
        said.append(f"{word(exponent)} from {half[0][0]:,} to {half[-1][0]:,} (time ~ ({axis})^{exponent:.2f})")
    return f"time {said[0]}, and {said[1]}"


def largest_step(points: Sequence[Point]) -> str:
    """Of work that stays the same: where the time rises most from one point to the next."""
    points = sorted(points)
    factor, before, after = max((b[1] / a[1], a[0], b[0]) for a, b in itertools.pairwise(points))
    return f"the largest step is × {factor:.2f}, from {before:,} to {after:,}"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and **strong** mean what they do in Markdown."""

    text: str


@dataclass(frozen=True)
class List:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    name: str  # of the file, without its ending
    caption: str
    svg: str


Block = Heading | Text | List | Table | Figure


def markdown(blocks: Sequence[Block], images: str) -> str:
    """``images``: the folder of the pictures, seen from the page."""
    return "\n\n".join(_markdown(block, images) for block in blocks) + "\n"


def _markdown(block: Block, images: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case List(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(head, rows):
            lines = [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in (head, *rows)]
            lines.insert(1, "|" + "---|" * min(2, len(head)) + "---:|" * (len(head) - 2))
            return "\n".join(lines)
        case Figure(name, caption, _):
            return f"![{caption}]({images}/{name}.svg)\n\n*{caption}*"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_images(blocks: Sequence[Block], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            (folder / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")


def html_page(blocks: Sequence[Block], title: str) -> str:
    """One file that needs no other."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case List(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows):
            top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
            lines = ("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f'<div class="wide"><table><tr>{top}</tr>\n' + "\n".join(lines) + "</table></div>"
        case Figure(name, caption, svg):
            return f"<figure>{_inlined(svg, name)}<figcaption>{_inline(caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # a link to another page leads nowhere from here
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _inlined(svg: str, name: str) -> str:
    """Without its prologue, and with names of its own: two pictures of one page must not share any."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument("--html", type=Path, help="HTML page to write, all in one file")
    parser.add_argument("--speed", type=Path, help="picture (SVG) to write of the main cases")
    parser.add_argument("--summary", action="store_true", help="a line for each case timed on a GPU")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what became slower")
    parser.add_argument("--all", action="store_true", help="with --compare: what stayed the same too")
    options = parser.parse_args()
    if options.compare:
        text, code = compare(*map(read, options.compare), everything=options.all)
        print(text)
        sys.exit(code)
    if not options.files:
        parser.error("no result files given")
    results = sorted((read(file) for file in options.files), key=lambda one: (one.conditions["date"], one.name))
    write(results, options)


def write(results: list[Result], options: argparse.Namespace) -> None:
    for path in (options.page, options.html, options.speed):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.page or options.html:
        blocks = page(results[::-1], "Measured")
        if options.page:
            write_images(blocks, options.page.parent / "images")
            options.page.write_text(markdown(blocks, "images"), encoding="utf-8")
        if options.html:
            options.html.write_text(html_page(blocks, "Measured"), encoding="utf-8")
    if options.speed:
        attended = [result for result in results if result.suite("attend")]
        options.speed.write_text(speed((attended or results)[-1]), encoding="utf-8")
    if options.summary:
        print("\n\n".join(goals.summary(result) for result in results))
    if not (options.page or options.html or options.speed or options.summary):
        for result in results:
            rows = [row for row in result.rows if "times_ours" in row]
            print(markdown([Heading(result.name, 3), table(rows)], ""), condition_line(result.conditions), sep="\n")


if __name__ == "__main__":
    main()
