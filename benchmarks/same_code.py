"""Which kernels a change of the device code leaves as they were, without compiling them.

Rows of kernels/triton/resources.json whose intermediate code (Triton's own, inlined) is what it was at a git revision
compile to what they compiled to: ``ahead_of_time.py --since REVISION`` takes their resources over.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

ROOT = Path(__file__).parents[1]
OLD = "otfuse_kernels_before"


@contextlib.contextmanager
def kernels_of(revision: str) -> Iterator[str]:
    """The package of the device code as it was at a revision, importable by this name."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, OLD)
        package.mkdir()
        names = _git("ls-tree", "--name-only", revision, "kernels/triton/").split()
        for name in (name for name in names if name.endswith(".py")):
            (package / Path(name).name).write_text(_git("show", f"{revision}:{name}"))
        sys.path.insert(0, folder)
        try:
            yield OLD
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] == OLD]:
                del sys.modules[name]


def kernel_of(package: str, module: str, name: str) -> Any:
    """None where there was none."""
    try:
        return getattr(importlib.import_module(f"{package}.{module}"), name, None)
    except ModuleNotFoundError:
        return None


def intermediate(source: ASTSource, target: Any, options: dict[str, Any]) -> str:
    """Triton's code for the kernel, inlined and simplified, without names and lines."""
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    code = source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    return stages["ttir"](code, {}).str_nodebug()


def _git(*command: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout
