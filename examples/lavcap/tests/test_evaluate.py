"""From a checkpoint and a prepared split to captions and scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lavcap.checkpoint import load_checkpoint
from lavcap.cli import main
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import collate
from lavcap.data.shards import open_split
from lavcap.evaluate import caption_batch, caption_clips
from lavcap.evaluation import read_evaluation
from lavcap.visual import visual_fingerprint
from small import Clips, small_config, write_checkpoint

import otfuse

NUM_CLIPS = 5


class Place(NamedTuple):
    checkpoint: Path
    data: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkpoint of random weights, and a prepared split of noise."""
    place = Place(tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("prepared"))
    config = small_config(place.checkpoint)
    write_checkpoint(place.checkpoint, config)
    fingerprint = visual_fingerprint(config.visual)
    settings = {"num_candidates": NUM_CLIPS, "clips_per_shard": 2, "visual": fingerprint}
    with open_split(place.data / "test", settings) as writer:
        for clip in Clips(NUM_CLIPS):
            writer.keep(clip.clip_id, clip.captions, clip.waveform, clip.visual)
    return place


def test_every_clip_gets_the_caption_it_gets_alone(place: Place) -> None:
    checkpoint, clips = load_checkpoint(place.checkpoint), PreparedDataset(place.data, "test")
    generation = checkpoint.config.generation
    found = list(caption_clips(checkpoint, clips, generation))
    assert [clip.clip_id for clip in found] == clips.clip_ids
    assert [clip.references for clip in found] == [clip.captions for clip in clips]
    alone = [caption_batch(checkpoint, collate([clip]), generation)[0] for clip in clips]
    assert [clip.caption for clip in found] == [clip.caption for clip in alone]
    assert any(clip.caption for clip in alone)
    for together, (_, plan) in zip(found, alone):
        torch.testing.assert_close(together.plan, plan)


def test_the_plan_is_the_fusions_without_padding(place: Place) -> None:
    """Two clips of other lengths in one batch: each plan is what otfuse makes of that clip's own tokens."""
    (captioner, _, config), clips = load_checkpoint(place.checkpoint), list(PreparedDataset(place.data, "test"))[:2]
    batch = collate(clips)
    found = [plan for _, plan in caption_batch(load_checkpoint(place.checkpoint), batch, config.generation)]
    with torch.no_grad():
        audio, audio_mask = captioner.audio(batch.waveform, batch.num_samples)
        visual = captioner.visual_adapter(batch.visual)
    for clip, plan in enumerate(found):
        x, y = audio[clip, audio_mask[clip]], visual[clip, : batch.num_frames[clip]]
        cost = -otfuse.similarity_matrix(x[None], y[None], config.solver.similarity.value)
        expected = otfuse.sinkhorn(cost, config.solver.epsilon, num_iters=config.solver.num_iters).plan[0]
        assert plan is not None and plan.shape == (len(x), len(y))
        torch.testing.assert_close(plan, expected, rtol=1e-4, atol=1e-7)
    assert len({plan.shape for plan in found if plan is not None}) == 2


@pytest.mark.usefixtures("java")
def test_the_command(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["evaluate", str(place.checkpoint), "--data", str(place.data), "--out", str(out), "--resamples", "50"]
    assert main([*command, "--device", "cpu", "--set", "generation.batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "scores.md").read_text())
    assert "| LAVCap | 72.3 |" in printed and f"test**, {NUM_CLIPS} clips" in printed

    checkpoint, clips = load_checkpoint(place.checkpoint), PreparedDataset(place.data, "test")
    rows = list(csv.DictReader((out / "captions.csv").read_text().splitlines()))
    expected = list(caption_clips(checkpoint, clips, checkpoint.config.generation))
    assert [(row["clip_id"], row["caption"]) for row in rows] == [(clip.clip_id, clip.caption) for clip in expected]
    assert [row["reference_1"] for row in rows] == [clip.captions[0] for clip in clips]
    report = json.loads((out / "scores.json").read_text())
    assert report["clips"] == NUM_CLIPS and set(report["metrics"]) >= {"BLEU-4", "METEOR", "CIDEr-D"}
    rouge = sum(float(row["ROUGE-L"]) for row in rows) / NUM_CLIPS
    assert report["metrics"]["ROUGE-L"]["score"] == pytest.approx(rouge, abs=1e-4)
    kept = read_evaluation(out)
    assert kept.report == report and kept.origin.split == "test"
    for clip in expected:
        torch.testing.assert_close(kept.origin.plans[clip.clip_id], clip.plan)


@pytest.mark.usefixtures("java")
def test_some_clips_by_their_ids(place: Place, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("clip_3\nclip_1\n")
    command = ["evaluate", str(place.checkpoint), "--data", str(place.data), "--out", str(tmp_path / "out")]
    assert main([*command, "--ids", str(tmp_path / "ids.txt"), "--resamples", "10"]) == 0
    rows = csv.DictReader((tmp_path / "out" / "captions.csv").read_text().splitlines())
    assert [row["clip_id"] for row in rows] == ["clip_1", "clip_3"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("java")
def test_what_is_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", place.data)
    assert "no checkpoint in" in refusal(capsys, tmp_path, *data)
    assert "no prepared split" in refusal(capsys, place.checkpoint, *data, "--split", "val")
    message = refusal(capsys, place.checkpoint, *data, "--set", "audio.size=base")
    assert "--set audio.size=base: a trained captioner is as it is" in message
    with open_split(tmp_path / "test", {"num_candidates": 1, "clips_per_shard": 1, "visual": "another"}) as writer:
        writer.keep("clip_0", ("a dog",), torch.zeros(8000), torch.zeros(2, 8))
    assert "were made by another, the config says" in refusal(capsys, place.checkpoint, "--data", tmp_path)


def test_without_java_nothing_is_begun(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert "default-jre-headless" in refusal(capsys, place.checkpoint, "--data", place.data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
