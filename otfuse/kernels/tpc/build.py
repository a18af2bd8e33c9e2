"""Builds the two libraries for Intel Gaudi: the kernels with their glue, and the ops for PyTorch.

``OTFUSE_BUILD_TPC=1 pip install .`` runs this. It needs Habana's compiler, its glue header and its PyTorch, looks for
all of them before it starts, and names every one that is missing. Both libraries are made, or none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
DEVICES = ("gaudi2", "gaudi3")
GLUE_LIBRARY = "libotfuse_tpc_kernels.so"  # what GC_KERNEL_PATH names
OP_LIBRARY = "libotfuse_hpu.so"  # what torch.ops.load_library takes
GLUE_HEADER = "tpc_kernel_lib_interface.h"
HEADERS = ("/usr/lib/habanatools/include", "/usr/include/habanalabs")
# As the host emulator is compiled: a * b + c in C keeps its two roundings.
KERNEL_FLAGS = ("-Wall", "-Werror", "-O2", "-ffp-contract=off")
HOST_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden")


class BuildError(RuntimeError):
    """A piece is missing, or a compiler refused."""


class Toolchain(NamedTuple):
    """What the build runs and reads, all of it found."""

    tpc_clang: str
    cxx: str
    glue_include: str
    op_includes: list[str]
    op_libraries: list[str]  # folders
    cxx11_abi: bool


# In an interpreter of its own: pip's isolated builds hide from this one what is installed. -E drops the variables by
# which they do it.
_LOOK = """
import json
found = {}
try:
    import torch
    from torch.utils import cpp_extension
    found["torch"] = [cpp_extension.include_paths(), cpp_extension.library_paths(), torch.compiled_with_cxx11_abi()]
except Exception as error:
    found["no torch"] = repr(error)
try:
    from habana_frameworks.torch.utils.lib_utils import get_include_dir, get_lib_dir
    found["habana"] = [get_include_dir(), get_lib_dir()]
except Exception as error:
    found["no habana"] = repr(error)
print(json.dumps(found))
"""


def build(folder: Path) -> list[Path]:
    """Both libraries, in ``folder``.

    Raises:
        BuildError: lists every missing piece, or holds what a compiler said. ``folder`` is then as it was.
    """
    tools = find_toolchain()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        made = [build_glue(tools, work), build_ops(tools, work)]
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy2(library, folder)) for library in made]


def find_toolchain() -> Toolchain:
    """Every tool, or a BuildError with every one that is missing."""
    missing = []
    tpc_clang, cxx = shutil.which("tpc-clang"), shutil.which(os.environ.get("CXX", "c++"))
    if tpc_clang is None:
        missing.append("tpc-clang, the kernel compiler, is not on PATH (package habanatools)")
    if cxx is None:
        missing.append("there is no C++ compiler (c++ on PATH, or named by CXX)")
    found = _installed()
    include = [] if "no habana" in found else [str(found["habana"][0])]
    glue = next((folder for folder in (*HEADERS, *include) if (Path(folder) / GLUE_HEADER).exists()), None)
    if glue is None:
        missing.append(f"{GLUE_HEADER} is not in {' or '.join((*HEADERS, *include))} (package habanatools)")
    if "no torch" in found:
        missing.append(f"torch cannot be imported by {sys.executable} ({found['no torch']})")
    if "no habana" in found:
        missing.append(
            f"habana_frameworks cannot be imported by {sys.executable} ({found['no habana']}); "
            "it comes with Intel's Gaudi containers"
        )
    if missing:
        raise BuildError("the Gaudi libraries cannot be built here:\n" + "".join(f"  - {what}\n" for what in missing))
    assert tpc_clang and cxx and glue
    includes, libraries, cxx11_abi = found["torch"]
    habana_include, habana_library = found["habana"]
    return Toolchain(
        tpc_clang, cxx, glue, [*includes, habana_include, HEADERS[1]], [*libraries, habana_library], cxx11_abi
    )


def _installed() -> dict[str, list]:
    """Where torch and habana_frameworks are, or why they cannot be imported."""
    told = subprocess.run([sys.executable, "-E", "-c", _LOOK], capture_output=True, text=True)
    lines = told.stdout.splitlines()
    if told.returncode or not lines:
        raise BuildError(f"{sys.executable} cannot be run to look for torch: {told.stderr.strip()}")
    return json.loads(lines[-1])  # what an import prints comes before


def build_glue(tools: Toolchain, work: Path) -> Path:
    """Every kernel for every device, and the glue around them."""
    objects = {}
    for device in DEVICES:
        for source in sorted((HERE / device).glob("*.c")):
            objects[device, source.stem] = compiled = work / f"{source.stem}.{device}.o"
            flags = [f"-march={device}", *KERNEL_FLAGS, f"-I{HERE / 'include'}"]
            _run([tools.tpc_clang, *flags, "-c", source, "-o", compiled])
    elfs, library = work / "elfs.cpp", work / GLUE_LIBRARY
    elfs.write_text(embedded({name: file.read_bytes() for name, file in objects.items()}))
    sources = [*sorted((HERE / "glue").glob("*.cpp")), elfs]
    _run([tools.cxx, *HOST_FLAGS, f"-I{HERE / 'glue'}", "-isystem", tools.glue_include, *sources, "-o", library])
    return library


def embedded(objects: dict[tuple[str, str], bytes]) -> str:
    """C++ that holds compiled kernels, by device and name."""
    arrays, rows = [], []
    for number, ((device, name), code) in enumerate(objects.items()):
        arrays.append(f"const unsigned char code{number}[] = {{{','.join(map(str, code))}}};\n")
        rows.append(f'    {{tpc_lib_api::DEVICE_ID_{device.upper()}, "{name}", code{number}, sizeof code{number}}},\n')
    return (
        '#include "elfs.hpp"\n\nnamespace {\n' + "".join(arrays) + "}\n\nnamespace otfuse {\n"
        "const Elf ELFS[] = {\n" + "".join(rows) + "};\n"
        "const unsigned NUM_ELFS = sizeof ELFS / sizeof ELFS[0];\n}\n"
    )


def build_ops(tools: Toolchain, work: Path) -> Path:
    """The ops for PyTorch, against Habana's plugin."""
    library = work / OP_LIBRARY
    _run(
        [
            tools.cxx,
            *HOST_FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(tools.cxx11_abi)}",
            f"-I{HERE / 'glue'}",
            *(part for folder in tools.op_includes for part in ("-isystem", folder)),
            HERE / "torch" / "otfuse_hpu.cpp",
            *(flag for folder in tools.op_libraries for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")),
            *("-lc10", "-ltorch_cpu", "-ltorch", "-lhabana_pytorch2_plugin"),
            *("-o", library),
        ]
    )
    return library


def _run(command: Sequence[str | Path]) -> None:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"this command failed:\n{' '.join(words)}\n{done.stdout}{done.stderr}")
