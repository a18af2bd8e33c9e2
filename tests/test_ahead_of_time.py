"""What the Triton kernels take of every GPU, compiled without one: a sample of every path."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.compiler import packed, streaming, table  # noqa: E402
from benchmarks.compiler.table import Resources, Row  # noqa: E402
from otfuse._backends.triton.configurations import CLASSES, size_class  # noqa: E402
from otfuse._backends.triton.paths import fits_on_chip, tile_side  # noqa: E402

ROOT = Path(__file__).parents[1]
BEYOND_CHIP = {*streaming.LAUNCHES, *packed.LONG}

# Compiled anew: every launch, dtype, class and target at least once; beyond the chip, every kernel that has a tile.
SAMPLE = (
    Row("forward", "bfloat16", (64, 32), "sm_90"),
    Row("forward", "bfloat16", (128, 128), "sm_100"),
    Row("forward", "float16", (128, 64), "sm_80"),
    Row("forward", "float64", (64, 64), "sm_90"),
    Row("forward, inference", "bfloat16", (64, 32), "sm_100"),
    Row("forward, everything", "float32", (64, 32), "gfx942"),
    Row("forward, cost", "float32", (128, 128), "sm_100"),
    Row("backward", "float32", (64, 32), "sm_80"),
    Row("backward", "float16", (16, 16), "sm_90"),
    Row("backward, implicit", "bfloat16", (64, 32), "sm_90"),
    Row("backward, cost", "float32", (64, 32), "sm_80"),
    Row("similarity", "float64", (64, 64), "gfx942"),
    Row("small", "float32", (4, 4), "sm_90"),
    Row("small, inference", "float32", (4, 4), "sm_90"),
    Row("small, everything", "float64", (2, 2), "sm_80"),
    Row("small, backward", "bfloat16", (4, 4), "sm_100"),
    Row("small, backward, everything", "float32", (8, 8), "gfx942"),
    Row("loss", "float32", (32, 32), "sm_90"),
    Row("loss, backward", "bfloat16", (32, 32), "sm_100"),
    Row("streaming: strip, tokens", "bfloat16", (32, 64), "sm_90"),
    Row("streaming: plan, cost", "float16", (16, 256), "sm_100"),
    Row("streaming: attend, similarity", "float32", (32, 32), "sm_80"),
    Row("streaming, backward: start", "bfloat16", (32, 32), "sm_100"),
    Row("streaming, backward: round, similarity", "float32", (16, 256), "gfx942"),
    Row("streaming, backward: cost", "float32", (16, 256), "sm_90"),
    Row("streaming, backward: pull, tokens", "float16", (32, 32), "sm_80"),
    Row("packed", "bfloat16", (64, 32), "sm_90"),
    Row("packed, backward", "float32", (64, 32), "sm_80"),
    Row("packed: matrix", "float32", (16, 64), "sm_90"),
    Row("cluster, inference", "float32", (256, 256), "sm_90"),
    Row("cluster", "float32", (512, 16), "sm_80"),
    Row("cluster, everything", "float32", (256, 256), "sm_100"),
    Row("cluster, backward", "float32", (128, 256), "sm_90"),
    Row("packed, long: table", "float32", (64, 64), "sm_90"),
    Row("packed, long: similarity", "bfloat16", (32, 64), "gfx942"),
    Row("packed, long: strip, similarity", "float32", (16, 256), "sm_90"),
    Row("packed, long: attend, similarity", "bfloat16", (64, 64), "sm_80"),
    Row("packed, long, backward: round, similarity", "float32", (16, 256), "sm_100"),
    Row("packed, long, backward: pull, similarity", "bfloat16", (32, 32), "sm_90"),
)

# Of the intermediate code of every kernel: lines with what the number of an element becomes first, and with atomics.
READ = """
import json, re
from benchmarks.compiler import packed, table
found = {}
for name, launch in table.LAUNCHES.items():
    row = table.typical_row(name)
    options, constants = table.launched_with(launch, table.configured(row))
    code = table.intermediate(table.source(launch, row.dtype, constants), table.TARGETS[row.target], options)
    (element,) = re.findall(r"(%[0-9]+) = tt.get_program_id x", code)
    if name in packed.LONG:
        element = "(?:" + "|".join(re.findall(r"(%[0-9]+) = tt.load %[0-9]+ : !tt.ptr<i32>", code)) + ")"
    uses = [line.strip() for line in code.splitlines() if re.search(element + r"\\b(?! =)", line)]
    found[name] = uses, [line for line in code.splitlines() if "atomic" in line]
print(json.dumps(found))
"""

COMPILE = """
import json, sys
from benchmarks.compiler.table import Row, compile_rows
rows = [Row(launch, dtype, tuple(tile), target) for launch, dtype, tile, target in json.loads(sys.argv[1])]
if __name__ == "__main__":
    print(json.dumps(list(compile_rows(rows, json.loads(sys.argv[2])))))
"""


def elsewhere(script, *arguments):
    """What a script prints in a process of its own: where the interpreter is on, there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *map(json.dumps, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compile_elsewhere(rows, configuration=None):
    found = elsewhere(COMPILE, rows, configuration and [configuration] * len(rows))
    return [result if isinstance(result, str) else Resources(*result) for result in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("launch", ["forward", "forward, inference", "forward, cost"])
def test_every_tile_that_is_launched_is_in_the_table(launch, dtype):
    """Of tokens, or of a cost, for whatever N and M stay on chip."""
    sizes = [1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257]
    launched = {
        (tile_side(N), tile_side(M))
        for N, M in itertools.product(sizes, sizes)
        if fits_on_chip(N, M, 0 if launch == "forward, cost" else 2, dtype)
    }
    assert launched == set(table.tiles(launch, str(dtype).removeprefix("torch."))) and len(launched) > 8


def test_the_sample_covers_everything_once():
    rows = table.rows()
    assert set(SAMPLE) <= set(rows)
    for field in ("dtype", "target"):
        assert {getattr(row, field) for row in SAMPLE} == {getattr(row, field) for row in rows}
    assert {row.launch for row in SAMPLE} - BEYOND_CHIP == {row.launch for row in rows} - BEYOND_CHIP
    tiles = {of.kernel for of in streaming.LAUNCHES.values() if of.configured not in ("lines", "norms")}
    assert {table.LAUNCHES[row.launch].kernel for row in SAMPLE} >= tiles
    on_chip = [row for row in SAMPLE if row.launch.startswith(("forward", "backward"))]
    sizes = {size_class("forward", row.dtype, *row.tile) for row in on_chip}
    assert sizes == {size for dtype in CLASSES["forward"].values() for size in dtype}


def test_the_sample_compiles_and_no_forward_spills():
    found = compile_elsewhere(SAMPLE)
    assert not [line for pair in zip(SAMPLE, found) for line in table.problems(*pair)]


def test_elements_are_counted_in_64_bits_and_nothing_is_atomic():
    """In every kernel: B N D may pass 2^31, and a sum of floats has one order.

    But for the table of packed elements, which counts elements, programs and tokens; who reads it widens what is read.
    """
    found = elsewhere(READ)
    assert set(found) == set(table.LAUNCHES)
    for name, (uses, _) in found.items():
        if name == "packed, long: table":
            continue
        widened = ["arith.extsi" in use and "to i64" in use for use in uses]
        # Where a program is a piece of an element, which one it is comes off the number first.
        assert widened and (any if name in BEYOND_CHIP else all)(widened), (name, uses)
    assert not [name for name, (_, atomics) in found.items() if atomics]


def test_a_bad_configuration_is_reported():
    row = Row("forward", "bfloat16", (64, 64), "sm_90")
    bad = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 1, "num_stages": 2}  # a tile in one warp
    (found,) = compile_elsewhere([row], bad)
    assert found.spills > 0
    assert table.problems(row, found) == [f"{row}: {found.spills} bytes spilled, in a forward kernel"]
    too_much = found._replace(spills=0, shared=300 * 1024)
    assert "shared memory" in table.problems(row, too_much)[0]
