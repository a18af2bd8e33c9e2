"""Whether the Triton that is installed compiles the kernels: ``import otfuse`` reads its version, without importing it.

What compiles was found with each release (docs/backends.md): the kernels need 3.6, those over a cluster 3.9.
"""

from __future__ import annotations

import importlib.metadata
import re

import torch

OLDEST = 3, 6
CLUSTERS = 3, 9


def _version() -> tuple[int, int] | None:
    """None where no package of that name says it: a build of one's own, which may be anything."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


VERSION = _version()


def has_clusters() -> bool:
    """Whether kernels over a cluster compile; elsewhere the rounds are launched one by one."""
    return VERSION is None or VERSION >= CLUSTERS


def why_too_old() -> list[str]:
    if VERSION is None or VERSION >= OLDEST:
        return []
    installed, oldest = ("{}.{}".format(*version) for version in (VERSION, OLDEST))
    return [
        f"Triton {installed} does not compile the kernels, which need {oldest} or newer: upgrade torch to 2.10 "
        f"or newer, which brings it (torch {torch.__version__} is installed)"
    ]
