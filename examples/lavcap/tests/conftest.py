"""METEOR loads for seconds: tests that score share one process of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from lavcap.scoring import agreement, metrics


@pytest.fixture(scope="session")
def meteor() -> Iterator[metrics.MeteorScorer]:
    if shutil.which("java") is None:
        pytest.skip("the tokeniser and METEOR need Java")
    with metrics.MeteorScorer() as scorer:
        yield scorer


@pytest.fixture
def java(meteor: metrics.MeteorScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored in the test is scored with the session's METEOR."""
    for module in (agreement, metrics):
        monkeypatch.setattr(module, "MeteorScorer", lambda: nullcontext(meteor))
