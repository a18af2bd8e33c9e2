"""What takes seconds to start is shared: tests that score have one process of METEOR, those of a page one browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from browser import open_browser
from lavcap.scoring import agreement, metrics

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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


@pytest.fixture(scope="module")  # and no longer: while it is open, no test in the process can run an event loop
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened
