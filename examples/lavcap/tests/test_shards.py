"""Shards as streams: what webdataset reads, and who gets which clip in which order."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest
import webdataset
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import Sample, collate
from lavcap.data.shards import read_manifest
from lavcap.data.stream import ShardedDataset
from media import write_split
from safetensors.torch import load
from torch.utils.data import DataLoader

NUM_CLIPS = 23  # in six shards of four


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_split(folder, "train", NUM_CLIPS, clips_per_shard=4)
    return folder


@pytest.fixture(scope="module")
def all_ids() -> list[str]:
    return [f"train-{i:03d}_{i}" for i in range(NUM_CLIPS)]


def ids_of(clips) -> list[str]:
    return [clip.clip_id for clip in clips]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_them(folder: Path, all_ids: list[str]) -> None:
    urls = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    clips = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [clip["__key__"] for clip in clips] == all_ids
    assert json.loads(clips[5]["json"]) == {"captions": ["caption 5", "wörter 5"]}
    assert load(clips[5]["safetensors"])["waveform"].tolist() == [5.0] * 6


def test_in_order_without_shuffling(folder: Path, all_ids: list[str]) -> None:
    clips = list(ShardedDataset(folder, "train", shuffle=False))
    assert ids_of(clips) == all_ids
    assert isinstance(clips[7], Sample) and clips[7].waveform.tolist() == [7.0] * 8


def test_the_order_is_of_seed_and_epoch(folder: Path, all_ids: list[str]) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        clips = ShardedDataset(folder, "train", seed=seed, buffer=5)
        clips.set_epoch(epoch)
        return ids_of(clips)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(0, 1) == orders[1]
    assert len({tuple(one) for one in [all_ids, *orders]}) == 5
    assert all(sorted(one) == all_ids for one in orders)
    inside = [int(one[-2:].strip("_")) // 4 for one in orders[0]]
    assert inside != sorted(inside, key=inside.index)  # clips of different shards are mixed


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_an_epoch(folder: Path, all_ids: list[str], world_size: int) -> None:
    ranks = [
        ShardedDataset(folder, "train", seed=3, rank=rank, world_size=world_size, buffer=4)
        for rank in range(world_size)
    ]
    read = [ids_of(rank) for rank in ranks]
    assert sorted(clip_id for ids in read for clip_id in ids) == all_ids
    assert [len(ids) for ids in read] == [rank.num_clips for rank in ranks]
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_workers_share_a_rank_and_follow_its_epoch(folder: Path) -> None:
    clips = ShardedDataset(folder, "train", rank=1, world_size=2)
    loader = DataLoader(
        clips,
        batch_size=4,
        num_workers=2,
        collate_fn=collate,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    orders = []
    for epoch in range(2):
        clips.set_epoch(epoch)
        orders.append([clip_id for batch in loader for clip_id in batch.clip_ids])
        assert sorted(orders[-1]) == sorted(ids_of(clips))  # this process alone reads what the two read
    assert orders[0] != orders[1]


def test_from_object_storage(folder: Path) -> None:
    """A memory file system stands for any that fsspec reads: both kinds of data set give what they give on a disk."""
    storage = fsspec.filesystem("memory")
    storage.put(str(folder), "/bucket/prepared", recursive=True)
    place: list[str | Path] = ["memory://bucket/prepared", folder]
    streams = [ids_of(ShardedDataset(where, "train", rank=1, world_size=2, seed=5)) for where in place]
    assert streams[0] == streams[1] and len(streams[0]) == 12
    remote, local = (PreparedDataset(where, "train") for where in place)
    assert remote.clip_ids == local.clip_ids
    assert remote[9].waveform.tolist() == local[9].waveform.tolist() == [9.0] * 10
    with pytest.raises(FileNotFoundError, match="no prepared split memory://bucket/prepared/test"):
        PreparedDataset("memory://bucket/prepared", "test")


@pytest.mark.parametrize("missing", [0, 100, 700, 1500])  # bytes of the third clip of four
def test_a_shard_cut_short_is_an_error(tmp_path: Path, missing: int) -> None:
    write_split(tmp_path, "train", 4, clips_per_shard=4)
    clips = ShardedDataset(tmp_path, "train", shuffle=False)
    clip_bytes = read_manifest(tmp_path / "train")[0].size
    os.truncate(tmp_path / "train" / "shard-000000.tar", 3 * clip_bytes - missing)
    with pytest.raises(ValueError, match=r"shard-000000.tar ends after [23] clips, and the manifest says .* more"):
        list(clips)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1)])
def test_ranks_that_cannot_be(folder: Path, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"got rank {rank} of {world_size}"):
        ShardedDataset(folder, "train", rank=rank, world_size=world_size)
