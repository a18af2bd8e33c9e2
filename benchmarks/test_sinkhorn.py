"""The solver alone, cost given and plan out, and its gradient, beside other people's solvers, on any device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from measured import Measured
from selection import chosen

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("measured", chosen("solve", metafunc.config), ids=str)


def test_solve(measured: Measured, race: Callable[..., None]) -> None:
    race(measured, "solve")
