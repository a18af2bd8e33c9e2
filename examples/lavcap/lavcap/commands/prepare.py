"""``lavcap prepare``: media files and captions to a prepared set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file: data.folder is where the set goes, visual the picture encoder")
    parser.add_argument("--media", type=Path, required=True, help="folder of files named <youtube_id>_<start>.mp4")
    parser.add_argument("--captions", type=Path, required=True, help="audiocap_id,youtube_id,start_time,caption")
    parser.add_argument("--split", required=True, help="name of the split: train, val, test")
    parser.add_argument("--ids", type=Path, help="only these clips: a file of clip ids or YouTube ids")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode (%(default)s)")
    parser.add_argument("--device", help="where pictures are encoded; default: this machine's accelerator, else cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the config")


def run(args: argparse.Namespace) -> int:
    import torch

    from lavcap.config_file import load_config
    from lavcap.data.prepare import Job, PictureFeatures, prepare, summarise
    from lavcap.device import default_device
    from lavcap.visual import build_visual_encoder, preprocess, visual_fingerprint

    config = load_config(args.config, args.set)
    if "://" in config.data.folder:
        raise ValueError(f"data.folder is {config.data.folder}: prepare on a disk, then copy the folder there as it is")
    device = args.device or default_device()
    encoder = build_visual_encoder(config.visual).to(device)
    stored = getattr(torch, config.visual.precision.value)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        pixels = preprocess(pictures, encoder.image_size)
        return encoder.encode(pixels.to(device)).to("cpu", stored)

    features = PictureFeatures(encoder.image_size, encode, visual_fingerprint(config.visual))
    job = Job(args.media, args.captions, Path(config.data.folder), args.split, args.ids)
    lines = prepare(job, features, args.workers)
    print(f"{job.folder / job.split}: {summarise(lines)}")
    return 0
