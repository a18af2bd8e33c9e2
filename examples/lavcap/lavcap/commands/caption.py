"""``lavcap caption VIDEO...``: caption media files, and draw how their sound and pictures were aligned."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavcap.caption import FileCaptioner, Result
    from lavcap.config import Config


LONGEST_NAME = 200  # bytes of a file's name that its picture's has: with more to it, no disk would take it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="media files of any kind")
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the alignment of each clip there, <file>.png")
    parser.add_argument("--json", metavar="FILE", help="write what was found out there; - writes it in place of text")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run of lavcap train (its best is taken), or a checkpoint of it",
    )
    parser.add_argument("--device", help="default: this machine's accelerator, else cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="generation.*")


def run(args: argparse.Namespace) -> int:
    from lavcap.alignment import why_no_plan
    from lavcap.files import write_whole

    _check_targets(args)
    captioner = load_file_captioner(args)
    config = captioner.checkpoint.config
    results = _with_pictures(captioner.caption(args.videos), args.out, config)
    told = [_tell(result, picture, quiet=args.json == "-") for result, picture in results]
    failures = sum(clip["error"] is not None for clip in told)
    has_plan = any(clip["marginal_error"] is not None for clip in told)
    if args.json is not None:
        checkpoint = {"checkpoint": shown(args.checkpoint), "fusion": config.fusion.kind}
        text = json.dumps(checkpoint | {"clips": told}, indent=1, ensure_ascii=False) + "\n"
        print(text, end="") if args.json == "-" else write_whole(Path(args.json), text)
    if failures < len(told) and not has_plan:
        print(f"lavcap caption: {why_no_plan(config)}", file=sys.stderr)
    print(f"{len(told) - failures} of {len(told)} files captioned", file=sys.stderr)
    return 1 if failures else 0


def load_file_captioner(args: argparse.Namespace) -> FileCaptioner:
    """What :func:`add_checkpoint_arguments` asked for.

    Raises:
        ValueError, FileNotFoundError: no checkpoint, or a setting that a trained captioner does not take.
    """
    from lavcap.caption import FileCaptioner
    from lavcap.checkpoint import CONFIG, best_checkpoint, load_checkpoint
    from lavcap.config_file import load_config
    from lavcap.device import default_device

    fixed = [setting for setting in args.set if not setting.startswith("generation.")]
    if fixed:
        raise ValueError(f"--set {fixed[0]}: a trained captioner is as it is; generation.* can be set")
    folder = best_checkpoint(args.checkpoint)
    generation = load_config(folder / CONFIG, args.set).generation
    return FileCaptioner(load_checkpoint(folder, args.device or default_device()), generation)


def _check_targets(args: argparse.Namespace) -> None:
    """Before hours of captioning, not after."""
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out {args.out}: no such folder can be made ({error.strerror}); name another"
            ) from error
    if args.json not in (None, "-") and Path(args.json).is_dir():
        raise ValueError(f"--json {args.json}: a folder; name a file, or - for the standard output")


def _with_pictures(results: Iterable[Result], out: Path | None, config: Config) -> Iterator[tuple[Result, Path | None]]:
    """Each result with its picture, drawn as it comes; files of one name get numbers."""
    from lavcap.alignment import describe_plan, draw

    taken: set[str] = set()
    for result in results:
        if out is None or result.alignment is None:
            yield result, None
            continue
        clip = shown(Path(result.path.name))
        name = _free_name(clip, taken)
        lines = [f"{clip} · {describe_plan(config, result.plan)}", "; ".join(result.notes)]
        draw(out / name, result.alignment, title=result.caption or "(an empty caption)", lines=lines)
        yield result, out / name


def _free_name(name: str, taken: set[str]) -> str:
    name, number = name.encode()[:LONGEST_NAME].decode(errors="ignore"), 1
    while (free := f"{name}{'' if number == 1 else f'-{number}'}.png") in taken:
        number += 1
    taken.add(free)
    return free


def _tell(result: Result, picture: Path | None, *, quiet: bool) -> dict[str, Any]:
    """Say it at once, and return it for the JSON."""
    from lavcap.alignment import marginal_error, one_line

    clip = shown(result.path)
    for note in result.notes:
        print(f"lavcap caption: {clip}: {note}", file=sys.stderr)
    if result.error is not None:
        print(f"lavcap caption: {clip} {result.error}", file=sys.stderr)
    elif not quiet:
        print(f"{clip}: {one_line(result.caption or '')}", flush=True)
    return {
        "clip": clip,
        "caption": result.caption,
        "seconds": None if result.seconds is None else round(result.seconds, 3),
        "picture": None if picture is None else str(picture),
        "marginal_error": None if result.plan is None else marginal_error(result.plan),
        "notes": list(result.notes),
        "reason": None if result.reason is None else result.reason.value,
        "error": result.error,
    }


def shown(path: Path) -> str:
    """The path as it can be printed, also where its name is in no known code."""
    from lavcap.alignment import one_line

    return one_line(os.fsencode(path).decode("utf-8", "replace"))
