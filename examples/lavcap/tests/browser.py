"""A real browser for the tests of pages: Chromium, driven by playwright; they skip where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 300_000  # milliseconds: a busy machine is no failure


@contextmanager
def open_browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("pages are tested in Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # No sandbox: tests run as root in containers, where Chromium refuses to start with one.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()
