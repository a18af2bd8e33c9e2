"""Does the loader keep a training step fed? Clips a second, and how long a paced loop waits for its next batch.

    python benchmarks/loader.py --out results/loader.json

Makes a prepared set of clips at the paper's size (10 s of sound, 20 features of 768 in bfloat16, five captions), reads
it through the map-style and the streaming data set, shuffled, with files in memory and with files dropped from it.
Every batch is checked for its clips' own values before a number is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import SAMPLE_RATE, RawBatch, collate
from lavcap.data.shards import open_split
from lavcap.data.stream import ShardedDataset
from torch.utils.data import DataLoader

SECONDS, FRAMES, WIDTH = 10, 20, 768
CAPTION = "a man speaks while an engine idles and birds chirp in the distance"


def make_set(folder: Path, num_clips: int, seconds: int) -> None:
    """Clip i holds noise whose first sample is i, and features of i."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(seconds * SAMPLE_RATE, generator=generator)
    settings = {"num_candidates": num_clips, "clips_per_shard": 64, "visual": "benchmark"}
    with open_split(folder / "train", settings) as writer:
        for i in range(num_clips):
            noise[0] = i
            writer.keep(f"clip_{i}", (CAPTION,) * 5, noise, torch.full((FRAMES, WIDTH), float(i), dtype=torch.bfloat16))


def make_loader(kind: str, folder: Path, batch_size: int, workers: int) -> DataLoader[Any]:
    clips: Any = ShardedDataset(folder, "train") if kind == "stream" else PreparedDataset(folder, "train")
    return DataLoader(
        clips,
        batch_size,
        shuffle=None if kind == "stream" else True,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )


def drop_from_memory(folder: Path) -> None:
    """Let the next epoch read from the disk (as far as the system follows the advice)."""
    for path in (folder / "train").glob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checked(batch: RawBatch) -> int:
    """Clips of a batch, each of which holds its own values."""
    for clip_id, waveform, visual in zip(batch.clip_ids, batch.waveform, batch.visual):
        number = float(clip_id.removeprefix("clip_"))
        assert waveform[0] == number and (visual == torch.tensor(number).bfloat16()).all(), clip_id
    return len(batch.clip_ids)


def epoch(loader: DataLoader[Any], step: float) -> tuple[int, float, list[float]]:
    """Clips and seconds of an epoch behind its first batch, and how long each batch was waited for.

    A step of `step` seconds is slept through, as a host does while its accelerator works.
    """
    batches: Iterator[RawBatch] = iter(loader)
    checked(next(batches))
    clips, waits, start = 0, [], time.perf_counter()
    while True:
        time.sleep(step)
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return clips, time.perf_counter() - start, waits
        waits.append(time.perf_counter() - asked)
        clips += checked(batch)


def measure(kind: str, folder: Path, batch_size: int, workers: int, step: float, repeats: int) -> dict[str, Any]:
    loader = make_loader(kind, folder, batch_size, workers)
    list(loader)  # starts the workers and brings the files into memory
    rates = []
    for _ in range(repeats):
        clips, seconds, _ = epoch(loader, 0.0)
        rates.append(clips / seconds)
    drop_from_memory(folder)
    clips, seconds, _ = epoch(loader, 0.0)
    from_disk = clips / seconds
    drop_from_memory(folder)
    _, _, waits = epoch(loader, step)
    return {
        "data_set": kind,
        "batch": batch_size,
        "clips_per_second": round(statistics.median(rates), 1),
        "clips_per_second_min": round(min(rates), 1),
        "clips_per_second_max": round(max(rates), 1),
        "clips_per_second_from_disk": round(from_disk, 1),
        "needed_by_the_step": batch_size / step,
        "steps": len(waits),
        "wait_ms_median": round(1e3 * statistics.median(waits), 2),
        "wait_ms_worst": round(1e3 * max(waits), 2),
    }


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": args.machine,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clips": args.clips,
        "clip": f"{args.seconds} s of float32 sound at {SAMPLE_RATE} Hz, {FRAMES} x {WIDTH} features in bfloat16",
        "workers": args.workers,
        "step_seconds": args.step,
        "repeats": args.repeats,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of sound a clip")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 32], help="clips a step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.2, help="seconds of a training step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", default=platform.machine(), help="what to call this machine in the result")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"conditions": conditions(args), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        make_set(Path(folder), args.clips, args.seconds)
        for kind in ("map", "stream"):
            for batch_size in args.batch:
                row = measure(kind, Path(folder), batch_size, args.workers, args.step, args.repeats)
                print(json.dumps(row), flush=True)
                result["rows"].append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
