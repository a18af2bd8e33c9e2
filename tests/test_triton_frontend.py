"""What Triton's compiler is given of every kernel: faults that the interpreter, which runs Python, cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_frontend.py")

# Kernels that make the log kernel, as Triton names them; their backward does unless it is detached.
SOLVERS = {
    "_attend_fwd_kernel", "_attend_bwd_kernel", "_small_fwd_kernel", "_small_bwd_kernel", "_varlen_fwd_kernel",
    "_varlen_bwd_kernel", "_rounds_kernel", "_adjoint_rounds_kernel", "_strip_kernel", "_attend_kernel",
    "_start_kernel", "_adjoint_strip_kernel", "_matrix_gradient_kernel", "_pull_kernel",
}  # fmt: skip


def frontend(*arguments):
    """In a process of its own: where the interpreter is on, there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return frontend()


def test_every_kernel_is_looked_at(found):
    assert set(found["kernels"]) == {of["kernel"] for of in found["launches"].values()}
    assert set(found["kernels"]) > SOLVERS


def test_no_loop_drops_a_name(found):
    """Every value that outlives an iteration is carried to the next."""
    assert not [(name, of["not carried"]) for name, of in found["launches"].items() if of["not carried"]]


def test_the_log_kernel_is_the_same_bits_in_every_kernel(found):
    """One of its products is rounded and the other is not, and the kernel says which."""
    assert not [(name, of["twofold"]) for name, of in found["launches"].items() if of["twofold"]]
    assert {of["kernel"] for of in found["launches"].values() if of["fused"]} >= SOLVERS


def test_sizes_are_multiplied_in_64_bits(found):
    """Those of small costs apart, whose sides are no longer than 16."""
    of_any_size = {name: of for name, of in found["launches"].items() if not name.startswith("small")}
    assert not [(name, of["narrow"]) for name, of in of_any_size.items() if of["narrow"]]


@pytest.mark.parametrize("of", ["not carried", "narrow", "twofold"])
def test_that_the_faults_are_seen(of):
    faulty = {"not carried": "drops_a_name", "narrow": "counts_in_32_bits", "twofold": "leaves_a_choice"}
    assert [name for name, found in frontend("faulty").items() if found[of]] == [faulty[of]]
