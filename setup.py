"""What pyproject.toml cannot say: the optional build for Intel Gaudi.

``OTFUSE_BUILD_TPC=1`` adds the two libraries of ``otfuse/kernels/tpc/build.py``, or fails naming what is missing.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

BUILD_TPC = os.environ.get("OTFUSE_BUILD_TPC", "") or "0"
if BUILD_TPC not in ("0", "1"):
    raise SystemExit(f"OTFUSE_BUILD_TPC must be 1 (build the Gaudi libraries) or 0; got {BUILD_TPC!r}")


class BuildWithTpc(build_py):
    """The Python files, and the Gaudi libraries beside the kernels' sources."""

    def run(self):
        package = Path("otfuse/kernels/tpc")
        tpc = runpy.run_path(str(package / "build.py"))
        try:
            tpc["build"]((package if self.editable_mode else self.build_lib / package) / "lib")
        except tpc["BuildError"] as error:
            raise SystemExit(f"OTFUSE_BUILD_TPC=1: {error}") from None
        super().run()


class PlatformDistribution(Distribution):
    """A wheel for this Python and machine, not for all."""

    def has_ext_modules(self):
        return True


if BUILD_TPC == "1":
    setup(cmdclass={"build_py": BuildWithTpc}, distclass=PlatformDistribution)
else:
    setup()
