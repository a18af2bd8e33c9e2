"""The pictures of the README: a captioner of clips that are made here, captioned, reported and served, in Chromium.

    python screenshots.py --work DIR --out DIR

What the captioner writes shows nothing but that it learned six synthetic clips; it is there to be looked at.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny
from lavcap.cli import main as lavcap
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from synthetic import write_clips

DROPPED = "square-triangle_0.mp4"
PATIENCE = 120_000  # milliseconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def run(work: Path, out: Path) -> None:
    clips, run_folder, scores = work / "clips", work / "tiny" / "run", work / "tiny" / "scores"
    if not (scores / "scores.json").is_file():  # half the work need not be done again to change a page
        captions = write_clips(clips)
        tiny.run(clips, captions, work / "tiny", work / "results", platform.processor(), [])
    out.mkdir(parents=True, exist_ok=True)
    _succeed(["caption", str(clips / DROPPED), "--checkpoint", str(run_folder), "--out", str(work / "pictures")])
    shrink(work / "pictures" / f"{DROPPED}.png", out / "lavcap-caption.webp")
    _succeed(["report", str(scores), "--media", str(clips)])
    with chromium() as browser:
        photograph_report(browser, scores / "report.html", work)
        photograph_demo(browser, run_folder, clips / DROPPED, work / "demo.png")
    for name in ("report", "report-dark-phone", "demo"):
        shrink(work / f"{name}.png", out / f"lavcap-{name}.webp")


def photograph_report(browser: Browser, page: Path, out: Path) -> None:
    """Sorted, on a desk; and one clip on a telephone in the dark."""
    desk = browser.new_page(viewport={"width": 1280, "height": 1580})
    desk.goto(page.resolve().as_uri())
    desk.locator("#table").get_by_role("button", name="CIDEr-D").click()
    desk.evaluate("document.activeElement.blur()")
    desk.screenshot(path=out / "report.png")
    phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, color_scheme="dark")
    phone.goto(page.resolve().as_uri() + "#clip-2")
    phone.screenshot(path=out / "report-dark-phone.png")


def photograph_demo(browser: Browser, run_folder: Path, clip: Path, out: Path) -> None:
    command = [sys.executable, "-m", "lavcap.cli", "demo", "--checkpoint", run_folder.name]
    with subprocess.Popen(command, cwd=run_folder.parent, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            page = browser.new_page(viewport={"width": 1280, "height": 620})
            page.set_default_timeout(PATIENCE)
            page.goto(found[0])
            page.locator("#video input[type=file]").set_input_files(clip)
            page.wait_for_function("document.querySelector('#picture img')?.naturalWidth == 1600")
            page.screenshot(path=out)
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


def shrink(picture: Path, target: Path) -> None:
    Image.open(picture).convert("RGB").save(target, quality=80, method=6)


def _succeed(command: list[str]) -> None:
    if lavcap(command) != 0:
        raise SystemExit(f"lavcap {' '.join(command)} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of the README, made of synthetic clips.")
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, training and pages; used again")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args()
    run(args.work, args.out)


if __name__ == "__main__":
    main()
