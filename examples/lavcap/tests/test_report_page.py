"""The page of an evaluation: what is in the file, and what it does in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from browser import PATIENCE
from lavcap.cli import main
from lavcap.config import Config, VisualOnly
from lavcap.config_file import config_from_dict, config_to_dict
from lavcap.data.shards import open_split
from lavcap.evaluation import Origin, write_origin
from lavcap.page.html import percent
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from media import write_clip
from PIL import Image
from small import small_config

from otfuse.viz import lift

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = "<script>document.title='stolen'</script> & \"it's\" <img src=x onerror=\"document.title='stolen'\">"
CAPTIONS = {
    "wind_10": "wind blows",
    "dog_2": EVIL,
    "dog_10": "a dog barks",
    "odd'\"<b>_3": "",
}
REFERENCES = {
    "wind_10": ["wind", "a storm"],
    "dog_2": ["</ol><h1>a dog</h1>", "barking"],
    "dog_10": ["a dog is barking"],
    "odd'\"<b>_3": ["rain falls"],
}
SCORES = {"BLEU-4": [0.25, 0.0, 1.0, 0.0], "CIDEr-D": [0.9, 2.5, 0.05, 0.3]}
COLOURS = [(250, 40, 40), (40, 40, 250), (40, 250, 40)]


class Place(NamedTuple):
    folder: Path  # the evaluation
    media: Path
    plans: dict[str, torch.Tensor]


def evaluation(folder: Path, config: Config, plans: dict[str, torch.Tensor]) -> Path:
    """What ``lavcap evaluate`` leaves behind, with captions that mean no good."""
    folder.mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", "caption", *SCORES, "reference_1", "reference_2"])
        for number, (clip_id, caption) in enumerate(CAPTIONS.items()):
            scores = [f"{values[number]:.4f}" for values in SCORES.values()]
            writer.writerow([clip_id, caption, *scores, *REFERENCES[clip_id]])
    report = {
        "name": "checkpoint-3 <i>, test",
        "clips": len(CAPTIONS),
        "metrics": {name: {"score": np.mean(v), "low": min(v), "high": max(v)} for name, v in SCORES.items()},
        "missing": {"SPICE": "no <jar>"},
        "bootstrap": {"resamples": 10, "confidence": 0.95, "seed": 0},
        "conditions": {},
    }
    (folder / "scores.json").write_text(json.dumps(report))
    write_origin(folder, Origin("/home/me/runs/<one>", str(folder.parent / "prepared"), "test", config, plans))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Media files for the first two clips; sound of the third in a prepared set; nothing of the fourth."""
    root = tmp_path_factory.mktemp("report")
    media = root / "media"
    generator = torch.Generator().manual_seed(0)
    plans = {}
    for number, clip_id in enumerate(list(CAPTIONS)[:3]):
        shape = (12, 4)  # two seconds
        plans[clip_id] = torch.softmax(2 * torch.randn(48, generator=generator), 0).reshape(shape)
        if number < 2:
            write_clip(
                media / f"{clip_id}.mkv",
                picture=lambda time, k=number: np.full((48, 64, 3), COLOURS[(int(2 * time) + k) % 3], np.uint8),
            )
    config = small_config(root / "run")
    with open_split(root / "prepared" / "test", {"num_candidates": 1, "clips_per_shard": 1, "visual": "x"}) as writer:
        writer.keep("dog_10", ("a dog is barking",), torch.rand(32000), torch.zeros(4, 8))
    return Place(evaluation(root / "scores", config, plans), media, plans)


@pytest.fixture(scope="module")
def path(place: Place) -> Path:
    assert main(["report", str(place.folder), "--media", str(place.media)]) == 0
    return place.folder / "report.html"


class Parsed(HTMLParser):
    """Elements in order, each with its attributes and the text directly in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), []))
        if tag not in ("img", "meta", "input", "path"):
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.elements[self._open.pop()][0] == tag  # well nested

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[self._open[-1]][2].append(data)

    def find(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, "".join(texts).strip())
            for name, attributes, texts in self.elements
            if name == tag and all(attributes.get(key.rstrip("_")) == value for key, value in wanted.items())
        ]


def picture(address: str | None) -> np.ndarray:
    assert address is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB"))


def test_the_file_holds_every_clip(place: Place, path: Path) -> None:
    page = Parsed(path.read_text(encoding="utf-8"))
    assert [text for _, text in page.find("h3")] == list(CAPTIONS)
    assert [text for _, text in page.find("p", class_="caption")] == [text for text in CAPTIONS.values()]
    assert [text for _, text in page.find("li")] == [text for texts in REFERENCES.values() for text in texts]
    cells = [(a["data-value"], text) for a, text in page.find("td", class_="number")]
    expected = [value for values in zip(*SCORES.values()) for value in values]
    assert [float(value or "nan") for value, _ in cells] == expected
    assert [text for _, text in cells] == [percent(value) for value in expected] == [t for _, t in page.find("dd")]
    codes = [text for _, text in page.find("code")]
    assert codes == ["prepared/test", "runs/<one>", "ot_att"]  # the ends of paths
    assert page.find("h1")[0][1] == "checkpoint-3 <i>, test"
    assert any("no <jar>" in text for _, text in page.find("p"))
    assert path.stat().st_size < 150_000


def test_pictures_are_the_clips_and_the_plan_is_the_evaluations(place: Place, path: Path) -> None:
    page = Parsed(path.read_text(encoding="utf-8"))
    films = [picture(attributes["src"]) for attributes, _ in page.find("img", class_="film")]
    assert [film.shape for film in films] == [(72, 4 * 72, 3)] * 2
    for number, film in enumerate(films):
        middles = film[36, 36::72].astype(int)
        assert np.abs(middles - [COLOURS[(k + number) % 3] for k in range(4)]).max() < 25
    heats = page.find("img", class_="heat")
    assert len(heats) == 3
    for (attributes, _), plan in zip(heats, place.plans.values()):
        ratio = lift(plan)
        expected = colormaps["Blues"](LogNorm(1, 16)(ratio.clip(1, 16)))[..., :3]
        assert np.abs(picture(attributes["src"]) / 255 - expected).max() < 0.003
        best = int((plan - torch.outer(plan.sum(1), plan.sum(0))).argmax())
        row, column = divmod(best, plan.shape[1])
        strongest = (
            f"sound at {0.075 + 0.16 * row:.1f} s with picture at {column / 2:.1f} s, {ratio[row, column]:.1f} times"
        )
        assert f"Strongest pairs: {strongest}" in (attributes["alt"] or "")
    sounds = [picture(attributes["src"]) for attributes, _ in page.find("img", class_="sound")]
    assert [sound.shape for sound in sounds] == [(64, 200, 3)] * 3
    assert sounds[0][48:].mean() > 1.2 * sounds[0][:24].mean()  # 440 Hz lies in the lower bands, which are below
    missing = [text for _, text in page.find("p", class_="missing")]
    assert missing[0] == "No media file dog_10: --media names the folder that has it."
    assert "No sound: the prepared set has no such clip." in missing[1] and len(missing) == 2


def test_nothing_is_asked_from_elsewhere_and_nothing_is_run_but_its_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert [attributes for attributes, _ in page.find("script")] == [{}]
    assert page.find("script")[0][1] == files("lavcap.page").joinpath("page.js").read_text(encoding="utf-8").strip()
    for tag, attributes, _ in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")  # type: ignore[union-attr]
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert "link" not in {tag for tag, _, _ in page.elements} and "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all((attributes["href"] or "")[1:] in ids for attributes, _ in page.find("a"))
    assert all(attributes.get("alt") for attributes, _ in page.find("img"))


def test_without_media_and_without_a_plan(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config_to_dict(small_config(tmp_path))
    config = config_from_dict(settings | {"fusion": {"kind": "visual_only"}, "loss": {"ot_weight": 0}})
    assert isinstance(config.fusion, VisualOnly)
    folder = evaluation(tmp_path / "run" / "test", config, {})
    out = tmp_path / "page.html"
    command = ["report", str(folder.parent), "--data", str(place.folder.parent / "prepared"), "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "dog_10: No pictures: 'lavcap report' was not given --media" in printed and f"{out}: 4 clips" in printed
    (tmp_path / "empty").mkdir()
    assert main([*command, "--media", str(tmp_path / "empty")]) == 0
    assert "dog_10: No media file dog_10: --media names the folder that has it." in capsys.readouterr().out
    page = Parsed(out.read_text(encoding="utf-8"))
    assert [attributes["class"] for attributes, _ in page.find("img")] == ["sound"] and not page.find("svg")
    assert page.find("figcaption")[0][1] == "fusion visual_only has no transport plan: none is drawn"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_is_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no folder" in refusal(capsys, tmp_path / "nowhere")
    assert "no evaluation in" in refusal(capsys, tmp_path)
    assert "no prepared split" in refusal(capsys, place.folder, "--data", tmp_path)
    assert "no folder of media files" in refusal(capsys, place.folder, "--media", tmp_path / "nowhere")
    for name in ("val", "test"):
        evaluation(tmp_path / "run" / name, small_config(tmp_path), {})
    assert f"has 2 evaluations: name one of {tmp_path / 'run' / 'test'}, " in refusal(capsys, tmp_path / "run")
    (tmp_path / "run" / "val" / "evaluation.json").unlink()
    assert "lacks evaluation.json" in refusal(capsys, tmp_path / "run" / "val")


def order(page: Page) -> list[str]:
    """Names in the table, which must be those of the cards that are shown below it."""
    shown = [name for name in page.locator("#table tbody th").all() if name.is_visible()]
    cards = [name for name in page.locator("article h3").all() if name.is_visible()]
    names = [name.text_content() or "" for name in shown]
    assert [name.text_content() for name in cards] == names
    return names


@pytest.fixture
def opened(browser: Browser, path: Path) -> Page:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(path.as_uri())
    return page


def test_sorting_by_every_column(opened: Page) -> None:
    wind, dog_2, dog_10, odd = CAPTIONS
    assert order(opened) == [wind, dog_2, dog_10, odd]
    for column, expected in {
        "clip": [dog_2, dog_10, odd, wind],  # numbers in names count as numbers
        "caption": [odd, dog_2, dog_10, wind],
        "BLEU-4": [dog_10, wind, dog_2, odd],  # equals stay in the set's order
        "CIDEr-D": [dog_2, wind, odd, dog_10],
    }.items():
        head = opened.locator("#table").get_by_role("columnheader", name=column)
        head.get_by_role("button").click()
        first = head.get_attribute("aria-sort")
        assert first == ("ascending" if column in ("clip", "caption") else "descending")
        assert order(opened) == expected
        assert opened.locator("[aria-sort]").count() == 1
        assert opened.get_by_role("status").inner_text() == f"4 of 4 clips, sorted by {column}, {first}"
    opened.keyboard.press("Enter")  # on the button, which has the focus
    assert head.get_attribute("aria-sort") == "ascending" and order(opened) == [dog_10, odd, wind, dog_2]


def test_filtering_and_the_keyboard(opened: Page) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    opened.get_by_role("searchbox").fill("DOG bark")
    assert order(opened) == ["dog_2", "dog_10"]
    assert opened.get_by_role("status").inner_text().startswith("2 of 4 clips")
    opened.keyboard.press("Enter")  # asks no one
    assert order(opened) == ["dog_2", "dog_10"]
    opened.get_by_role("searchbox").fill("storm")
    assert order(opened) == ["wind_10"]
    opened.get_by_role("searchbox").fill("")
    assert len(order(opened)) == 4


def test_a_caption_runs_no_script(opened: Page) -> None:
    assert opened.title() == "checkpoint-3 <i>, test: captions clip by clip"
    assert EVIL in (opened.locator("#clip-1").text_content() or "")
    blocked = "() => { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">') }"
    opened.evaluate(blocked)  # what would escape the escaping is stopped by the page's policy
    opened.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert opened.title() != "1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_and_in_the_dark(browser: Browser, path: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # only tables and strips scroll sideways
    images = "[...document.images].map(i => i.decode().then(() => i.naturalWidth))"
    assert all(page.evaluate(f"Promise.all({images})"))
    channels = "getComputedStyle(document.body).{}.match(/\\d+/g).slice(0, 3).map(Number)"
    paper, ink = (np.mean(page.evaluate(channels.format(name))) for name in ("backgroundColor", "color"))
    assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 40 and ink > 200)
