"""The page of a report, block by block, from any set of results."""

from __future__ import annotations

import re
from collections.abc import Sequence

import plots
from blocks import Block, Figure, Heading, Items, Table, Text
from growth import in_words, largest_step
from rows import Result, Row, cases, condition_line, limit_line, shape, where

TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SPEED = ("lavcap", 4), ("lavcap", 32), ("square", 1)  # what the picture of the README shows
INTRODUCTION = (
    "Made by `benchmarks/report.py` from the files named in the headings; times are medians, in milliseconds a call. "
    "Every answer was held against the float64 specification before anything was timed. The **error** is the distance "
    "from it over the size of what was computed; what attention adds to a token is a hundredth or so of the token, so "
    "half-precision outputs, rounded as a whole, lose a good part of it whoever computes them. **Against** says which "
    "order of rounds an answer was held against, or that it was the converged plan. The **share of the limit** is the "
    "time that a copy of the bytes that must move, or a matrix product of as many operations, would take on the same "
    "machine in the same run, over the time taken."
)


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
                found.append(Figure(name, f"{what}; clustered tokens, 50 rounds.", svg))
    return [Heading("Time by size", 3), *found] if found else []


def _common(rows: Sequence[Row], op: str, grad: str | None) -> list[Row]:
    """All rounds on clustered tokens, in the dtype most often measured."""
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
    if not any(row["share_of_limit"] is not None for row in rows):
        return []
    caption = "Share of the limit, of our fastest backend in each case."
    return [Heading("Share of the limit", 3), Figure(f"{result.name}-limit", caption, plots.shares(rows))]


def accuracy(result: Result) -> list[Block]:
    rows = result.suite("accuracy")
    blocks: list[Block] = [Heading("Error against time", 3)] if rows else []
    for epsilon in sorted({row["epsilon"] for row in rows}, reverse=True):
        of_epsilon = list(where(rows, epsilon=epsilon))
        what = f"solve {shape(of_epsilon[0])}, epsilon {epsilon:g}"
        caption = f"{what}: distance from the converged plan against time, for more and more rounds."
        blocks.append(Figure(f"{result.name}-accuracy-{epsilon:g}", caption, plots.curves(of_epsilon, what)))
        blocks.append(_to_accuracy(of_epsilon))
    return blocks


def _to_accuracy(rows: Sequence[Row]) -> Table:
    """The least time that was measured with an answer as good as that."""
    head = ["milliseconds to a distance of", *(f"{target:g}" for target in TARGETS)]
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = list(where(rows, contender=name))
        times = [[row["median_ms"] for row in own if row["from_converged"] <= target] for target in TARGETS]
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
        blocks.append(Items(said))
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
    rated = any(row["share_of_limit"] is not None for row in rows)
    head = ["case", "contender", "median ms", "quartiles", "times ours", "error", "against"]
    head += ["GB/s", "GFLOP/s", "share of limit"] if rated else []
    return Table(head, [_line(row, rated) for group in cases(rows).values() for row in group])


def _line(row: Row, rated: bool) -> list[str]:
    low, high = row["quartiles_ms"]
    name = row["contender"] + (f" ({row['note']})" if row["note"] else "")
    line = [row["case"], name, f"{row['median_ms']:.3g}", f"{low:.3g} … {high:.3g}", f"{row['times_ours']:.3g}"]
    line += ["–" if row["error"] is None else f"{row['error']:.1e}", row.get("against") or "–"]
    if rated and row["share_of_limit"] is None:
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
        blocks += [Heading("Absent", 3), Items(said)]
    if result.not_run:
        blocks += [Heading("Not run", 3), Items([f"{case}: {why}" for case, why in result.not_run.items()])]
    return blocks
