"""Fresh processes: what importing otfuse brings in, what runs without the extras, and the command line."""

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import otfuse

ROOT = Path(__file__).parents[1]
HEAVY = ("triton", "numba", "llvmlite", "matplotlib", "av", "ot", "scipy", "jax", "habana_frameworks")

# As if these packages were not installed: no finder finds them.
FORBID = """
import sys
forbidden = {forbidden!r}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in forbidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(code, *args, check=True):
    """Run code, or with "-m" a module, in a fresh process."""
    command = [sys.executable, code, *args] if code == "-m" else [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert not check or done.returncode == 0, done.stderr
    return done


def imported_by(code):
    """Top-level names of the packages in ``sys.modules`` after running code."""
    printed = python(f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))").stdout
    return set(printed.split())


@pytest.fixture(scope="module")
def torch_alone():
    return imported_by("import torch")


def heavier_than_torch(code, torch_alone):
    return {name for name in imported_by(code) - torch_alone if name in HEAVY or name == "numpy"}


def test_import_brings_torch_and_nothing_heavier(torch_alone):
    assert heavier_than_torch("import otfuse", torch_alone) == set()


def test_asking_what_runs_here_imports_what_it_asks_for(torch_alone):
    """Whether numba works is seen by importing it, and Triton where nothing else stands against it."""
    asked = heavier_than_torch("import otfuse; otfuse.backends()", torch_alone)
    assert asked - {"triton"} == heavier_than_torch("import numba", torch_alone) - {"triton"}


def test_the_torch_backend_imports_nothing_heavier(torch_alone):
    solve = "import otfuse, torch; otfuse.sinkhorn(torch.zeros(1, 2, 2), 0.1, backend='torch')"
    assert heavier_than_torch(solve, torch_alone) == set()


@pytest.mark.parametrize("package", ["numba", "matplotlib"])
def test_that_these_tests_can_fail(package, torch_alone):
    assert package in heavier_than_torch(f"import otfuse, {package}", torch_alone)


def test_the_cpu_backend_imports_numba_when_it_runs(torch_alone):
    solve = "import otfuse, torch; otfuse.sinkhorn(torch.zeros(1, 2, 2), 0.1, backend='cpu')"
    assert "numba" in heavier_than_torch(solve, torch_alone)


def test_without_the_extras():
    code = (
        FORBID.format(forbidden=HEAVY)
        + """
import otfuse, torch
cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
plan = otfuse.sinkhorn(cost, 0.1).plan
assert torch.equal(plan, otfuse.sinkhorn(cost, 0.1, backend="torch").plan)
assert torch.allclose(plan.sum(2), torch.tensor([[0.5, 0.5]]))
print(otfuse.backends())
try:
    otfuse.sinkhorn(cost, 0.1, backend="cpu")
except otfuse.BackendError as error:
    print(error)
try:
    otfuse.sinkhorn(cost, 0.1, backend="triton")
except otfuse.BackendError as error:
    print(error)
"""
    )
    reasons, cpu, triton = python(code).stdout.strip().splitlines()
    assert "'torch': []" in reasons and "'cpu': [\"numba is not installed" in reasons
    assert cpu.startswith("backend 'cpu' cannot run") and "pip install 'otfuse[cpu]'" in cpu and '"torch"' in cpu
    assert triton.startswith("backend 'triton' cannot run") and "pip install 'otfuse[cuda]'" in triton


def test_that_a_forbidden_package_is_not_found():
    code = FORBID.format(forbidden=("numba",)) + "import matplotlib, numba"
    done = python(code, check=False)
    assert done.returncode == 1 and "No module named 'numba'" in done.stderr


def test_info():
    printed = python("-m", "otfuse", "info").stdout
    assert printed.startswith(f"otfuse {otfuse.__version__}, Python {sys.version.split()[0]}")
    assert f"torch {torch.__version__}" in printed
    for name, reasons in otfuse.backends().items():
        state = f"not usable: {'; '.join(reasons)}" if reasons else "usable"
        assert re.search(rf"^  {name} +{re.escape(state)}$", printed, re.MULTILINE), printed


def test_without_docstrings_and_assertions():
    """``python -OO``: commands, a solve, and what a user asserts with our help."""
    code = """
import otfuse, torch, otfuse.info, otfuse.__main__, otfuse.testing
assert False, "there are no assertions here"
for arguments in ([], ["info"], ["demo", "--help"]):
    try:
        otfuse.__main__.main(arguments)
    except SystemExit:
        pass
one = torch.ones(2)
try:
    otfuse.testing.assert_as_accurate_as_reference(one, 2 * one[None], 2 * one.double())
except AssertionError as error:
    print("caught", error)
"""
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0 and "caught result: error 1" in done.stdout, done.stderr


def test_info_json():
    facts = json.loads(python("-m", "otfuse", "info", "--json").stdout)
    assert set(facts) == {"otfuse", "python", "platform", "packages", "devices", "threads", "backends"} | {
        "GC_KERNEL_PATH",
        "tpc_emulator",
    }
    assert facts["otfuse"] == otfuse.__version__
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["habana-torch-plugin"] is None
    assert facts["devices"][0] == "cpu" and facts["threads"] >= 1
    expected = {name: {"usable": not reasons, "reasons": reasons} for name, reasons in otfuse.backends().items()}
    assert facts["backends"] == expected
    assert list(facts["backends"]) == ["tpc", "triton", "cpu", "torch"]


@pytest.mark.parametrize("args", [(), ("dance",), ("info", "--loud")])
def test_wrong_command_lines_give_usage(args):
    done = python("-m", "otfuse", *args, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m otfuse") and done.stdout == ""


def test_help_names_the_commands():
    printed = python("-m", "otfuse", "--help").stdout
    assert re.search(r"^ +info +\S", printed, re.MULTILINE) and re.search(r"^ +demo +\S", printed, re.MULTILINE)


def test_the_version_is_in_one_place():
    """otfuse/__init__.py; pyproject.toml reads it."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("otfuse", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if otfuse.__version__ in path.read_text()
    ]
    assert found == ["otfuse/__init__.py"]
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "otfuse.__version__" }' in settings
    assert f'"{otfuse.__version__}"' not in settings + (ROOT / "setup.py").read_text()


PUBLIC = [
    "BackendError",
    "SinkhornAttendOutput",
    "SinkhornOutput",
    "backends",
    "nn",
    "ot_alignment_loss",
    "similarity_matrix",
    "sinkhorn",
    "sinkhorn_attend",
    "sinkhorn_attend_varlen",
]


def test_the_public_list():
    assert otfuse.__all__ == PUBLIC
    assert all(getattr(otfuse, name).__doc__ for name in PUBLIC)
    assert callable(otfuse.backends) and set(otfuse.backends()) == {"tpc", "triton", "cpu", "torch"}


def test_the_public_list_is_what_the_docs_describe():
    headings = re.findall(r"^### `otfuse\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(headings) - {"testing", "viz"} == set(PUBLIC)


@pytest.mark.parametrize("name", ["functional", "loss", "nn", "varlen", "_backends.select"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"otfuse.{name}")
    torch.manual_seed(0)
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("name", [*PUBLIC[3:4], *PUBLIC[5:]])
def test_every_public_function_has_an_example(name):
    assert ">>> " in getattr(otfuse, name).__doc__


def test_an_example_that_is_wrong_fails():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda _: None).failed == 1
