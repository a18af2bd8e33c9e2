"""Faults put into a copy of the code, one at a time: a test has to notice each. ``make mutants``.

Not collected by pytest: a mutant takes a minute or so. Words after the name of the script choose some of them. Ends
with 1 if more than one in ten goes unnoticed, or one that is not explained.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TRITON, TORCH, CPU = "otfuse/kernels/triton", "otfuse/_backends/torch/solver.py", "otfuse/_backends/cpu/kernels.py"
SURVEY, NUMERIC = "otfuse/kernels/tpc/include/survey.h", "otfuse/kernels/tpc/include/numeric.h"
RANGES = "tests/test_ranges.py"
ON_CHIP, SMALL, CLUSTER = (f"{RANGES} -k {path}" for path in ("chip", "small", "cluster"))
LARGE, LEAVE = "tests/test_triton_large.py", "tests/test_triton_large.py -k leave_the_range"


class Mutant(NamedTuple):
    name: str
    file: str
    text: str  # stands there once
    replacement: str
    tests: str  # arguments of pytest
    explained: str = ""  # why no test can notice


_FITS = "return (entries <= limit) & (with_weights <= 1.5 * limit)"
_CPU = "form = SCALING if spread <= most and spread + weights_spread <= 1.5 * most else ABSORBED"

MUTANTS = [
    *(
        Mutant(f"{path}: {what}", f"{TRITON}/rounds.py", _FITS, mutant, tests)
        for path, tests in (("cluster", CLUSTER), ("small", SMALL), ("on chip", ON_CHIP))
        for what, mutant in (
            ("always scalings", _FITS.replace("limit)", "limit + 1e30)")),
            ("range doubled", _FITS.replace("1.5 * limit", "3 * limit").replace("<= limit", "<= 2 * limit")),
            ("range x40", _FITS.replace("1.5 * limit", "60 * limit").replace("<= limit", "<= 40 * limit")),
            ("weights do not count", _FITS.replace("1.5 * limit", "1e30 * limit")),
        )
    ),
    Mutant("cluster: its weights do not count", f"{TRITON}/cluster.py", "entries + apart_ab", "entries", CLUSTER),
    Mutant("small: its weights do not count", f"{TRITON}/small.py", "with_weights += spread(b)", "with_weights += 0",
           SMALL),
    Mutant("on chip: its weights do not count", f"{TRITON}/attend.py", " + spread(a) + spread(b)", "", ON_CHIP),
    Mutant("rounds: nothing is absorbed", f"{TRITON}/rounds.py", "GROWN = tl.constexpr(256.0)",
           "GROWN = tl.constexpr(1e30)", "tests/test_accuracy.py -k triton"),
    Mutant("streaming: exponents never move", f"{TRITON}/streaming.py",
           "        scaling, exponent = apart(scaling, exponent)\n", "", LEAVE),
    Mutant("apart: no least exponent", f"{TRITON}/rounds.py", "tl.minimum(tl.maximum(grown, -126), 126)",
           "tl.minimum(grown, 126)", "tests/test_triton_rounds.py"),
    Mutant("apart: no largest exponent", f"{TRITON}/rounds.py", "tl.minimum(tl.maximum(grown, -126), 126)",
           "tl.maximum(grown, -126)", "tests/test_triton_rounds.py"),
    Mutant("apart: zero has an exponent", f"{TRITON}/rounds.py", "grown = tl.where(scaling == 0, 0, grown)",
           "grown = tl.where(scaling < 0, 0, grown)", "tests/test_triton_rounds.py"),
    Mutant("history: exponents of an item in scalings move", f"{TRITON}/streaming.py",
           "exponent = tl.where(stay, exponent, moved)", "exponent = moved", f"{LARGE} -k by_a_cost"),
    Mutant("history: exponents stay", f"{TRITON}/streaming.py",
           "exponent = tl.where(stay, exponent, moved)", "exponent = exponent + 0", f"{LARGE} -k by_a_cost"),
    Mutant("history: rounds that were not run", f"{TRITON}/streaming.py",
           "for rest in range(rounds, num_iters):", "for rest in range(num_iters, num_iters):",
           f"{LARGE} -k no_round_was_run"),
    Mutant("history: relative to the first exponents", f"{TRITON}/cluster.py",
           "                before_u, before_v = e_u, e_v\n", "", LEAVE),
    Mutant("torch: range 60", "otfuse/kernels/constants.py", "SCALING_RANGE = {4: 40.0", "SCALING_RANGE = {4: 60.0",
           f"{RANGES} -k torch"),
    Mutant("torch: weights have the whole range", TORCH, "/ (1 if uniform else 2)", "/ 1", f"{RANGES} -k torch"),
    Mutant("torch: never in one piece", TORCH, "2 * bound / epsilon <= safe", "2 * bound / epsilon <= -safe",
           "tests/test_accuracy.py -k torch",
           "The other form answers as well, and takes longer: benchmarks see it."),
    Mutant("torch: absorbs too seldom", TORCH, "ABSORB_EVERY == 0", "(40 * ABSORB_EVERY) == 0",
           "tests/test_accuracy.py tests/test_extremes.py -k torch"),
    Mutant("cpu: always scalings", CPU, _CPU, "form = SCALING", f"{RANGES} -k cpu"),
    Mutant("cpu: range doubled", CPU, _CPU, _CPU.replace("<= most", "<= 2 * most").replace("1.5", "3"),
           f"{RANGES} -k cpu"),
    Mutant("cpu: weights do not count", CPU, _CPU, _CPU.replace("1.5", "1e30"), f"{RANGES} -k cpu"),
    Mutant("cpu: nothing is absorbed", CPU, "limit = (RANGE32 if S.itemsize == 4 else RANGE64) / 2", "limit = 1e30",
           "tests/test_accuracy.py -k cpu"),
    Mutant("tpc: range doubled", NUMERIC, "MOST_SPREAD 40.0f\n#define MOST_SPREAD_WITH_WEIGHTS 60.0f",
           "MOST_SPREAD 80.0f\n#define MOST_SPREAD_WITH_WEIGHTS 120.0f", f"{RANGES} -k tpc"),
    Mutant("tpc: weights do not count", NUMERIC, "MOST_SPREAD_WITH_WEIGHTS 60.0f", "MOST_SPREAD_WITH_WEIGHTS 1e30f",
           f"{RANGES} -k tpc"),
    Mutant("tpc: sixteen rounds between folds, whatever the weights", SURVEY, "#define MOST_BITS 70.0f",
           "#define MOST_BITS 1e6f", f"{RANGES} -k tpc"),
]  # fmt: skip


def is_noticed(mutant: Mutant, folder: Path) -> bool:
    path = folder / mutant.file
    original = path.read_text()
    if original.count(mutant.text) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has {original.count(mutant.text)} of: {mutant.text}")
    path.write_text(original.replace(mutant.text, mutant.replacement))
    try:
        environment = {**os.environ, "PYTHONPATH": str(folder), "CI": "1"}
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutant.tests}"
        run = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(original)
    if run.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}")
    return run.returncode == 1


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    unnoticed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "otfuse")
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
        for mutant in chosen:
            noticed = is_noticed(mutant, folder)
            unnoticed += [] if noticed else [mutant]
            print(f"{'noticed  ' if noticed else 'UNNOTICED'} {mutant.name} {mutant.explained}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} are noticed")
    unexplained = [mutant for mutant in unnoticed if not mutant.explained]
    return int(bool(unexplained) or 10 * len(unnoticed) > len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
