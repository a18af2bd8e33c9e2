"""Where the time of a training step of LAVCap goes, where examples/lavcap is installed."""

from __future__ import annotations

from typing import Any

import pytest
import step
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # of what transformers deprecates


def test_step(request: pytest.FixtureRequest, results: Any, timed: bool, device: torch.device) -> None:
    option = request.config.option
    if option.dry_run:
        pytest.skip("an interpreter's time says nothing")
    try:
        import lavcap  # noqa: F401
    except ImportError as missing:
        reason = f"{missing}: {step.WAY_OUT}"
        results.say_absent("training step", {"lavcap": reason})
        results.leave_out("training step", reason)
    if timed and results.spent:
        results.leave_out("training step", "the time for all was spent (--minutes)")
    sizes, rounds = (step.PAPER, 3) if timed else (step.TINY, 2)
    rows = step.budget(sizes, device, "auto", rounds, option.clock)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    if timed:
        results.add(rows)
