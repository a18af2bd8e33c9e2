"""Time against accuracy: more and more rounds, each answer held against the converged plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measured import Measured, converged
from selection import chosen

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours
BESIDE = ("otfuse", "POT ot.batch", "ott-jax", "geomloss", "log domain")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("measured", chosen("accuracy", metafunc.config), ids=str)


def test_curve(measured: Measured, race: Callable[..., None], timed: bool, device: torch.device) -> None:
    seen = measured if timed else measured.shrunk()
    answer = converged(replace(seen, case=replace(seen.case, T=1)), device)

    def distance(tensors: Any) -> dict[str, float]:
        return {"from_converged": answer.error(tensors)}

    race(measured, "accuracy", only=BESIDE, extra=distance)
