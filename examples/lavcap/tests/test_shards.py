"""Shards as streams: what webdataset reads, and who gets which clip in which order."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
import webdataset
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import Sample, collate
from lavcap.data.shards import open_split, read_manifest
from lavcap.data.stream import ShardedDataset
from media import settings, write_split
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


def readers(folder: Path) -> list[Callable[[], object]]:
    """Both kinds of data set, read to the end."""
    one = PreparedDataset(folder, "train")
    return [lambda: [one[i] for i in range(len(one))], lambda: list(ShardedDataset(folder, "train", shuffle=False))]


def test_no_byte_of_a_shard_changes_unnoticed(tmp_path: Path) -> None:
    """Of headers, captions, tensors and what fills the blocks: 40 places drawn over two clips."""
    write_split(tmp_path, "train", 2, clips_per_shard=4)
    shard = tmp_path / "train" / "shard-000000.tar"
    content, (first, second) = shard.read_bytes(), read_manifest(tmp_path / "train")
    draws = random.Random(3)
    for _ in range(40):
        place = draws.randrange(second.offset + second.size)
        damaged = bytearray(content)
        damaged[place] ^= 1 << draws.randrange(8)
        shard.write_bytes(damaged)
        clip = first if place < second.offset else second
        for read in readers(tmp_path):
            with pytest.raises(ValueError) as error:
                read()
            assert str(error.value).startswith(f"{shard} is damaged: clip {clip.clip_id}, {clip.size} bytes from ")
            assert "or remove it there and run the same 'lavcap prepare' again" in str(error.value)
    shard.write_bytes(content)
    for read in readers(tmp_path):
        read()


@pytest.mark.parametrize("has_checksums", [True, False])
def test_another_clips_bytes_are_noticed(tmp_path: Path, has_checksums: bool) -> None:
    """Whole members, of one size, in each other's place; by the id alone where a set is older than checksums."""
    for folder, clip_id in ((tmp_path, "one_1"), (tmp_path / "other", "two_2")):
        with open_split(folder / "train", settings(1, 4)) as writer:
            writer.keep(clip_id, (f"caption of {clip_id}",), torch.zeros(1), torch.zeros(1, 4))
    if not has_checksums:
        without_checksums(tmp_path / "train" / "manifest.csv")
    for read in readers(tmp_path):
        read()
    shard = tmp_path / "train" / "shard-000000.tar"
    shard.write_bytes((tmp_path / "other" / "train" / shard.name).read_bytes())
    why = "its checksum is" if has_checksums else r"two_2.json and two_2.safetensors lie there"
    for read in readers(tmp_path):
        with pytest.raises(ValueError, match=rf"shard-000000.tar is damaged: clip one_1, .*{why}"):
            read()


def without_checksums(manifest: Path) -> None:
    """As it was written before there were any."""
    lines = manifest.read_text().splitlines()
    assert lines[0].endswith(",size,crc32")
    manifest.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))


def test_a_set_without_checksums_is_read_as_far_as_it_can_be_checked(tmp_path: Path, all_ids: list[str]) -> None:
    write_split(tmp_path, "train", NUM_CLIPS, clips_per_shard=4)
    without_checksums(tmp_path / "train" / "manifest.csv")
    assert [line.crc32 for line in read_manifest(tmp_path / "train")] == [""] * NUM_CLIPS
    for read in readers(tmp_path):
        assert ids_of(read()) == all_ids
    shard = tmp_path / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[512:])
    for read in readers(tmp_path):
        with pytest.raises(ValueError, match=rf"{shard} is damaged: clip train-004_4"):
            read()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text.replace("train-001_1,kept", "train-001_1,kepu"), 3),
        (lambda text: text.replace("train-002_2,kept,", "train-002_2,kept"), 4),
        (lambda text: text.replace("train-000_0,kept,,,1,", "train-000_0,kept,,,x,"), 2),
        (lambda text: text.replace("clip_id,", "clip,"), 2),
    ],
)
def test_a_damaged_manifest_names_its_line(tmp_path: Path, change: Callable[[str], str], line: int) -> None:
    """A clip whose line says no more that it is there would be gone without a word."""
    write_split(tmp_path, "train", 4, clips_per_shard=4)
    manifest = tmp_path / "train" / "manifest.csv"
    before = manifest.read_text()
    manifest.write_text(change(before))
    assert manifest.read_text() != before
    for kind in (PreparedDataset, ShardedDataset):
        with pytest.raises(ValueError, match=rf"{manifest}, line {line} is damaged: copy .* again, or remove it"):
            kind(tmp_path, "train")


def test_damaged_settings_name_their_file(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2, clips_per_shard=4)
    path = tmp_path / "train" / "settings.json"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\): copy it again, or remove the folder"):
        PreparedDataset(tmp_path, "train")
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*\): copy it again, or remove the folder"):
        open_split(tmp_path / "train", settings(2, 4))


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1)])
def test_ranks_that_cannot_be(folder: Path, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"got rank {rank} of {world_size}"):
        ShardedDataset(folder, "train", rank=rank, world_size=world_size)
