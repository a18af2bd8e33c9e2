"""``lavcap report EVALUATION``: one HTML file, with every clip of an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", type=Path, help="a folder that lavcap evaluate wrote, or a run with one of them")
    parser.add_argument("--media", type=Path, metavar="DIR", help="the clips' media files; without them: no pictures")
    parser.add_argument("--data", metavar="DIR", help="prepared set; default: where the evaluation read it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the evaluation's folder")


def run(args: argparse.Namespace) -> int:
    from lavcap.evaluation import read_evaluation
    from lavcap.files import write_whole
    from lavcap.page.clips import shown_clips
    from lavcap.page.html import page

    evaluation = read_evaluation(args.evaluation)
    clips = list(shown_clips(evaluation, args.media, args.data))
    out = args.out or evaluation.folder / "report.html"
    write_whole(out, page(evaluation, clips))
    for shown in clips:
        if shown.missing:
            print(f"{shown.clip.clip_id}: {shown.missing}")
    print(f"{out}: {len(clips)} clips, {out.stat().st_size / 1e6:.2f} MB")
    return 0
