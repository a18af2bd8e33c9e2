"""What the Triton kernels take of every GPU, compiled without one, against kernels/triton/resources.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ahead_of_time  # noqa: E402
from ahead_of_time import Resources, Row  # noqa: E402

from otfuse.backends import _triton_configurations as configurations  # noqa: E402

TABLE = ahead_of_time.load_table()
ROWS = ahead_of_time.rows()
NAMES = [str(row) for row in ROWS]

# Compiled anew: every variant, dtype, class and target at least once.
ANEW = (
    Row("forward", "bfloat16", (64, 32), "sm_90"),
    Row("forward", "bfloat16", (128, 128), "sm_100"),
    Row("forward", "float16", (128, 64), "sm_80"),
    Row("forward", "float64", (64, 64), "sm_90"),
    Row("forward, everything", "float32", (64, 32), "gfx942"),
    Row("forward, cost", "float32", (128, 128), "sm_100"),
    Row("backward", "float32", (64, 32), "sm_80"),
    Row("backward", "float16", (16, 16), "sm_90"),
    Row("backward, implicit", "bfloat16", (64, 32), "sm_90"),
    Row("backward, cost", "float32", (64, 32), "sm_80"),
    Row("similarity", "float64", (64, 64), "gfx942"),
    Row("loss", "float32", (32, 32), "sm_90"),
    Row("loss, backward", "bfloat16", (32, 32), "sm_100"),
    Row("packed", "bfloat16", (64, 32), "sm_90"),
    Row("packed, backward", "float32", (64, 32), "sm_80"),
    Row("packed, products", "bfloat16", (64, 64), "sm_90"),
    Row("packed, products backward", "float32", (64, 64), "sm_100"),
    Row("packed, rounds", "float64", (16, 64), "gfx942"),
    Row("packed, attend", "float16", (64, 64), "sm_80"),
    Row("packed, rounds backward", "float32", (32, 128), "sm_90"),
    Row("packed, rounds backward implicit", "float32", (32, 128), "sm_100"),
    Row("packed, tokens backward", "bfloat16", (64, 32), "sm_90"),
)

COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ahead_of_time
rows = json.loads(sys.argv[2])
wanted = [ahead_of_time.Row(variant, dtype, tuple(tile), target) for variant, dtype, tile, target in rows]
if __name__ == "__main__":
    print(json.dumps(list(ahead_of_time.compile_rows(wanted, json.loads(sys.argv[3])))))
"""


def compile_elsewhere(rows, configuration=None):
    """In a process of its own: where the interpreter is on, there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(ROOT / "benchmarks"), json.dumps(rows)]
    command.append(json.dumps(configuration and [configuration] * len(rows)))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [result if isinstance(result, str) else Resources(*result) for result in found]


def test_the_table_is_of_these_sources():
    """And every row of the configuration that it is launched with."""
    assert TABLE["sources"] == ahead_of_time.sources_hashes(), "run: python benchmarks/ahead_of_time.py"
    stale = [name for name, row in zip(NAMES, ROWS) if not ahead_of_time.is_current(row, TABLE)]
    assert not stale, "run: python benchmarks/ahead_of_time.py"


def test_the_table_covers_every_kernel_dtype_class_and_target():
    missing = [name for name, row in zip(NAMES, ROWS) if ahead_of_time.committed(row, TABLE) is None]
    assert not missing
    for kernel, dtypes in configurations.CLASSES.items():
        for dtype, sizes in dtypes.items():
            found = {
                (row.target, configurations.size_class(kernel, dtype, *row.tile))
                for row in ROWS
                if ahead_of_time.VARIANTS[row.variant].configured == kernel and row.dtype == dtype
            }
            assert found == {(target, size) for target in ahead_of_time.TARGETS for size in sizes}, (kernel, dtype)


def test_no_row_spills_in_a_forward_or_takes_more_than_the_target_has():
    found = [(row, ahead_of_time.committed(row, TABLE)) for row in ROWS]
    wrong = [line for row, resources in found if resources for line in ahead_of_time.problems(row, resources)]
    assert not wrong


def test_no_forward_kernel_has_a_stack():
    """Said again by itself, without exceptions: tokens, a cost, everything asked for, every class, every target."""
    forward = [
        (row, ahead_of_time.committed(row, TABLE)) for row in ROWS if row.variant.startswith(("forward", "packed"))
    ]
    forward = [(row, resources) for row, resources in forward if "backward" not in row.variant]
    assert len(forward) > 100
    assert not [f"{row}: {resources}" for row, resources in forward if resources is None or resources.stack]


def test_the_subset_covers_everything_once():
    for field in ("variant", "dtype", "target"):
        assert {getattr(row, field) for row in ANEW} == {getattr(row, field) for row in ROWS}
    forward = [row for row in ANEW if row.variant.startswith(("forward", "backward"))]
    sizes = {configurations.size_class("forward", row.dtype, *row.tile) for row in forward}
    assert sizes == {size for dtype in configurations.CLASSES["forward"].values() for size in dtype}
    assert set(ANEW) <= set(ROWS)


def test_compiled_anew():
    found = compile_elsewhere(ANEW)
    wrong = [line for pair in zip(ANEW, found) for line in ahead_of_time.problems(*pair)]
    assert not wrong
    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}; registers of {triton.__version__} may differ")
    assert not [line for pair in zip(ANEW, found) for line in ahead_of_time.differences(*pair, TABLE)]


def test_a_bad_configuration_is_reported():
    row = Row("forward", "float32", (64, 32), "sm_90")
    bad = {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 1, "num_stages": 2}
    (found,) = compile_elsewhere([row], bad)
    assert found.stack > 0
    assert ahead_of_time.problems(row, found) == [f"{row}: a stack of {found.stack} bytes, in a forward kernel"]
    too_much = found._replace(stack=0, shared=300 * 1024)
    assert "shared memory" in ahead_of_time.problems(row, too_much)[0]
    assert "in the table" in ahead_of_time.differences(row, found, TABLE | {"triton": triton.__version__})[0]
