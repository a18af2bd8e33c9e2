"""What all tests share: hypothesis profiles, the device, the backends, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Generator

import hypothesis
import problems
import pytest
import torch

from otfuse import testing
from otfuse._backends.base import is_installed
from otfuse._backends.select import BACKENDS
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._problem import SolveOptions, cost_problem

BACKEND_NAMES = ("torch", "cpu", "triton", "tpc")

if INTERPRETED and is_installed("triton"):
    import interpreter  # noqa: F401

hypothesis.settings.register_profile("same", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile("others", parent=hypothesis.settings.get_profile("same"), derandomize=False)
hypothesis.settings.load_profile("same")  # with --hypothesis-profile others: new examples at every run


def pytest_configure() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic algorithms on CUDA
    # Deterministic mode fills torch.empty with NaN: a result that nobody wrote is seen at once.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)  # small parallel operations wait on each other for milliseconds


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A backend without float64 is tested in float32: what asks for float64 skips, what names no dtype takes it.

    On a GPU, what is parametrised over backends and names no device runs there for Triton.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    problems.use(torch.float64)
    device = torch.device(item.config.getoption("--device"))
    on_gpu = device.type == "cuda" and "triton" in (parameters.get("backend"), parameters.get("fused"))
    problems.put(device if on_gpu else torch.device("cpu"))
    if parameters.get("backend") == "tpc":
        if {"float64", "torch.float64"} & {str(value) for value in parameters.values()}:
            pytest.skip("tpc: the machine has no float64")
        problems.use(torch.float32)


class SingleEvaluation:
    """One, as a count that knows whether it was asked for."""

    was_taken = False

    def __index__(self) -> int:
        self.was_taken = True
        return 1


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """First with a single evaluation of every reference, which allows no more than several and takes less time.

    Only a test that evaluated one is repeated, with all of them: what fails by chance elsewhere fails.
    """
    several, testing.EVALUATIONS = testing.EVALUATIONS, (single := SingleEvaluation())
    try:
        return (yield)
    except Exception:
        if not single.was_taken:
            raise
        testing.EVALUATIONS = several
        pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
        return True
    finally:
        testing.EVALUATIONS = several


@pytest.fixture(scope="session", params=BACKEND_NAMES)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The name of every backend that runs here; the others skip with their own reasons."""
    (chosen,) = (candidate for candidate in BACKENDS if candidate.name == request.param)
    problem = cost_problem(torch.zeros(1, 2, 2, device=device), None, None, SolveOptions(0.1, 1))
    if reasons := chosen.why_not(problem):
        pytest.skip(f"{chosen.name}: {'; '.join(reasons)}")
    return chosen.name
