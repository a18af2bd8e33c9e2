"""``sinkhorn_attend`` beside other ways to the same tokens, forward and with each gradient, on any device.

Every contender is checked against the specification in float64 before it is timed. Tokens are clustered, but where it
says otherwise: random ones converge in a few rounds and flatter everybody.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import lavcap
from measured import Measured
from selection import chosen

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" in metafunc.fixturenames:
        metafunc.parametrize("measured", chosen("attend", metafunc.config), ids=str)


def test_attend(measured: Measured, race: Callable[..., None]) -> None:
    race(measured, "attend")


def test_traffic_of_the_main_case() -> None:
    """The 16.5 MB that the time limits of the project were set by, and what a backward adds."""
    main = lavcap(64)
    tokens = 64 * (64 + 20) * 768 * 2
    assert main.attend_traffic(2) == 2 * tokens == 16_515_072
    assert main.attend_traffic(2, "detach") == 5 * tokens
    assert main.attend_traffic(2, "unroll") == 5 * tokens + 2 * 64 * 50 * 84 * 4
    assert main.attend_flops() == 64 * 64 * 20 * (3 * 2 * 768 + 4 * 50)
