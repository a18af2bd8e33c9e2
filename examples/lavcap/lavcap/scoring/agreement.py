"""How well people agree: each caption of a clip scored against the others of the clip.

    python -m lavcap.scoring.agreement CAPTIONS.csv [--ids IDS.txt] --out FILE.json

Caption k of every clip is scored against the clip's others as one set; the mean over k is the figure that a captioner's
score stands beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lavcap.data.captions import is_selected, read_captions, read_ids
from lavcap.files import write_whole
from lavcap.scoring.conditions import conditions
from lavcap.scoring.metrics import MeteorScorer, Scores, score_tokens
from lavcap.scoring.tokens import tokenise


def human_agreement(
    references: Mapping[str, Sequence[str]], subset: frozenset[str] | None = None
) -> dict[str, dict[str, float]]:
    """Mean scores over k, of all clips under "all", and of those that `subset` names under "subset".

    Raises:
        ValueError: clips have different numbers of captions, or only one.
    """
    counts = {len(captions) for captions in references.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"every clip must have the same number of captions, two at least; there are {sorted(counts)}")
    tokens = tokenise(references)
    chosen = {"all": tokens}
    if subset is not None:
        chosen["subset"] = {clip_id: texts for clip_id, texts in tokens.items() if is_selected(clip_id, subset)}
    with MeteorScorer() as meteor:
        rounds = tqdm(range(counts.pop()), desc="caption left out")
        scores = [{name: _leave_out(k, clips, meteor) for name, clips in chosen.items()} for k in rounds]
    return {name: _mean([one[name] for one in scores]) | {"clips": len(chosen[name])} for name in chosen}


def _leave_out(k: int, tokens: Mapping[str, Sequence[str]], meteor: MeteorScorer) -> Scores:
    left_out = {clip_id: [texts[k]] for clip_id, texts in tokens.items()}
    others = {clip_id: [*texts[:k], *texts[k + 1 :]] for clip_id, texts in tokens.items()}
    return score_tokens(left_out, others, meteor)


def _mean(rounds: Sequence[Scores]) -> dict[str, float]:
    names = [metric.name for metric in rounds[0].metrics]
    return {name: float(np.mean([one.metrics[i].score for one in rounds])) for i, name in enumerate(names)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lavcap.scoring.agreement", description=__doc__)
    parser.add_argument("captions", type=Path, help="AudioCaps' format")
    parser.add_argument("--ids", type=Path, help="score these clips too, as a set of their own")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures and their conditions")
    args = parser.parse_args()
    ids = None if args.ids is None else read_ids(args.ids)
    figures = human_agreement(read_captions(args.captions), ids)
    result = {"captions": args.captions.name, "figures": figures, "conditions": conditions()}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")
    for name, scores in figures.items():
        line = ", ".join(f"{metric} {score:.4f}" for metric, score in scores.items() if metric != "clips")
        print(f"{name}, {scores['clips']} clips: {line}")


if __name__ == "__main__":
    main()
