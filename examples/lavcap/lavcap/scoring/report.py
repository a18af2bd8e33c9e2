"""Scores with their intervals beside the paper's Table I, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavcap.files import write_whole
from lavcap.scoring.bootstrap import intervals
from lavcap.scoring.conditions import conditions
from lavcap.scoring.metrics import Scores, score_captions

CONFIDENCE = 0.95
COLUMNS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr-D", "SPICE", "SPIDEr")

# Audio-visual rows of Table I of the paper (arXiv 2501.09291), in percent.
_REPORTED = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr-D", "SPICE", "SPIDEr")
TABLE_I = {
    "V-ACT": dict(zip(_REPORTED, (69.8, 28.1, 49.4, 23.7, 71.1, 17.2, 44.2))),
    "AVCap, frozen": dict(zip(_REPORTED, (70.8, 29.5, 49.8, 22.8, 74.4, 16.2, 45.5))),
    "AVCap, fine-tuned": dict(zip(_REPORTED, (68.1, 28.7, 49.1, 24.3, 75.8, 17.8, 46.8))),
    "LAVCap": dict(zip(_REPORTED, (72.3, 29.7, 51.0, 26.2, 84.9, 18.5, 51.7))),
}


def score_report(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    name: str,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Scores, dict[str, Any]]:
    """Scores, and what of them goes to JSON: figures with intervals, what is missing and why, the conditions."""
    scores = score_captions(predictions, references)
    bounds = intervals(scores.metrics, resamples=resamples, confidence=CONFIDENCE, seed=seed)
    figures = {
        metric.name: {"score": metric.score, "low": bounds[metric.name].low, "high": bounds[metric.name].high}
        for metric in scores.metrics
    }
    report = {
        "name": name,
        "clips": len(references),
        "metrics": figures,
        "missing": scores.missing,
        "bootstrap": {"resamples": resamples, "confidence": CONFIDENCE, "seed": seed},
        "conditions": conditions(),
    }
    return scores, report


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table beside the paper's, in percent."""
    figures = report["metrics"]
    ours = {name: f"**{_percent(figure['score'])}**" for name, figure in figures.items()}
    bounds = {name: f"{_percent(figure['low'])}–{_percent(figure['high'])}" for name, figure in figures.items()}
    paper = [_row(name, {column: str(figure) for column, figure in row.items()}) for name, row in TABLE_I.items()]
    bootstrap = report["bootstrap"]
    lines = [
        _row("percent", {column: column for column in COLUMNS}),
        "|" + "---|" * (len(COLUMNS) + 1),
        _row(f"**{report['name']}**, {report['clips']} clips", ours),
        _row(f"{bootstrap['confidence']:.0%} interval", bounds),
        *paper,
        "",
        f"Intervals: {bootstrap['resamples']} resamples of the clips, seed {bootstrap['seed']}. Lower rows: Table I of "
        "arXiv 2501.09291, its audio-visual methods, as reported there for AudioCaps' test split (944 clips); only "
        "figures on those clips can stand beside them. What the table calls CIDEr is CIDEr-D here.",
        *(f"{name} is missing: {reason}." for name, reason in report["missing"].items()),
        "Scored with " + ", ".join(f"{what} {version}" for what, version in report["conditions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """``scores.json`` and ``scores.md``."""
    write_whole(folder / "scores.json", json.dumps(report, indent=1) + "\n")
    write_whole(folder / "scores.md", markdown(report))


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def _row(name: str, cells: Mapping[str, str]) -> str:
    return "| " + " | ".join([name, *(cells.get(column, "–") for column in COLUMNS)]) + " |"
