"""``lavcap score PRED.csv REFS.csv``: score anyone's captions."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    columns = "clip_id,caption or AudioCaps' columns"
    parser.add_argument("predictions", type=Path, metavar="PRED.csv", help=f"one line a clip: {columns}")
    parser.add_argument("references", type=Path, metavar="REFS.csv", help=f"one line a caption: {columns}")
    parser.add_argument("--ids", type=Path, help="score these clips only: a file of clip ids or YouTube ids")
    parser.add_argument("--out", type=Path, help="folder for captions.csv, scores.json and scores.md")
    add_bootstrap_arguments(parser)


def add_bootstrap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resamples", type=int, default=1000, help="of the clips, for the intervals (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from lavcap.data.captions import read_ids
    from lavcap.scoring.files import read_pair, write_captions
    from lavcap.scoring.report import markdown, score_report, write_report

    ids = None if args.ids is None else read_ids(args.ids)
    predictions, references = read_pair(args.predictions, args.references, ids)
    scores, report = score_report(
        predictions, references, name=args.predictions.stem, resamples=args.resamples, seed=args.seed
    )
    if args.out is not None:
        write_captions(args.out / "captions.csv", predictions, references, scores.metrics)
        write_report(report, args.out)
    print(markdown(report), end="")
    return 0
