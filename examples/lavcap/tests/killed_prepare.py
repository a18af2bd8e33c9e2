"""Run by test_prepare_resume.py in a process of its own, which is killed: prepares a folder with a slow encoder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lavcap.data.prepare import Job, prepare
from media import MEAN_COLOURS, mean_colours


def slow(pictures: torch.Tensor) -> torch.Tensor:
    time.sleep(0.2)
    return mean_colours(pictures)


if __name__ == "__main__":
    media, captions, folder, workers = sys.argv[1:]
    job = Job(Path(media), Path(captions), Path(folder), "train", clips_per_shard=2)
    prepare(job, MEAN_COLOURS._replace(encode=slow), workers=int(workers))
