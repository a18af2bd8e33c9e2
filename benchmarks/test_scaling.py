"""Time against batch, size, rounds and features, one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from measured import Measured
from selection import axes

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours
BESIDE = ("otfuse", "POT ot.batch", "log domain, eager")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    points = [] if option.dry_run else axes(option.device)
    if not option.benchmark_enable:
        points = list({axis: (axis, at, measured) for axis, at, measured in points}.values())
    metafunc.parametrize(("axis", "at", "measured"), points, ids=str)


def test_scaling(axis: str, at: int, measured: Measured, race: Callable[..., None]) -> None:
    race(measured, "scaling", only=BESIDE, axis=axis, at=at)
