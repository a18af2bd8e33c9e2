"""What an evaluation leaves behind beside captions and scores: where it came from, and the plans of its fusion.

evaluation.json     checkpoint, prepared set, split, config
plans.safetensors   of each clip, by its id: the plan [N, M] that its caption was written from
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lavcap.config import Config
from lavcap.config_file import config_from_dict, config_to_dict
from lavcap.files import read_json, read_table, write_whole

CAPTIONS, SCORES, ORIGIN, PLANS = "captions.csv", "scores.json", "evaluation.json", "plans.safetensors"
AGAIN = "run 'lavcap evaluate' again"


class Origin(NamedTuple):
    checkpoint: str
    data: str  # the prepared set's folder
    split: str
    config: Config
    plans: Mapping[str, Tensor]  # empty where the fusion has none


class ScoredClip(NamedTuple):
    """A line of ``captions.csv``."""

    clip_id: str
    caption: str
    scores: dict[str, float]
    references: list[str]


class Evaluation(NamedTuple):
    folder: Path
    origin: Origin
    report: dict[str, Any]  # scores.json
    clips: list[ScoredClip]


def write_origin(folder: Path, origin: Origin) -> None:
    what = {"checkpoint": origin.checkpoint, "data": origin.data, "split": origin.split}
    write_whole(folder / ORIGIN, json.dumps(what | {"config": config_to_dict(origin.config)}, indent=1) + "\n")
    write_whole(folder / PLANS, save({clip_id: plan.contiguous() for clip_id, plan in origin.plans.items()}))


def read_evaluation(folder: Path) -> Evaluation:
    """Of a folder that ``lavcap evaluate`` wrote, or of a run that has one evaluation.

    Raises:
        FileNotFoundError: no evaluation there, or one without a file that it must have.
        ValueError: a run with several; the message names them.
    """
    folder = _find(folder)
    report, what = (read_json((folder / name).read_bytes(), folder / name, AGAIN) for name in (SCORES, ORIGIN))
    config = config_from_dict(what.pop("config"))
    try:
        plans = load_file(folder / PLANS)
    except SafetensorError as error:
        raise ValueError(f"{folder / PLANS} is damaged ({error}): {AGAIN}") from None
    origin = Origin(**what, config=config, plans=plans)
    _, rows = read_table(folder / CAPTIONS)
    clips = [_scored(row.fields, list(report["metrics"])) for row in rows]
    return Evaluation(folder, origin, report, clips)


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: name a run of lavcap train or an evaluation")
    candidates = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("checkpoint-*/*"))]
    found = [path for path in candidates if (path / CAPTIONS).is_file()]
    if not found:
        raise FileNotFoundError(f"no evaluation in {folder}: 'lavcap evaluate' makes one")
    if len(found) > 1 and found[0] != folder:
        raise ValueError(f"{folder} has {len(found)} evaluations: name one of {', '.join(map(str, found))}")
    missing = [name for name in (SCORES, ORIGIN, PLANS) if not (found[0] / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{found[0]} lacks {', '.join(missing)}, which 'lavcap evaluate' writes beside the captions: run it again"
        )
    return found[0]


def _scored(row: dict[str, str], metrics: list[str]) -> ScoredClip:
    references = [text for name, text in row.items() if name.startswith("reference_") and text]
    scores = {name: float(row[name]) for name in metrics}
    return ScoredClip(row["clip_id"], row["caption"], scores, references)
