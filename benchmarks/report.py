"""Result files for people: tables in Markdown, a summary for a screen, plots.

``python benchmarks/report.py benchmarks/results/*.json`` prints tables; ``--summary`` a line for each case timed on a
GPU, and the limits set for it; ``--plots FOLDER`` draws time and bandwidth by batch size there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS, FORWARD_ALONE = "otfuse triton", "otfuse triton, forward alone"
SHORT = {
    "log domain, eager": "log domain",
    "specification, float32": "specification",
    "log domain, torch.compile": "compiled",
    "otfuse torch": "torch",
    "cross-attention (sdpa), no transport": "sdpa",
    "otfuse triton, all rounds": "all rounds",
    FORWARD_ALONE: "forward",
}


def table(result: dict[str, Any]) -> str:
    """One row per measurement, ours first in each case, and the conditions below."""
    on_gpu = any(row.get("share_of_copy") for row in result["rows"])
    head = ["case", "contender", "median ms", "quartiles", "times ours", "error"]
    head += ["GB/s", "share of copy"] if on_gpu else []
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *(_cells(row, on_gpu) for row in result["rows"]))]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n\n" + conditions(result["conditions"])


def _cells(row: Row, on_gpu: bool) -> list[str]:
    low, high = row["quartiles_ms"]
    error = "–" if row["error"] is None else f"{row['error']:.1e}"
    cells = [row["case"], row["contender"], f"{row['median_ms']:.3g}", f"{low:.3g} … {high:.3g}"]
    cells += [f"{row['times_ours']:.2g}", error]
    return cells + ([f"{row['gb_per_s']:.3g}", f"{row['share_of_copy']:.0%}"] if on_gpu else [])


def conditions(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    gpu = ""
    if "gpu" in facts:
        clocks = ", ".join(f"{name} {value}" for name, value in (facts["gpu"]["clocks"] or {}).items())
        gpu = f"driver {facts['gpu']['driver']}, CUDA {facts['gpu']['cuda']}, {clocks or 'clocks unknown'}, "
    return (
        f"{facts['date']}, {facts['machine']}, {gpu}{facts['cores']} cores, {facts['threads']} thread(s), "
        f"Python {facts['python']}, {versions}, commit {facts['commit'] or 'unknown'}."
    )


def summary(result: dict[str, Any]) -> str:
    """A line for each case in bfloat16, forward or unrolled; the limits; who was absent. The rest is in the tables."""
    cases: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row.get("dtype") == "bfloat16" and row["grad"] in (None, "unroll"):
            cases.setdefault(row["case"], []).append(row)
    absent = {f"absent: {name}: {why}" for row in result["rows"] for name, why in row["absent"].items()}
    copies = [row["copy_gb_per_s"] for row in result["rows"] if row["copy_gb_per_s"]]
    lines = [_case_line(rows) for rows in cases.values()] + limits(result["rows"]) + sorted(absent)[:6]
    return "\n".join(lines + [f"copy within the device: {copy:.0f} GB/s" for copy in copies[:1]])


def _case_line(rows: list[Row]) -> str:
    ours, *others = rows
    share = f" {ours['share_of_copy']:4.0%} of copy" if ours["share_of_copy"] else ""
    rest = (f"{SHORT.get(row['contender'], row['contender'].split(' ')[0])} x{row['times_ours']:.3g}" for row in others)
    return f"{ours['case'].removeprefix('attend '):52} {ours['median_ms'] * 1e3:9.2f} us{share} | {', '.join(rest)}"


def limits(rows: list[Row]) -> list[str]:
    """What was set for an H200, graph replay, bfloat16, clustered tokens and 50 rounds."""

    def found(key: str, contender: str, B: int, grad: str | None = None) -> float | None:
        wanted = ("lavcap", B, "bfloat16", grad, None, contender)
        keys = ("size", "B", "dtype", "grad", "tol", "contender")
        return next((row[key] for row in rows if tuple(row[k] for k in keys) == wanted), None)

    forward_share = found("times_ours", FORWARD_ALONE, 64, "unroll")
    time = found("median_ms", OURS, 64)
    checks = (
        ("B=64 forward, us", "<=", 15, None if time is None else 1e3 * time),
        ("B=64 forward, log domain eager over ours", ">=", 60, found("times_ours", "log domain, eager", 64)),
        ("B=64 forward, log domain compiled over ours", ">=", 5, found("times_ours", "log domain, torch.compile", 64)),
        ("B=64 unroll, with backward over forward", "<=", 3.5, None if forward_share is None else 1 / forward_share),
        ("B=1024 forward, share of copy bandwidth", ">=", 0.6, found("share_of_copy", OURS, 1024)),
    )
    return [_limit(*check) for check in checks if check[3] is not None]


def _limit(what: str, relation: str, bound: float, value: float) -> str:
    met = value <= bound if relation == "<=" else value >= bound
    return f"{'met   ' if met else 'MISSED'} lavcap {what}: {value:.3g} (H200: {relation} {bound:g})"


def plots(result: dict[str, Any], folder: Path) -> None:
    """time.svg and bandwidth.svg: the forward in bfloat16 by batch size, of the size most often measured."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in result["rows"] if (row["grad"], row["tol"], row["dtype"]) == (None, None, "bfloat16")]
    if not rows:
        return
    sizes = [row["size"] for row in rows]
    size = max(sizes, key=sizes.count)
    rows = [row for row in rows if row["size"] == size]
    _plot(folder / "time.svg", rows, "median_ms", f"{size} forward, ms", conditions(result["conditions"]))
    ours = [row for row in rows if row["contender"].startswith("otfuse") and row["share_of_copy"]]
    if ours:
        _plot(folder / "bandwidth.svg", ours, "share_of_copy", f"{size} forward, share of a copy's bandwidth", "")


def _plot(path: Path, rows: Iterable[Row], key: str, title: str, note: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        curves.setdefault(row["contender"], []).append((row["B"], row[key]))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=name)
    axes.set(xscale="log", xlabel="B", title=title)
    if key == "median_ms":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0)
    axes.legend(fontsize="small")
    figure.text(0.01, 0.01, note, fontsize=5, wrap=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--summary", action="store_true", help="a line for each case instead of tables")
    parser.add_argument("--plots", type=Path, help="folder for plots (SVG) of the last file")
    options = parser.parse_args()
    for file in options.files:
        result = json.loads(file.read_text())
        print(summary(result) if options.summary else f"### {file.stem}\n\n{table(result)}\n")
    if options.plots:
        plots(result, options.plots)


if __name__ == "__main__":
    main()
