"""A prepared split as a stream of WebDataset shards, read from front to back, from disk or any URL that fsspec reads.

The shards of an epoch, in an order drawn from seed and epoch, form one sequence of clips. Each consumer (a data loader
process of a rank) reads its own stretch of it: stretches meet without a gap or an overlap and differ in length by one
at most, since the manifest says how many clips a shard holds. A shard that two stretches share is read twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import fsspec
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lavcap.data.dataset import read_split, split_location
from lavcap.data.sample import Sample
from lavcap.data.shards import Line, read_clip

T = TypeVar("T")


class ShardedDataset(IterableDataset[Sample]):
    """The clips of a split for one rank, streamed.

    Args:
        folder: the prepared set, a path or a URL.
        split: its name.
        seed: of the order.
        rank, world_size: which of how many processes this is. Each gets as many clips as the others, or one less.
        shuffle: clips in an order of seed and epoch; else the manifest's.
        buffer: clips among which the next one is drawn, beside the shuffling of shards; about 0.7 MB each.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        buffer: int = 256,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}")
        if buffer < 1:
            raise ValueError(f"buffer must hold at least one clip, got {buffer}")
        self.location = split_location(folder, split)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._buffer = buffer if shuffle else 1
        self._shuffle = shuffle
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # set_epoch reaches workers that live on
        self.settings, lines = read_split(self.location)
        self._shards = [list(clips) for _, clips in groupby(lines, key=lambda line: line.shard)]
        self.total_clips = len(lines)

    @property
    def num_clips(self) -> int:
        """Clips that this rank gets in an epoch."""
        first, last = _stretch(self.total_clips, self._rank, self._world_size)
        return last - first

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch; call before it begins."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        place, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, last = _stretch(self.total_clips, self._rank, self._world_size)
        begin, end = _stretch(last - first, place, num_workers)
        order = f"{self._seed} {int(self._epoch)}"
        shards = list(self._shards)
        if self._shuffle:
            random.Random(order).shuffle(shards)
        clips = self._read(shards, first + begin, first + end)
        return _shuffled(clips, self._buffer, random.Random(f"{order} {first + begin}"))

    def _read(self, shards: list[list[Line]], begin: int, end: int) -> Iterator[Sample]:
        """Clips `begin` to `end` of the sequence that the shards form."""
        position = 0
        for lines in shards:
            skipped, wanted = max(0, begin - position), min(len(lines), end - position)
            if skipped < wanted:
                yield from self._read_shard(lines, skipped, wanted)
            position += len(lines)

    def _read_shard(self, lines: list[Line], skipped: int, wanted: int) -> Iterator[Sample]:
        """From front to back, which also a stream without positions can be."""
        shard = f"{self.location}/{lines[0].shard}"
        with fsspec.open(shard, "rb") as stream:
            for found, line in enumerate(lines[:wanted]):
                members = stream.read(line.size)
                if len(members) < line.size:
                    raise ValueError(
                        f"{shard} ends after {found} clips, and the manifest says that it holds more: copy it again"
                    )
                if found >= skipped:
                    yield read_clip(members, line, self.location)


def _stretch(total: int, part: int, parts: int) -> tuple[int, int]:
    return total * part // parts, total * (part + 1) // parts


def _shuffled(items: Iterator[T], buffer: int, generator: random.Random) -> Iterator[T]:
    """Each item once: the next one is drawn from the `buffer` items that were read ahead."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) >= buffer:
            yield _draw(held, generator)
    while held:
        yield _draw(held, generator)


def _draw(held: list[T], generator: random.Random) -> T:
    index = generator.randrange(len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()
