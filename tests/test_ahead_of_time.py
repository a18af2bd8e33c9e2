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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ahead_of_time  # noqa: E402
from ahead_of_time import Resources, Row  # noqa: E402
from variants_packed import LONG  # noqa: E402
from variants_streaming import VARIANTS as STREAMING  # noqa: E402

from otfuse._backends.triton import configurations  # noqa: E402
from otfuse._backends.triton.paths import fits_on_chip, tile_side  # noqa: E402

ROWS = ahead_of_time.rows()

# Compiled anew: every variant, dtype, class and target at least once; beyond the chip, every kernel that holds a tile.
ANEW = (
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

# Of the intermediate code of every kernel: lines with what the number of an item becomes first, and with atomics.
READ = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import ahead_of_time
from ahead_of_time import Row, TARGETS, VARIANTS
from ahead_of_time import intermediate
from variants_packed import LONG
found = {}
for name, variant in VARIANTS.items():
    dtype = "bfloat16" if ahead_of_time.tiles(name, "bfloat16") else "float32"
    on_chip = name not in ahead_of_time.FAMILY_OF
    tile = ((32, 32) if "loss" in name else (64, 32)) if on_chip else ahead_of_time.tiles(name, dtype)[0]
    row = Row(name, dtype, tile, "sm_90")
    options, constants = ahead_of_time.launched_with(variant, ahead_of_time.configured(row))
    code = intermediate(ahead_of_time.source(variant, row.dtype, constants), TARGETS[row.target], options)
    (item,) = re.findall(r"(%[0-9]+) = tt.get_program_id x", code)
    if name in LONG:
        item = "(?:" + "|".join(re.findall(r"(%[0-9]+) = tt.load %[0-9]+ : !tt.ptr<i32>", code)) + ")"
    uses = [line.strip() for line in code.splitlines() if re.search(item + r"\\b(?! =)", line)]
    found[name] = uses, [line for line in code.splitlines() if "atomic" in line]
print(json.dumps(found))
"""

COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ahead_of_time
rows = json.loads(sys.argv[2])
wanted = [ahead_of_time.Row(variant, dtype, tuple(tile), target) for variant, dtype, tile, target in rows]
if __name__ == "__main__":
    print(json.dumps(list(ahead_of_time.compile_rows(wanted, json.loads(sys.argv[3])))))
"""


def elsewhere(script, *arguments):
    """What a script prints in a process of its own: where the interpreter is on, there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, str(ROOT / "benchmarks"), *map(json.dumps, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compile_elsewhere(rows, configuration=None):
    found = elsewhere(COMPILE, rows, configuration and [configuration] * len(rows))
    return [result if isinstance(result, str) else Resources(*result) for result in found]


def test_the_table_covers_every_kernel_dtype_class_and_target():
    for kernel, dtypes in configurations.CLASSES.items():
        for dtype, sizes in dtypes.items():
            found = {
                (row.target, configurations.size_class(kernel, dtype, *row.tile))
                for row in ROWS
                if ahead_of_time.VARIANTS[row.variant].configured == kernel and row.dtype == dtype
            }
            assert found == {(target, size) for target in ahead_of_time.TARGETS for size in sizes}, (kernel, dtype)


def test_many_small_costs_are_in_the_table_in_every_class():
    """Every dtype, side and target of both kernels; and in float32 every pair of sides forward."""
    rows = set(ROWS)
    for target in ahead_of_time.TARGETS:
        for dtype in ahead_of_time.DTYPES:
            for side in (2, 4, 8, 16):
                assert {Row(name, dtype, (side, side), target) for name in ("small", "small, backward")} <= rows
        assert {Row("small", "float32", (N, M), target) for N in (2, 4, 8, 16) for M in (2, 4, 8, 16)} <= rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["forward", "forward, inference", "forward, cost"])
def test_every_tile_that_is_launched_is_in_the_table(variant, dtype):
    """Of tokens, or of a cost, for whatever N and M stay on chip."""
    sizes = [1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257]
    launched = {
        (tile_side(N), tile_side(M))
        for N, M in itertools.product(sizes, sizes)
        if fits_on_chip(N, M, 0 if variant == "forward, cost" else 2, dtype)
    }
    wanted = variant, str(dtype).removeprefix("torch.")
    for target in ahead_of_time.TARGETS:
        assert launched == {row.tile for row in ROWS if row[:2] == wanted and row.target == target}
    assert len(launched) > 8


def test_the_subset_covers_everything_once():
    for field in ("dtype", "target"):
        assert {getattr(row, field) for row in ANEW} == {getattr(row, field) for row in ROWS}
    beyond = {*STREAMING, *LONG}
    on_chip = {row.variant for row in ROWS} - beyond
    assert {row.variant for row in ANEW} - beyond == on_chip
    tiles = [v.kernel for v in STREAMING.values() if v.configured not in ("lines", "norms")]
    assert {ahead_of_time.VARIANTS[row.variant].kernel for row in ANEW} >= set(tiles)
    forward = [row for row in ANEW if row.variant.startswith(("forward", "backward"))]
    sizes = {configurations.size_class("forward", row.dtype, *row.tile) for row in forward}
    assert sizes == {size for dtype in configurations.CLASSES["forward"].values() for size in dtype}
    assert set(ANEW) <= set(ROWS)


def test_compiled_anew():
    found = compile_elsewhere(ANEW)
    wrong = [line for pair in zip(ANEW, found) for line in ahead_of_time.problems(*pair)]
    assert not wrong


def test_items_are_counted_in_64_bits_and_nothing_is_atomic():
    """In every kernel: B N D may pass 2^31, and a sum of floats has one order.

    But for the table of packed items, which counts items, programs and tokens; who reads it widens what is read.
    """
    found = elsewhere(READ)
    assert set(found) == set(ahead_of_time.VARIANTS)
    for name, (uses, _) in found.items():
        if name == "packed, long: table":
            continue
        widened = ["arith.extsi" in use and "to i64" in use for use in uses]
        # Where a program is a piece of an item, which one it is comes off the number first.
        assert widened and (any if name in (*STREAMING, *LONG) else all)(widened), (name, uses)
    assert not [name for name, (_, atomics) in found.items() if atomics]


def test_a_bad_configuration_is_reported():
    row = Row("forward", "bfloat16", (64, 64), "sm_90")
    bad = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 64, "num_warps": 1, "num_stages": 2}  # a tile in one warp
    (found,) = compile_elsewhere([row], bad)
    assert found.stack > 0
    assert ahead_of_time.problems(row, found) == [f"{row}: a stack of {found.stack} bytes, in a forward kernel"]
    too_much = found._replace(stack=0, shared=300 * 1024)
    assert "shared memory" in ahead_of_time.problems(row, too_much)[0]
