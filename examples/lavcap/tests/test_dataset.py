"""Prepared splits as maps, and batches of their clips."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import Sample, collate
from lavcap.data.shards import MANIFEST, open_split
from media import settings, write_split
from torch.utils.data import DataLoader


def test_any_clip_by_its_index(tmp_path: Path) -> None:
    ids = write_split(tmp_path, "train", 7, clips_per_shard=3)
    clips = PreparedDataset(tmp_path, "train")
    assert len(clips) == 7 and clips.clip_ids == ids
    for i in (6, 0, 3):
        clip = clips[i]
        assert clip.clip_id == ids[i] and clip.captions == (f"caption {i}", f"wörter {i}")
        assert clip.waveform.tolist() == [float(i)] * (i + 1) and clip.waveform.dtype == torch.float32
        assert clip.visual.tolist() == [[float(i)] * 4] * (1 + i % 3) and clip.visual.dtype == torch.float32


def test_some_clips_by_their_ids(tmp_path: Path) -> None:
    ids = write_split(tmp_path, "test", 5, clips_per_shard=2)
    chosen = PreparedDataset(tmp_path, "test", ids=[ids[3], "test-001"])  # a clip id and a YouTube id
    assert chosen.clip_ids == [ids[1], ids[3]] and chosen[1].captions[0] == "caption 3"
    with pytest.raises(ValueError, match=r"2 ids were asked for, and .* holds 1 of them"):
        PreparedDataset(tmp_path, "test", ids=[ids[3], "elsewhere_0"])


def test_a_batch_is_padded_with_zeros(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 4, clips_per_shard=4)
    loader = DataLoader(PreparedDataset(tmp_path, "train"), batch_size=4, collate_fn=collate)
    (batch,) = list(loader)
    assert batch.clip_ids == [f"train-00{i}_{i}" for i in range(4)]
    assert batch.num_samples.tolist() == [1, 2, 3, 4] and batch.num_frames.tolist() == [1, 2, 3, 1]
    assert batch.waveform.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 2, 0], [3, 3, 3, 3]]
    assert batch.visual.shape == (4, 3, 4) and batch.visual[1, :, 0].tolist() == [1, 1, 0]
    assert batch.captions[2] == ("caption 2", "wörter 2")


def test_batches_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample"):
        collate([])
    clips = [Sample("a", torch.ones(1), torch.ones(1, width), ()) for width in (2, 3)]
    with pytest.raises(ValueError, match=r"different widths \[2, 3\]"):
        collate(clips)


def test_sets_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prepared split .*/val: make it with"):
        PreparedDataset(tmp_path, "val")
    with open_split(tmp_path / "empty", settings(0, 2)):
        pass
    with pytest.raises(ValueError, match=r"holds no clip; manifest\.csv there says why"):
        PreparedDataset(tmp_path, "empty")
    write_split(tmp_path, "train", 4, clips_per_shard=2)
    manifest = tmp_path / "train" / MANIFEST
    manifest.write_text(manifest.read_text()[:-1])  # the last line was not written to its end
    with pytest.raises(ValueError, match="unfinished, 3 of 4 clips"):
        PreparedDataset(tmp_path, "train")


def test_features_of_another_encoder_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 1, clips_per_shard=2)
    clips = PreparedDataset(tmp_path, "train")
    clips.check_visual("constants")
    with pytest.raises(ValueError, match="were made by constants, the config says CLIP"):
        clips.check_visual("CLIP")


def test_training_opens_sets_in_object_storage_and_refuses_shared_videos(tmp_path: Path) -> None:
    from lavcap.config import DataConfig
    from lavcap.train import open_sets
    from lavcap.visual import visual_fingerprint
    from small import small_config

    config = replace(small_config(tmp_path), data=DataConfig(folder="memory://bucket/clips"))
    same = settings(1, 1) | {"visual": visual_fingerprint(config.visual)}
    for split, clip_id in (("train", "video_0"), ("val", "other_0"), ("shared", "video_30")):
        with open_split(tmp_path / split, same) as writer:
            writer.keep(clip_id, ("a dog",), torch.zeros(8000), torch.zeros(2, 8))
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/bucket/clips", recursive=True)
    clips, validation = open_sets(config)
    assert clips[0].clip_id == "video_0" and validation[0].clip_id == "other_0"
    shared = replace(config, data=replace(config.data, validation_split="shared"))
    with pytest.raises(ValueError, match=r"1 videos of split 'shared' are in another split too: video_30 \(in train\)"):
        open_sets(shared)


def test_the_loader_benchmark_runs(tmp_path: Path) -> None:
    """Small and untimed here; its result at full size is in results/loader.json."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "loader.py"))
    sizes = {"clips": 12, "seconds": 1, "batch": 4, "workers": 0, "step": 0.001, "repeats": 1}
    out = tmp_path / "loader.json"
    script["main"]([f"--{name}={value}" for name, value in sizes.items()] + [f"--out={out}"])
    result = json.loads(out.read_text())
    assert [(row["data_set"], row["steps"]) for row in result["rows"]] == [("map", 2), ("stream", 2)]
    assert result["conditions"]["clips"] == 12

    committed = json.loads((Path(__file__).parents[1] / "results" / "loader.json").read_text())
    for row in committed["rows"]:
        assert row["clips_per_second_min"] > row["needed_by_the_step"], row
