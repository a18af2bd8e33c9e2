"""A folder of media files and a caption file to a prepared split (:mod:`lavcap.data.shards` says what it holds)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lavcap.data.captions import is_selected, read_captions, read_ids, youtube_id
from lavcap.data.decode import NUM_FRAMES, DecodedClip, Dropped, Reason, decode_clip
from lavcap.data.sample import SAMPLE_RATE
from lavcap.data.shards import Line, open_split, read_manifest

FORMAT = 2  # of a prepared folder; one more with every change after which a folder cannot be added to. 1: no checksums
CLIPS_PER_SHARD = 256  # 170 MB of clips of 10 s
MEDIA = frozenset({".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".flv", ".3gp", ".mpg", ".mpeg", ".ts", ".wmv"})


class PictureFeatures(NamedTuple):
    """What turns the pictures of a clip into what is stored."""

    image_size: int
    encode: Callable[[Tensor], Tensor]  # [F, P, P, 3] uint8 to [F, V], in the dtype to be stored
    fingerprint: str  # of all that the features depend on


@dataclass(frozen=True)
class Job:
    """What to prepare: a split's media and captions, and the folder of the prepared set."""

    media: Path
    captions: Path
    folder: Path
    split: str
    ids: Path | None = None  # only these clips
    clips_per_shard: int = CLIPS_PER_SHARD


class Candidate(NamedTuple):
    """A clip that is to be prepared, or known beforehand to be left out."""

    clip_id: str
    captions: tuple[str, ...]
    source: Path | Dropped


def prepare(job: Job, features: PictureFeatures, workers: int = 2) -> list[Line]:
    """Prepare a split, or go on with one that was begun; returns the complete manifest.

    Features are encoded one clip at a time (a batch of its pictures), so that they do not depend on which other clips
    there are, nor on where an earlier run was killed.

    Args:
        job: what to prepare.
        features: the picture encoder; its fingerprint is kept, and training checks that it is its own.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: a caption file, an id or a folder that cannot be used, or clips that are in another split too.
        FileNotFoundError: no such folder or file.
    """
    named, strangers = plan(job)
    wanted = [clip.clip_id for clip in named if isinstance(clip.source, Path)]
    others = {split: clip_ids for split, clip_ids in _kept_ids(job.folder).items() if split != job.split}
    check_disjoint(others | {job.split: wanted})
    with open_split(job.folder / job.split, _settings(job, len(named), features.fingerprint)) as writer:
        done = {line.clip_id for line in writer.lines}
        rest = [clip for clip in named + strangers if clip.clip_id not in done]
        decoded = _decode_in_order(rest, features.image_size, workers)
        total = len(done) + len(rest)
        for clip, found in tqdm(zip(rest, decoded), desc=job.split, unit="clip", total=total, initial=len(done)):
            if isinstance(found, Dropped):
                writer.drop(clip.clip_id, found)
            else:
                visual = features.encode(torch.from_numpy(found.pictures))
                writer.keep(clip.clip_id, clip.captions, torch.from_numpy(found.waveform), visual)
    check_disjoint(_kept_ids(job.folder))  # again: two splits may have been prepared at the same time
    return writer.lines


def summarise(lines: Sequence[Line]) -> str:
    """One line for people: clips kept, and dropped by reason."""
    reasons = Counter(line.reason for line in lines if not line.kept)
    kept = len(lines) - reasons.total()
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none"
    return f"{kept} clips kept of {len(lines)}; dropped: {dropped}"


def plan(job: Job) -> tuple[list[Candidate], list[Candidate]]:
    """Every clip of the caption file in its order, then ids that it does not name; and media files that it does not.

    The first list is the same whenever a preparation goes on; files of other splits may have come by then.
    """
    captions = read_captions(job.captions)
    files = media_files(job.media)
    ids = None if job.ids is None else read_ids(job.ids)
    named = [Candidate(clip_id, texts, _source(clip_id, texts, files, ids)) for clip_id, texts in captions.items()]
    known = captions.keys() | {youtube_id(clip_id) for clip_id in captions}
    unnamed = Dropped(Reason.NO_CAPTION, f"no line of {job.captions.name} names it")
    unknown_ids = sorted((ids or frozenset()) - known)
    strangers = sorted(files.keys() - captions.keys() - set(unknown_ids))
    without = [[Candidate(name, (), unnamed) for name in names] for names in (unknown_ids, strangers)]
    return named + without[0], without[1]


def check_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Raise ``ValueError`` if two splits, given as clip ids by name, hold the same clip or two clips of one video."""
    owner: dict[str, str] = {}
    for split, clip_ids in splits.items():
        videos = {youtube_id(clip_id): clip_id for clip_id in clip_ids}
        shared = sorted(videos.keys() & owner.keys())
        if shared:
            examples = ", ".join(f"{videos[video]} (in {owner[video]})" for video in shared[:3])
            raise ValueError(
                f"{len(shared)} videos of split '{split}' are in another split too: {examples}. Training, validation "
                "and test must be different sets: take them out of one caption file, or prepare into another folder"
            )
        owner |= dict.fromkeys(videos, split)


def _kept_ids(folder: Path) -> dict[str, list[str]]:
    """Of every split of a prepared set that was begun: the clips that it holds."""
    folders = [path.parent for path in sorted(folder.glob("*/manifest.csv"))]
    return {split.name: [line.clip_id for line in read_manifest(split) if line.kept] for split in folders}


def media_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of media files {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in MEDIA or not path.is_file():
            continue
        if path.stem in files:
            raise ValueError(f"two files are clip {path.stem}: {files[path.stem]} and {path}; remove one")
        files[path.stem] = path
    return files


def _source(
    clip_id: str, captions: tuple[str, ...], files: dict[str, Path], ids: frozenset[str] | None
) -> Path | Dropped:
    if ids is not None and not is_selected(clip_id, ids):
        return Dropped(Reason.NOT_SELECTED, "not in the list of ids")
    if not captions:
        return Dropped(Reason.NO_CAPTION, "its captions are empty")
    if clip_id not in files:
        return Dropped(Reason.NO_FILE, "no media file of this name")
    return files[clip_id]


def _settings(job: Job, num_candidates: int, visual: str) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began."""
    return {
        "format": FORMAT,
        "num_candidates": num_candidates,
        "captions_sha256": hashlib.sha256(job.captions.read_bytes()).hexdigest(),
        "ids_sha256": None if job.ids is None else hashlib.sha256(job.ids.read_bytes()).hexdigest(),
        "clips_per_shard": job.clips_per_shard,
        "sample_rate": SAMPLE_RATE,
        "max_frames": NUM_FRAMES,
        "visual": visual,
    }


class _Sources(Dataset[DecodedClip | Dropped]):
    def __init__(self, candidates: Sequence[Candidate], image_size: int) -> None:
        self._sources = [clip.source for clip in candidates]
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> DecodedClip | Dropped:
        source = self._sources[index]
        return source if isinstance(source, Dropped) else decode_clip(source, self._image_size)


def _decode_in_order(candidates: Sequence[Candidate], image_size: int, workers: int) -> Iterator[DecodedClip | Dropped]:
    """Clips decoded by processes ahead of their use, in order."""
    workers = min(workers, len(candidates))
    loader: DataLoader[DecodedClip | Dropped] = DataLoader(
        _Sources(candidates, image_size),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy the threads of the encoder's device
    )
    yield from loader


def _as_it_is(found: Any) -> Any:  # without it the loader would make tensors of arrays and lists of names
    return found
