"""The built libraries for Intel Gaudi: why they cannot be used, and how torch and the graph compiler come to them.

``OTFUSE_BUILD_TPC=1 pip install .`` puts them beside the kernels' sources (kernels/tpc/build.py). The ops are loaded
into torch; the kernels are found by Habana's graph compiler, which reads the variable ``GC_KERNEL_PATH``.
"""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from pathlib import Path

import torch

from otfuse._backends.base import BackendError, is_installed

GLUE_LIBRARY, OP_LIBRARY = "libotfuse_tpc_kernels.so", "libotfuse_hpu.so"  # as in kernels/tpc/build.py
HABANA_KERNELS = "/usr/lib/habanalabs/libtpc_kernels.so"  # what the graph compiler reads when it is told nothing
BUILD = "OTFUSE_BUILD_TPC=1 pip install . builds them where tpc-clang and habana_frameworks are"

_too_late = False  # the graph compiler had started before it could be told
_loaded = False


def folder() -> Path:
    """Where the build puts the libraries."""
    return Path(str(files("otfuse.kernels.tpc"))) / "lib"


def unavailable() -> list[str]:
    """Why the kernels cannot run on a Gaudi from here; empty if they can."""
    missing = [name for name in (GLUE_LIBRARY, OP_LIBRARY) if not (folder() / name).exists()]
    reasons = [f"not built: {', '.join(missing)} ({BUILD})"] if missing else []
    if not is_installed("habana_frameworks"):
        reasons.append("habana_frameworks is not installed (it comes with Intel's Gaudi containers)")
    elif (hpu := getattr(torch, "hpu", None)) is None:
        reasons.append("torch has no device 'hpu' yet (import habana_frameworks.torch)")
    elif not hpu.is_available():
        reasons.append("habana_frameworks finds no Gaudi")
    return reasons + kernel_path_reasons()


def kernel_path_reasons() -> list[str]:
    """Why the graph compiler does not find the kernels, if they are built."""
    ours = folder() / GLUE_LIBRARY
    if not ours.exists():
        return []
    if str(ours) not in _kernel_path():
        return [f"{HABANA_KERNELS} is not there; set GC_KERNEL_PATH={ours}:<Habana's libtpc_kernels.so>"]
    if _too_late:
        return [
            "the Gaudi was in use before otfuse was imported, and GC_KERNEL_PATH is read once; import otfuse first, or "
            f"start with GC_KERNEL_PATH={os.environ['GC_KERNEL_PATH']}"
        ]
    return []


def prepare() -> None:
    """Name the kernels in ``GC_KERNEL_PATH``, before the graph compiler reads it. Nothing where they are not built."""
    global _too_late
    ours = folder() / GLUE_LIBRARY
    if not ours.exists() or str(ours) in _kernel_path():
        return
    others = _kernel_path() or [HABANA_KERNELS]
    if others == [HABANA_KERNELS] and not Path(HABANA_KERNELS).exists():
        return  # to name ours alone would hide Habana's own
    _too_late = _in_use()
    os.environ["GC_KERNEL_PATH"] = ":".join([str(ours), *others])


def load() -> None:
    """Load the ops into torch, once.

    Raises:
        BackendError: they cannot run here; lists every reason.
    """
    global _loaded
    if _loaded:
        return
    if reasons := unavailable():
        raise BackendError(f"backend 'tpc' cannot run on a Gaudi: {'; '.join(reasons)}")
    torch.ops.load_library(str(folder() / OP_LIBRARY))
    _loaded = True


def _kernel_path() -> list[str]:
    return [part for part in os.environ.get("GC_KERNEL_PATH", "").split(":") if part]


def _in_use() -> bool:
    """Whether this process has already opened a Gaudi."""
    if "habana_frameworks" not in sys.modules:
        return False
    opened = getattr(getattr(torch, "hpu", None), "is_initialized", None)
    return bool(opened and opened())
