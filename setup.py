"""What pyproject.toml cannot say: where the device kernels live, and the optional build for Intel Gaudi.

The kernel sources are a top-level folder of the repository and travel in the wheel as ``otfuse.kernels``. The wheel is
pure Python. ``OTFUSE_BUILD_TPC=1`` adds the two libraries of ``kernels/tpc/build.py``, or fails naming what is missing.
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

KERNELS = {
    "otfuse.kernels.triton": "kernels/triton",
    "otfuse.kernels.tpc": "kernels/tpc",
    "otfuse.kernels.tpc.model": "kernels/tpc/model",
}
TPC_SOURCES = ["*.md", *(f"*/*.{ending}" for ending in ("c", "h", "cpp", "hpp"))]
BUILD_TPC = os.environ.get("OTFUSE_BUILD_TPC", "") or "0"
if BUILD_TPC not in ("0", "1"):
    raise SystemExit(f"OTFUSE_BUILD_TPC must be 1 (build the Gaudi libraries) or 0; got {BUILD_TPC!r}")


class BuildWithTpc(build_py):
    """The Python files, and the Gaudi libraries beside the kernels' sources."""

    def run(self):
        tpc = runpy.run_path("kernels/tpc/build.py")
        package = "kernels/tpc" if self.editable_mode else Path(self.build_lib, "otfuse/kernels/tpc")
        try:
            tpc["build"](Path(package, "lib"))
        except tpc["BuildError"] as error:
            raise SystemExit(f"OTFUSE_BUILD_TPC=1: {error}") from None
        super().run()


class PlatformDistribution(Distribution):
    """A wheel for this Python and machine, not for all."""

    def has_ext_modules(self):
        return True


setup(
    packages=find_packages(include=["otfuse", "otfuse.*"]) + list(KERNELS),
    package_dir=KERNELS,
    package_data={"otfuse": ["py.typed"], "otfuse.kernels.triton": ["*.json"], "otfuse.kernels.tpc": TPC_SOURCES},
    **({"cmdclass": {"build_py": BuildWithTpc}, "distclass": PlatformDistribution} if BUILD_TPC == "1" else {}),
)
