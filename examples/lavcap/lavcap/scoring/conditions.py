"""What a score depends on beside the captions: versions of what computed it."""

from __future__ import annotations

import platform
from importlib.metadata import version

from lavcap.scoring.java import java_version


def conditions() -> dict[str, str]:
    return {
        "pycocoevalcap": version("pycocoevalcap"),
        "java": str(java_version()),
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }
