"""The build of the Gaudi libraries: it names what is missing, runs its commands, and leaves all or nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gaudi_libraries
import pytest
from gaudi_libraries import ROOT, SDK

from otfuse.kernels.tpc import build

LINUX = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the libraries are compiled by c++, for Linux"
)
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "demo-out", "lib", "__pycache__", "tests")
KERNELS = sorted(path.stem for path in (ROOT / "otfuse" / "kernels" / "tpc" / "gaudi2").glob("*.c"))


@pytest.fixture
def pieces(monkeypatch, tmp_path):
    """A machine with every piece, to take some away."""
    gaudi_libraries.write_compilers(tmp_path / "bin")
    for tool in ("c++", "as", "ld"):  # a folder of one's own, so that no other compiler is found
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "HEADERS", (str(SDK), str(tmp_path / "habanalabs")))
    found = {"torch": [["torch/include"], ["torch/lib"], True], "habana": ["habana/include", "habana/lib"]}
    monkeypatch.setattr(build, "_installed", lambda: found)
    return found


@LINUX
class TestToolchain:
    def test_all_there(self, pieces, tmp_path):
        tools = build.find_toolchain()
        assert Path(tools.tpc_clang) == tmp_path / "bin" / "tpc-clang"
        assert tools.glue_include == str(SDK)
        assert tools.op_includes == ["torch/include", "habana/include", str(tmp_path / "habanalabs")]
        assert tools.op_libraries == ["torch/lib", "habana/lib"]

    @pytest.mark.parametrize("tool, said", [("tpc-clang", "tpc-clang, the kernel"), ("c++", "no C++ compiler")])
    def test_without_a_compiler(self, pieces, tmp_path, tool, said):
        (tmp_path / "bin" / tool).unlink()
        self.check([said])

    def test_without_the_header(self, pieces, monkeypatch):
        monkeypatch.setattr(build, "HEADERS", ("nowhere", "/else"))
        self.check(["tpc_kernel_lib_interface.h is not in nowhere or /else or habana/include"])

    def test_without_habanas_pytorch(self, pieces):
        del pieces["habana"]
        pieces["no habana"] = "ModuleNotFoundError('habana_frameworks')"
        self.check(["habana_frameworks cannot be imported by"])

    def test_without_torch(self, pieces):
        del pieces["torch"]
        pieces["no torch"] = "ModuleNotFoundError('torch')"
        self.check(["torch cannot be imported by"])

    def test_everything_missing_is_named_at_once(self, pieces, monkeypatch, tmp_path):
        for tool in ("tpc-clang", "c++"):
            (tmp_path / "bin" / tool).unlink()
        monkeypatch.setattr(build, "HEADERS", ("nowhere",))
        pieces.clear()
        pieces.update({"no torch": "gone", "no habana": "gone"})
        self.check(["tpc-clang", "C++ compiler", "tpc_kernel_lib_interface.h", "torch cannot", "habana_frameworks"])

    def check(self, said):
        with pytest.raises(build.BuildError) as error:
            build.find_toolchain()
        lines = str(error.value).splitlines()[1:]
        assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines)), lines


def test_what_is_installed_is_seen_from_an_isolated_build(tmp_path, monkeypatch):
    """pip hides the installed packages from a build by a sitecustomize on PYTHONPATH."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hidden = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    assert hidden.returncode and "ModuleNotFoundError" in hidden.stderr
    includes, libraries, _ = build._installed()["torch"]
    assert all(Path(folder).is_dir() for folder in (*includes, *libraries))


@LINUX
class TestAllOrNothing:
    @pytest.mark.parametrize("broken", ["kernels", "ops"])
    def test_a_failure_leaves_nothing_and_shows_the_command(self, pieces, tmp_path, broken):
        if broken == "kernels":
            (tmp_path / "bin" / "tpc-clang").write_text("#!/bin/sh\necho error: no such register >&2; exit 1\n")
            said = ["tpc-clang -march=gaudi2 -Wall -Werror -O2", "-c", "error: no such register"]
        else:
            said = ["otfuse_hpu.cpp", "-lhabana_pytorch2_plugin"]  # its headers are not where they are said to be
        target = tmp_path / "lib"
        with pytest.raises(build.BuildError) as error:
            build.build(target)
        assert all(text in str(error.value) for text in said)
        assert not target.exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "otfuse"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    return source


def make_wheel(source, out, python, **environment):
    command = [sys.executable, "-m", "pip", "--python", str(python), "wheel", "--no-build-isolation", "--no-deps"]
    variables = {**os.environ, **environment}
    return subprocess.run(
        [*command, "--no-index", "-w", str(out), str(source)], capture_output=True, text=True, env=variables
    )


class TestWheels:
    @pytest.mark.skipif(shutil.which("tpc-clang") is not None, reason="a Gaudi's compiler is here")
    def test_asked_for_without_the_pieces(self, source, tmp_path):
        done = make_wheel(source, tmp_path / "out", sys.executable, OTFUSE_BUILD_TPC="1")
        said = done.stdout + done.stderr
        assert done.returncode != 0
        assert "OTFUSE_BUILD_TPC=1: the Gaudi libraries cannot be built here:" in said
        assert "tpc-clang, the kernel compiler, is not on PATH" in said
        assert "habana_frameworks cannot be imported" in said and "torch cannot be imported" not in said
        assert not list(tmp_path.rglob("*.whl"))

    def test_another_value(self, source, tmp_path):
        done = make_wheel(source, tmp_path / "out", sys.executable, OTFUSE_BUILD_TPC="yes")
        assert done.returncode != 0
        assert "OTFUSE_BUILD_TPC must be 1 (build the Gaudi libraries) or 0; got 'yes'" in done.stdout + done.stderr

    @LINUX
    def test_with_all_pieces(self, source, tmp_path):
        """Stand-ins for Habana's compiler and packages: every command of the build runs, and its wheel holds both."""
        python = gaudi_libraries.environment(tmp_path / "environment")
        packages = gaudi_libraries.packages_of(tmp_path / "environment")
        gaudi_libraries.write_habana(packages, gaudi_libraries.plugin())
        gaudi_libraries.write_compilers(tmp_path / "bin")
        path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
        done = make_wheel(source, tmp_path / "out", python, OTFUSE_BUILD_TPC="1", PATH=path, CXX="quick-c++")
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (tmp_path / "out").glob("*.whl")
        assert "-py3-none-any" not in wheel.name and "linux" in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            libraries = {f"otfuse/kernels/tpc/lib/{name}" for name in (build.GLUE_LIBRARY, build.OP_LIBRARY)}
            assert libraries <= names and "otfuse/kernels/tpc/include/sinkhorn.h" in names
            glue = archive.read(f"otfuse/kernels/tpc/lib/{build.GLUE_LIBRARY}").decode("latin-1")
        assert len(KERNELS) == 12
        for device in build.DEVICES:
            for kernel in KERNELS:
                assert f"-march={device}" in glue and f"kernels/tpc/{device}/{kernel}.c" in glue
        assert glue.count("ELF of") == len(KERNELS) * len(build.DEVICES)
