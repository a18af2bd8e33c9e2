"""The default never crashes: numba that does not import or compile, no folder or a damaged one for its cache, a default
device that is not the tensors'."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import otfuse
from otfuse.testing import clustered_tokens

pytest.importorskip("numba", reason="numba is not installed (pip install 'otfuse[cpu]')")

# What a process says of the default, as its first call or in a graph that is its first call.
ASK = """
import json, logging, sys
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("otfuse").addHandler(Lines())
logging.getLogger("otfuse").setLevel(logging.INFO)
import torch, otfuse
torch.manual_seed(0)
cost = torch.rand(2, 4, 5)
solve = lambda cost: otfuse.sinkhorn(cost, 0.1, num_iters=7).plan
compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")(cost) if {traced} else None
plan = solve(cost)
if compiled is not None:
    torch.testing.assert_close(compiled, plan)
solve(cost)
try:
    otfuse.sinkhorn(cost, 0.1, backend="cpu")
    refusal = None
except otfuse.BackendError as error:
    refusal = str(error)
from otfuse import info
reasons = info.gather()["backends"]["cpu"]["reasons"]
as_torch = torch.equal(plan, otfuse.sinkhorn(cost, 0.1, num_iters=7, backend="torch").plan)
from torch.testing import assert_close
assert_close(plan, otfuse.sinkhorn(cost, 0.1, num_iters=7, backend="torch").plan)
json.dump({{"lines": lines, "reasons": reasons, "refusal": refusal, "as torch": as_torch}}, sys.stdout)
"""


def run(code, folder, **environment):
    """In a process of its own, in ``folder`` and with it before all others on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    kept |= {"PYTHONPATH": str(folder)} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=folder, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BROKEN = {
    "its NumPy": ("raise ImportError('Numba needs NumPy 2.4 or less')", "(ImportError: Numba needs NumPy 2.4 or less)"),
    "its library": ("raise OSError('Could not find libllvmlite.so')", "(OSError: Could not find libllvmlite.so)"),
    "its package": ("import llvmlite_of_old", "(ModuleNotFoundError: No module named 'llvmlite_of_old')"),
}


@pytest.mark.parametrize("broken", [*BROKEN, "compiles nothing"])
def test_numba_that_does_not_work_is_passed_over(broken, tmp_path):
    if broken == "compiles nothing":
        reason = "numba is told to compile nothing (unset NUMBA_DISABLE_JIT)"
        environment = {"NUMBA_DISABLE_JIT": "1"}
    else:
        code, why = BROKEN[broken]
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text(code)
        reason = f"numba is installed and does not import {why}"
        environment = {}
    traced = broken in ("its NumPy", "compiles nothing")
    found = run(ASK.format(traced=traced), tmp_path, **environment)
    assert found["reasons"] == [reason]
    assert found["as torch"]
    assert found["refusal"].startswith("backend 'cpu' cannot run this problem") and reason in found["refusal"]
    (line,) = found["lines"]
    assert line.startswith("using backend 'torch' (passed over: ") and f"cpu: {reason}" in line


def test_numba_is_looked_at_once(monkeypatch):
    """And not again while it is in use: a second look may find what half an import has left."""
    assert otfuse.backends()["cpu"] == []
    monkeypatch.setitem(sys.modules, "numba", None)
    assert otfuse.backends()["cpu"] == []


WITHOUT_A_CACHE = """
import json, logging, sys
import numpy, torch
lines = []
logging.getLogger("otfuse").addHandler(logging.Handler())
logging.getLogger("otfuse").handlers[0].emit = lambda record: lines.append(record.getMessage())
import otfuse
reasons = otfuse.backends()["cpu"]
from otfuse._backends.cpu import kernels as _cpu_kernels
found = numpy.full(3, 7.0, numpy.float32)
_cpu_kernels._ones_where(numpy.array([2.0, 0.0, 3.0], numpy.float32), found)
json.dump({"reasons": reasons, "found": found.tolist(), "lines": lines, "from": otfuse.__file__}, sys.stdout)
"""


def test_an_installation_that_cannot_be_written_and_no_home(tmp_path):
    """numba has no folder for what it compiles: it compiles at every start, here one of the kernels, and says so.

    A file stands where a folder would be made, which stops root too.
    """
    package = shutil.copytree(
        Path(otfuse.__file__).parent, tmp_path / "otfuse", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "_backends" / "cpu" / "__pycache__").touch()
    (tmp_path / "home").touch()
    home = str(tmp_path / "home" / "of nobody")
    found = run(WITHOUT_A_CACHE, tmp_path, HOME=home, XDG_CACHE_HOME=home, LOCALAPPDATA=home)
    assert found["from"] == str(package / "__init__.py")
    assert found["reasons"] == [] and found["found"] == [1, 0, 1]
    (line,) = found["lines"]
    assert line.startswith("numba finds no folder") and "NUMBA_CACHE_DIR" in line


@pytest.fixture
def doubled(tmp_path, caplog):
    """Double a number by a function of a module that is read anew, as a new process does; and what it logged."""
    path = tmp_path / "doubling.py"
    path.write_text(
        "from otfuse._backends.cpu.numba_cache import njit\n@njit(cache=True)\ndef double(x):\n    return 2 * x\n"
    )

    def run(before_the_call=lambda: None):
        from otfuse._backends.cpu import numba_cache as _numba_cache

        _numba_cache._logged.clear()
        caplog.clear()
        spec = importlib.util.spec_from_file_location("doubling", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        before_the_call()
        with caplog.at_level(logging.WARNING, logger="otfuse"):
            assert module.double(21) == 42
        return module.double, [record.getMessage() for record in caplog.records]

    return run


def hits(function):
    return sum(function.stats.cache_hits.values())


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {
    "half of it": half,
    "nothing": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"?"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_is_mended(suffix, damage, doubled):
    function, lines = doubled()
    assert lines == [] and hits(function) == 0
    function, lines = doubled()
    assert lines == [] and hits(function) == 1
    (damaged,) = Path(function._cache.cache_path).glob(f"*double*{suffix}")
    DAMAGE[damage](damaged)
    function, lines = doubled()
    assert hits(function) == 0
    (line,) = lines
    assert line.startswith(f"numba's cache in {damaged.parent} cannot be used as it is") and "NUMBA_CACHE_DIR" in line
    function, lines = doubled()
    assert lines == [] and hits(function) == 1


@pytest.mark.parametrize("name", ["load", "save"])
def test_what_a_signal_handler_raises_while_the_cache_is_used_is_the_callers(name, doubled, monkeypatch):
    """An alarm: it is no fault of the cache, which goes on."""
    from otfuse._backends.cpu import numba_cache

    method = getattr(numba_cache.FunctionCache, f"{name}_overload")
    alarms = [RuntimeError("alarm")]

    def interrupted(self, *args):
        if alarms:
            raise alarms.pop()
        return method(self, *args)

    if name == "load":
        doubled()
    monkeypatch.setattr(numba_cache.FunctionCache, f"{name}_overload", interrupted)
    with pytest.raises(RuntimeError, match="alarm"):
        doubled()
    monkeypatch.undo()
    function, lines = doubled()
    assert lines == [] and hits(function) == 1


def test_a_cache_that_cannot_be_written_any_more(doubled):
    """A disk that is full, a folder that is gone; here a file stands in its place."""
    function, _ = doubled()
    folder = Path(function._cache.cache_path)

    def no_folder():
        shutil.rmtree(folder)
        folder.touch()

    try:
        _, lines = doubled(no_folder)
    finally:
        folder.unlink()
    (line,) = lines
    assert line.startswith(f"numba's cache in {folder} cannot be used as it is")


def test_every_compiled_function_has_this_cache():
    from numba.core.dispatcher import Dispatcher

    from otfuse._backends.cpu import kernels as _cpu_kernels
    from otfuse._backends.cpu.numba_cache import _Cache

    compiled = [value for value in vars(_cpu_kernels).values() if isinstance(value, Dispatcher)]
    assert len(compiled) > 40 and {type(function._cache) for function in compiled} == {_Cache}


def outputs_of_all_that_is_public(backend):
    x, y = (t.requires_grad_() for t in clustered_tokens(3, 5, 4, 6))
    a = torch.tensor([[1.0, 2, 0, 1, 1], [1.0] * 5, [0.0] * 5], device="cpu")
    options = {"num_iters": 4, "backend": backend}
    starts = [0, 2, 5, 7, 7, 11], [0, 2, 3, 5, 5, 7]  # two items of equal lengths, so that items are sorted
    ends = [torch.tensor(values, dtype=torch.int32, device="cpu") for values in starts]
    similarity = otfuse.similarity_matrix(x, y)
    outputs = [
        *otfuse.sinkhorn(-similarity, 0.5, a, **options),
        *otfuse.sinkhorn(-similarity, 0.5, tol=1e-2, grad="implicit", **options),
        *otfuse.sinkhorn_attend(x, y, 0.5, a=a, b=y[..., 0] > -9, weights="barycentric", return_plan=True, **options),
        *otfuse.sinkhorn_attend(x.bfloat16(), y.bfloat16(), similarity="dot", grad="detach", **options),
        *otfuse.nn.OTFusion(0.5, **options)(x, y, a=a > 0),
        otfuse.ot_alignment_loss(otfuse.nn.OTAttention(0.5, return_plan=True, **options)(x, y).plan, similarity),
    ]
    for longest in (4, 5), (3, 2):  # the second announces less than there is
        packed = x.flatten(0, 1)[:11], y.flatten(0, 1)[:7]
        outputs += otfuse.sinkhorn_attend_varlen(*packed, *ends, *longest, 0.5, return_plan=True, **options)
        outputs += otfuse.sinkhorn_attend_varlen(*packed, *ends, *longest, a=packed[0][:, 0] > -9, **options)
    outputs = [t for t in outputs if t is not None]
    loss = sum(t.double().nan_to_num(0, 0, 0).square().sum() for t in outputs if t.requires_grad)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, (x, y))]


def test_another_default_device(backend):
    """Nothing is made there: all is where the tensors are."""
    expected = outputs_of_all_that_is_public(backend)
    with torch.device("meta"):  # as torch.set_default_device
        found = outputs_of_all_that_is_public(backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
