"""Time against accuracy: more and more rounds, each answer held against the converged plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from measured import Answer, Answers, Measured, inputs_of
from selection import chosen
from timing import CONVERGED

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("measured", chosen("accuracy", metafunc.config), ids=str)


@pytest.fixture(scope="module")
def converged(device: torch.device) -> Callable[[Measured], Answer]:
    """Of the problem, whatever the number of rounds: solved once."""

    @cache
    def of(measured: Measured) -> Answer:
        return Answers(measured, inputs_of(measured, device)).of(CONVERGED)

    return of


def test_curve(
    measured: Measured, race: Callable[..., None], timed: bool, converged: Callable[[Measured], Answer]
) -> None:
    seen = measured if timed else measured.shrunk()
    answer = converged(replace(seen, case=replace(seen.case, T=1)))

    def distance(tensors: Any) -> dict[str, float]:
        return {"from_converged": answer.error(tensors)}

    race(measured, "accuracy", extra=distance)
