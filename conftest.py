"""What tests and benchmarks share: the device, and Triton's interpreter where there is none."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton or otfuse is imported: they look at it then
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are: cpu (default), cuda or hpu")


def pytest_configure(config: pytest.Config) -> None:
    if torch.device(config.getoption("--device")).type != "hpu":
        return
    import otfuse  # noqa: F401  # names our kernels to Habana's graph compiler, which looks when the Gaudi is opened

    try:
        import habana_frameworks.torch  # noqa: F401  # makes the device known to torch
    except ImportError as error:
        raise pytest.UsageError(f"--device hpu needs Habana's PyTorch ({error}); see docs/gaudi.md") from error


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
