"""Both libraries for Gaudi, built by the project's own build with stand-ins for what only Habana has.

``tpc-clang`` becomes a script that writes down how it was called, ``habana_frameworks`` a package that names
``tests/stand_in_sdk`` as its headers and a plugin of our own as its library. The rest, compiler and torch, is real.
"""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SDK = ROOT / "tests" / "stand_in_sdk"
PLUGIN = "libhabana_pytorch2_plugin.so"
COMPILER = """#!{python}
import pathlib, sys
source, target = sys.argv[sys.argv.index("-c") + 1], sys.argv[sys.argv.index("-o") + 1]
assert pathlib.Path(source).exists()
pathlib.Path(target).write_text("\\n".join(["ELF of"] + sys.argv[1:]))
"""
LIB_UTILS = """
def get_include_dir(): return {include!r}
def get_lib_dir(): return {library!r}
"""


def write_compiler(folder: Path) -> Path:
    """A stand-in for tpc-clang, to be put on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / "tpc-clang"
    compiler.write_text(COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    return compiler


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
    (packages_of(folder) / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def packages_of(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def build_module() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "kernels" / "tpc" / "build.py"))


@functools.cache
def plugin() -> Path:
    """The stand-in for Habana's plugin, compiled once a process."""
    made = Path(tempfile.mkdtemp(prefix="otfuse-plugin-")) / PLUGIN
    includes = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    libraries = [flag for folder in cpp_extension.library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", abi, f"-I{SDK}"]
    source = str(SDK / "stand_in_plugin.cpp")
    command = ["c++", *flags, *includes, source, *libraries, "-lc10", "-ltorch_cpu", "-o", str(made)]
    subprocess.run(command, check=True)
    return made


@functools.cache
def libraries() -> tuple[Path, Path]:
    """Glue and ops, built once a process."""
    folder = Path(tempfile.mkdtemp(prefix="otfuse-gaudi-"))
    write_compiler(folder / "bin")
    build = build_module()
    tools = build["Toolchain"](
        tpc_clang=str(folder / "bin" / "tpc-clang"),
        cxx="c++",
        glue_include=str(SDK),
        op_includes=[*cpp_extension.include_paths(), str(SDK)],
        op_libraries=[*cpp_extension.library_paths(), str(plugin().parent)],
        cxx11_abi=torch.compiled_with_cxx11_abi(),
    )
    return build["build_glue"](tools, folder), build["build_ops"](tools, folder)
