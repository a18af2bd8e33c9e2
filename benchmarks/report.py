"""Tables in Markdown from result files: ``python benchmarks/report.py benchmarks/results/*.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """One row per measurement, ours first in each case, and the conditions below."""
    lines = ["| case | contender | median ms | quartiles | times ours | error |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        error = "–" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            f"| {row['case']} | {row['contender']} | {row['median_ms']:.3g} | {low:.3g} … {high:.3g} "
            f"| {row['times_ours']:.2g} | {error} |"
        )
    return "\n".join(lines) + "\n\n" + conditions(result["conditions"])


def conditions(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return (
        f"{facts['date']}, {facts['machine']}, {facts['cores']} cores, {facts['threads']} thread(s), "
        f"Python {facts['python']}, {versions}, commit {facts['commit']}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        print(f"### {file.stem}\n\n{table(json.loads(file.read_text()))}\n")
