"""Two of the real clips through every part, for a few updates; ``make tiny`` does it in earnest."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1]
DATA = EXAMPLE.parents[2] / "shared" / "data"
RESULTS = EXAMPLE / "results" / "tiny"
CLIPS = ("6BJ455B1aAs_0", "FDwK7T1JO_0_160")


def read_captions(folder: Path) -> list[dict[str, str]]:
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    return [row["ce_loss"] for row in json.loads((folder / "log.json").read_text())["losses"] if "ce_loss" in row]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real clips in ../shared/data")
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR and the tokeniser of the scores need Java")
def test_real_clips_go_through_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    tiny = __import__("tiny")
    for name in CLIPS:
        (tmp_path / "clips").mkdir(exist_ok=True)
        (tmp_path / "clips" / f"{name}.mp4").symlink_to(DATA / "clips" / f"{name}.mp4")
    short = ["train.epochs=50", "train.warmup_epochs=4", "train.batch_size=2", "train.log_steps=10"]
    captions, work, out = DATA / "audiocaps" / "test.csv", tmp_path / "work", tmp_path / "out"
    tiny.run(tmp_path / "clips", captions, work, out, "test", [*short, "train.validate_epochs=50"])
    assert losses(out)[-1] < 0.6 * losses(out)[0]
    assert sorted(row["clip_id"] for row in read_captions(out)) == sorted(CLIPS)
    assert all(row["caption"] for row in read_captions(out))
    assert set(json.loads((out / "conditions.json").read_text())["seconds"]) == {"prepare", "train", "evaluate"}


def test_the_committed_run_learned_its_clips() -> None:
    rows = read_captions(RESULTS)
    assert len(rows) == 6 and all(row["is_a_reference"] == "True" for row in rows)
    assert losses(RESULTS)[-1] < 0.2 * losses(RESULTS)[0]
