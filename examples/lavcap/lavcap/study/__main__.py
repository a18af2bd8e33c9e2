"""Run the study, or make its page of a result file.

python -m lavcap.study run FILE.json [--machine WORDS] [--minutes M]
python -m lavcap.study page FILE.json PAGE.md
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lavcap.files import write_whole
from lavcap.study.conditions import Condition, everything
from lavcap.study.plots import write_plots
from lavcap.study.sample import SHOWN, write_sample
from lavcap.study.store import read_runs, write_runs
from lavcap.study.tables import fill_page
from lavcap.study.training import run, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run what the result file lacks")
    runs.add_argument("results", type=Path, help="written after every run")
    runs.add_argument("--machine", default=platform.machine(), help="in words, for the result file")
    runs.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after these")
    page = commands.add_parser("page", help="tables into the page, pictures into images/ beside it")
    page.add_argument("results", type=Path)
    page.add_argument("page", type=Path, help="Markdown, with a marker where each table goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        run_missing(everything(), options.results, options.machine, options.minutes)
    else:
        publish(options.results, options.page)


def publish(results: Path, page: Path) -> None:
    """Tables into the page, pictures into ``images/`` beside it; the one of a clip trains two captioners."""
    runs = read_runs(results)
    write_whole(page, fill_page(page.read_text(encoding="utf-8"), runs))
    write_plots(runs, page.parent / "images")
    write_sample(page.parent / "images" / "study-sample.svg", [trained(condition) for condition in SHOWN])


def run_missing(
    conditions: Sequence[Condition],
    results: Path,
    machine: str,
    minutes: float = float("inf"),
    one: Callable[[Condition], dict[str, Any]] = run,
) -> None:
    """Run each condition whose key the result file lacks, writing the file after each."""
    runs = read_runs(results)
    end = time.monotonic() + 60 * minutes
    missing = [condition for condition in conditions if condition.key not in runs]
    for number, condition in enumerate(missing, 1):
        if time.monotonic() > end:
            print(f"{len(missing) - number + 1} runs left for another time", flush=True)
            return
        runs[condition.key] = one(condition)
        write_runs(results, runs, environment(machine))
        print(f"{number}/{len(missing)} {condition.key}: {runs[condition.key].get('test')}", flush=True)


def environment(machine: str) -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"machine": machine, "threads": "1", "date": date.today().isoformat(), **packages}


if __name__ == "__main__":
    main()
