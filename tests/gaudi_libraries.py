"""Both libraries for Gaudi, built by the project's own build with stand-ins for what only Habana has.

``tpc-clang`` becomes a script that writes down how it was called, ``habana_frameworks`` a package that names
``tests/stand_in_sdk`` as its headers and a plugin of our own as its library. The rest, compiler and torch, is real.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from otfuse._backends.tpc.emulator import cache_folder

ROOT = Path(__file__).parents[1]
SDK = ROOT / "tests" / "stand_in_sdk"
BUILD = ROOT / "otfuse" / "kernels" / "tpc" / "build.py"
PLUGIN = "libhabana_pytorch2_plugin.so"
COMPILER = """#!{python}
import pathlib, sys
source, target = sys.argv[sys.argv.index("-c") + 1], sys.argv[sys.argv.index("-o") + 1]
assert pathlib.Path(source).exists()
pathlib.Path(target).write_text("\\n".join(["ELF of"] + sys.argv[1:]))
"""
QUICK = """#!/bin/sh
exec c++ "$@" -O0
"""
LIB_UTILS = """
def get_include_dir(): return {include!r}
def get_lib_dir(): return {library!r}
"""


def write_compilers(folder: Path) -> None:
    """A stand-in for tpc-clang, to be put on PATH, and a C++ compiler that does not optimise."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("tpc-clang", COMPILER.format(python=sys.executable)), ("quick-c++", QUICK)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def write_habana(packages: Path, plugin: Path) -> None:
    """A stand-in for habana_frameworks, as far as the build asks it."""
    utils = packages / "habana_frameworks" / "torch" / "utils"
    utils.mkdir(parents=True)
    for package in (utils, utils.parent, utils.parent.parent):
        (package / "__init__.py").write_text("")
    (utils / "lib_utils.py").write_text(LIB_UTILS.format(include=str(SDK), library=str(plugin.parent)))


def environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one; its Python. Its packages folder is ``packages_of``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    seen = dict.fromkeys([sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("-packages"))])
    (packages_of(folder) / "packages_of_the_tests.pth").write_text("\n".join(seen) + "\n")
    return python


def packages_of(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def build_module() -> dict[str, Any]:
    return runpy.run_path(str(BUILD))


@functools.cache
def kept() -> Path:
    """The folder with the plugin's stand-in, the glue and the ops; made once for each state of their sources."""
    told = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{ROOT} {torch.__version__} {told}".encode())
    folders = (SDK, *(ROOT / "otfuse" / "kernels" / "tpc" / part for part in ("glue", "torch", "gaudi2", "gaudi3")))
    for source in (Path(__file__), BUILD, *(file for folder in folders for file in sorted(folder.iterdir()))):
        digest.update(source.name.encode() + source.read_bytes())
    folder = cache_folder() / f"stand-in-{digest.hexdigest()[:24]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            make_plugin(scratch / PLUGIN)
            make_libraries(scratch, folder)
            with contextlib.suppress(OSError):  # another process was faster
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def plugin() -> Path:
    return kept() / PLUGIN


def libraries() -> tuple[Path, Path]:
    """Glue and ops."""
    return kept() / "libotfuse_tpc_kernels.so", kept() / "libotfuse_hpu.so"


def make_plugin(target: Path) -> None:
    """The stand-in for Habana's plugin."""
    includes = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    libraries = [flag for folder in cpp_extension.library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", abi, f"-I{SDK}"]
    source = str(SDK / "stand_in_plugin.cpp")
    named = f"-Wl,-soname,{PLUGIN}"  # so that who opens it by path and who links to it get the same
    command = ["c++", *flags, *includes, source, *libraries, "-lc10", "-ltorch_cpu", named, "-o", str(target)]
    subprocess.run(command, check=True)


def make_libraries(folder: Path, later: Path) -> None:
    """Glue and ops in ``folder``, by the functions of the build; they are to be moved to ``later``."""
    write_compilers(folder / "bin")
    build = build_module()
    tools = build["Toolchain"](
        tpc_clang=str(folder / "bin" / "tpc-clang"),
        cxx=str(folder / "bin" / "quick-c++"),
        glue_include=str(SDK),
        op_includes=[*cpp_extension.include_paths(), str(SDK)],
        op_libraries=[*cpp_extension.library_paths(), str(folder), str(later)],
        cxx11_abi=torch.compiled_with_cxx11_abi(),
    )
    build["build_glue"](tools, folder)
    build["build_ops"](tools, folder)
