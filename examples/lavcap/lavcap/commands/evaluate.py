"""``lavcap evaluate CHECKPOINT``: caption a prepared split by beam search and score it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavcap.commands.score import add_bootstrap_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a run of lavcap train (its best is taken), or a checkpoint of it"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared set; default: that of the checkpoint's config")
    parser.add_argument("--split", help="default: the config's data.test_split")
    parser.add_argument("--ids", type=Path, help="these clips only: a file of clip ids or YouTube ids")
    parser.add_argument("--out", type=Path, help="folder of the results; default: <checkpoint>/<split>")
    parser.add_argument("--device", help="default: this machine's accelerator, else cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="generation.* or data.*")
    add_bootstrap_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from lavcap.checkpoint import CONFIG, best_checkpoint, load_checkpoint
    from lavcap.config_file import load_config
    from lavcap.data.captions import read_ids
    from lavcap.data.dataset import PreparedDataset
    from lavcap.device import default_device
    from lavcap.evaluate import caption_clips
    from lavcap.evaluation import Origin, write_origin
    from lavcap.scoring.files import write_captions
    from lavcap.scoring.java import check_java
    from lavcap.scoring.report import markdown, score_report, write_report

    check_java()  # before hours of beam search, not after
    fixed = [setting for setting in args.set if not setting.startswith(("generation.", "data."))]
    if fixed:
        raise ValueError(f"--set {fixed[0]}: a trained captioner is as it is; generation.* and data.* can be set")
    folder = best_checkpoint(args.checkpoint)
    config = load_config(folder / CONFIG, args.set)
    split = args.split or config.data.test_split
    ids = None if args.ids is None else read_ids(args.ids)
    clips = PreparedDataset(args.data or config.data.folder, split, ids)
    out = args.out or args.checkpoint / split

    checkpoint = load_checkpoint(folder, args.device or default_device())
    found = list(caption_clips(checkpoint, clips, config.generation, config.data.workers))
    predictions = {clip.clip_id: clip.caption for clip in found}
    references = {clip.clip_id: clip.references for clip in found}
    write_captions(out / "captions.csv", predictions, references)
    plans = {clip.clip_id: clip.plan for clip in found if clip.plan is not None}
    write_origin(out, Origin(str(folder), str(args.data or config.data.folder), split, config, plans))
    scores, report = score_report(
        predictions, references, name=f"{folder.name}, {split}", resamples=args.resamples, seed=args.seed
    )
    write_captions(out / "captions.csv", predictions, references, scores.metrics)
    write_report(report, out)
    print(markdown(report), end="")
    print(f"\ncaptions, scores of each clip and references: {out / 'captions.csv'}")
    return 0
