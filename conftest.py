"""What tests and benchmarks share: the device, and Triton's interpreter where there is none."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton or otfuse is imported: they look at it then
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are: cpu (default), cuda or hpu")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name.startswith("hpu"):
        pytest.importorskip("habana_frameworks.torch", reason="it comes with Intel's Gaudi containers")
    return torch.device(name)
