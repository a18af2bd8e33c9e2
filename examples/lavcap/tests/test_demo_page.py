"""The page of ``lavcap demo``, served by the command itself and used in a browser."""

from __future__ import annotations

import io
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from browser import PATIENCE
from lavcap.caption import FileCaptioner
from lavcap.checkpoint import load_checkpoint
from lavcap.cli import main
from lavcap.demo import answer
from media import write_clip
from PIL import Image
from small import small_config, write_checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SECONDS = PATIENCE / 1000


class Outside:
    """A proxy that lets nothing through and knows that it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                self.asked.append(connection.recv(200))

    def close(self) -> None:
        self._socket.close()


class Demo(NamedTuple):
    address: str
    checkpoint: Path
    outside: Outside


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Demo]:
    """The command, in a process whose way to any network leads to :class:`Outside`."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("demo")
    checkpoint, outside = write_checkpoint(folder / "run", small_config(folder)), Outside()
    proxies = {f"{kind}_proxy": outside.address for kind in ("http", "https", "all")}
    proxies |= {name.upper(): value for name, value in proxies.items()}
    local = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost", "GRADIO_TEMP_DIR": str(folder / "g")}
    command = [sys.executable, "-m", "lavcap.cli", "demo", "--checkpoint", str(checkpoint), "--device", "cpu"]
    environment = os.environ | proxies | local
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if ready else ""
            found = re.fullmatch(r"lavcap demo: (http://127.0.0.1:\d+/) \(Ctrl\+C ends it\)\n", line)
            assert found, line
            yield Demo(found[1], checkpoint, outside)
        finally:
            process.terminate()
            outside.close()


@pytest.fixture
def page(browser: Browser, demo: Demo) -> Iterator[Page]:
    """Opened, and after the test: it asked its own server only."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(demo.address)
    yield page
    assert asked and [url for url in asked if not url.startswith((demo.address, "data:", "blob:"))] == []
    context.close()


def drop(page: Page, path: Path) -> None:
    page.locator("#video input[type=file]").set_input_files(path)


def test_files_are_dropped(page: Page, demo: Demo, tmp_path: Path) -> None:
    """In one test: run side by side, two would start the command twice."""
    a_video_is_captioned_beside_its_alignment(page, demo, tmp_path)
    a_bad_file_gets_a_message_and_the_page_goes_on(page, tmp_path)
    assert demo.outside.asked == []


def a_video_is_captioned_beside_its_alignment(page: Page, demo: Demo, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3.0)
    captioner = FileCaptioner(load_checkpoint(demo.checkpoint))
    (result,) = captioner.caption([clip])
    caption, picture, _ = answer(result, captioner.checkpoint.config)
    assert caption and picture is not None

    drop(page, clip)
    image = page.locator("#picture img")
    image.wait_for()
    page.wait_for_function("document.querySelector('#picture img').naturalWidth == 1600")
    assert page.locator("#caption textarea").input_value() == caption
    assert "3.0 s of clip.mp4." in page.locator("#notes").inner_text()
    assert "ot_att: plan of 18 × 6 tokens, ε = 0.1, 50 rounds" in page.locator("#notes").inner_text()
    left, right = page.locator("#caption").bounding_box(), image.bounding_box()
    assert left is not None and right is not None and left["x"] + left["width"] <= right["x"] < 1280 - 600

    address = image.get_attribute("src")
    assert address is not None
    shown = np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB"))
    assert shown.shape == picture.shape
    assert np.abs(shown.astype(int) - picture).mean() < 0.1  # of 255: the very picture of this clip's plan


def a_bad_file_gets_a_message_and_the_page_goes_on(page: Page, tmp_path: Path) -> None:
    (tmp_path / "minutes.txt").write_text("minutes of a meeting\n" * 50)
    mute = write_clip(tmp_path / "mute.mp4", sound=None)
    for path, message in {tmp_path / "minutes.txt": "cannot be read as sound and picture", mute: "no sound"}.items():
        page.reload()
        drop(page, path)
        alert = page.locator("#notes").get_by_role("alert")
        alert.wait_for()
        assert alert.inner_text().startswith(path.name) and message in alert.inner_text()
        assert page.locator("#caption textarea").input_value() == "" and page.locator("#picture img").count() == 0
    page.reload()
    drop(page, write_clip(tmp_path / "quiet.mp4", 2.0, sound=lambda times: 0 * times))
    page.locator("#picture img").wait_for()
    assert "it is silent" in page.locator("#notes").inner_text()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert main(["demo", "--checkpoint", str(tmp_path)]) == 2
    assert "pip install 'lavcap[demo]'" in capsys.readouterr().err
