"""What pyproject.toml cannot say: where the device kernels live.

The kernel sources are a top-level folder of the repository and travel in the wheel as ``otfuse.kernels``.
"""

from setuptools import find_packages, setup

KERNELS = {"otfuse.kernels.triton": "kernels/triton", "otfuse.kernels.tpc": "kernels/tpc"}

setup(
    packages=find_packages(include=["otfuse", "otfuse.*"]) + list(KERNELS),
    package_dir=KERNELS,
    package_data={"otfuse": ["py.typed"], "otfuse.kernels.triton": ["*.json"]},
)
