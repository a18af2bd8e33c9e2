"""What is shipped: an sdist, the wheel made from it, and both it and an editable install at work elsewhere."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import otfuse
from otfuse._backends.tpc import emulator as _tpc_emulator

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "demo-out")
VERSION = otfuse.__version__


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, with the litter of a working copy."""
    source = tmp_path_factory.mktemp("source") / "otfuse"
    shutil.copytree(ROOT, source, ignore=IGNORED, symlinks=True)
    for litter in (
        "otfuse/_backends/cpu/__pycache__/kernels.nbi",
        "otfuse/_backends/cpu/old.nbc",
        "otfuse/kernels/triton/x.pyc",
    ):
        (source / litter).parent.mkdir(exist_ok=True)
        (source / litter).write_bytes(b"compiled")
    return source


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it."""
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=dist)
    assert done.returncode == 0 and "Warning" not in done.stdout, done.stdout
    return dist


@pytest.fixture(scope="module")
def wheel(dist):
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def install(wheel, folder):
    """A fresh environment that holds the wheel alone, then sees the packages of this one; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_is_pure_python(wheel, names):
    assert wheel.name == f"otfuse-{VERSION}-py3-none-any.whl"
    assert not [name for name in names if name.endswith((".so", ".pyd", ".dll"))]


def test_the_wheel_holds_every_source_and_the_kernels(source, names):
    ours = {
        path.relative_to(source).as_posix()
        for path in (source / "otfuse").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    kernels = {
        path.relative_to(source).as_posix()
        for path in (source / "otfuse/kernels").rglob("*")
        if path.suffix in (".py", ".c", ".h", ".cpp", ".hpp") or path.name == "CMakeLists.txt"
    }
    assert "otfuse/py.typed" in ours and len(ours) > 15
    assert {"otfuse/kernels/triton/__init__.py", "otfuse/kernels/tpc/__init__.py"} <= kernels
    assert ours | kernels <= names, (ours | kernels) - names


def test_the_wheel_holds_nothing_else(names):
    beside = {name for name in names if not name.startswith("otfuse/")}
    assert beside and all(name.startswith(f"otfuse-{VERSION}.dist-info/") for name in beside)
    litter = re.compile(r"__pycache__|\.nb[ic]$|\.py[cod]$|(^|/)(tests?|benchmarks|conftest)[/.]|test_")
    assert not [name for name in names if litter.search(name)]


def test_the_sdist_can_be_tested_and_holds_no_litter(dist):
    (sdist,) = dist.glob("*.tar.gz")
    assert sdist.name == f"otfuse-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "setup.py",
        "Makefile",
        "LICENSE",
        "README.md",
        "tests/conftest.py",
        "tests/test_wheel.py",
    }
    assert needed <= found, needed - found
    assert not [name for name in found if re.search(r"__pycache__|\.nb[ic]$|\.py[cod]$", name)]


def test_the_tests_of_the_sdist_run_from_it(dist, tmp_path):
    """On its own sources: pages and links, messages, what may import what."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    tests = [f"tests/test_{name}.py" for name in ("errors", "docs", "structure")]
    assert "passed" in run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"otfuse-{VERSION}.dist-info/METADATA").decode()
        assert f"otfuse-{VERSION}.dist-info/licenses/LICENSE" in archive.namelist()
    facts = message_from_string(text)
    assert (facts["Name"], facts["Version"], facts["Requires-Python"]) == ("otfuse", VERSION, ">=3.10")
    assert facts["License-Expression"] == "Apache-2.0"
    extras = {"cpu", "cuda", "demo", "bench", "bench-peers", "test", "docs", "dev"}
    assert set(facts.get_all("Provides-Extra")) == extras
    required = facts.get_all("Requires-Dist")
    assert [r for r in required if "extra ==" not in r] == ["torch>=2.6"]  # a range, and nothing else
    by_extra = {extra: [r for r in required if f'extra == "{extra}"' in r] for extra in ("cpu", "cuda")}
    assert [len(found) for found in by_extra.values()] == [1, 1]
    assert by_extra["cpu"][0].startswith("numba>=") and by_extra["cuda"][0].startswith("triton>=")


USE = """
import json, pathlib, torch, otfuse, otfuse.kernels.tpc, otfuse.kernels.triton
plan = otfuse.sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), 0.1, backend="torch").plan
folders = [pathlib.Path(package.__file__).parent for package in (otfuse.kernels.triton, otfuse.kernels.tpc)]
kernels = [sorted(file.name for file in folder.iterdir() if file.is_file()) for folder in folders]
print(json.dumps([otfuse.__file__, otfuse.__version__, plan.sum(2).tolist(), kernels]))
"""


# The kernels for Gaudi, from the sources that the wheel brings and nothing of the repository.
EMULATE = """
import torch, otfuse
from otfuse._backends.tpc.emulator import sources
cost = torch.rand(2, 9, 5)
plans = [otfuse.sinkhorn(cost, 0.3, backend=backend).plan for backend in ("tpc", "torch")]
torch.testing.assert_close(*plans, rtol=0, atol=1e-6)
print(sources())
"""


def test_a_checkout_that_is_not_installed(source, tmp_path):
    """Its own kernels, whatever is installed beside it; and ``kernels`` there hides no package of that name."""
    code = (
        "import otfuse, otfuse.kernels.triton as t, otfuse.kernels.tpc as c\nfor m in (otfuse, t, c): print(m.__file__)"
    )
    found = run(sys.executable, "-c", code, cwd=source).split()  # the working directory comes first
    assert all(Path(path).is_relative_to(source) for path in found), found
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    path = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.theirs)"
    assert run(sys.executable, "-c", path, cwd=source).strip() == "True"


def check_use(python, folder):
    """Solve a problem and list the kernels; where otfuse was imported from."""
    at, version, rows, kernels = json.loads(run(python, "-c", USE, cwd=folder))
    assert version == VERSION
    assert rows[0] == pytest.approx([0.5, 0.5], abs=1e-6)
    for package, found in zip(("triton", "tpc"), kernels):
        expected = {
            p.name for p in (ROOT / "otfuse" / "kernels" / package).iterdir() if p.is_file() and p.suffix != ".pyc"
        }
        assert "__init__.py" in expected and expected <= set(found)
    return Path(at)


def test_the_wheel_at_work_in_another_folder(wheel, tmp_path):
    python = install(wheel, tmp_path / "environment")
    assert (tmp_path / "environment") in check_use(python, tmp_path).parents
    assert run(python, "-m", "otfuse", "info", cwd=tmp_path).startswith(f"otfuse {VERSION}, Python ")
    if _tpc_emulator.COMPILER:
        used = Path(run(python, "-c", EMULATE, cwd=tmp_path).strip())
        assert (tmp_path / "environment") in used.parents


def test_an_editable_install_at_work_in_another_folder(source, tmp_path):
    code = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_editable(sys.argv[1]))"
    wheel = tmp_path / run(sys.executable, "-c", code, tmp_path, cwd=source).split()[-1]
    python = install(wheel, tmp_path / "environment")
    assert check_use(python, tmp_path) == source / "otfuse" / "__init__.py"
