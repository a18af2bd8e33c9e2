"""Caption files: anyone's predictions, references, and what ``lavcap evaluate`` writes."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lavcap.data.captions import is_selected, read_captions
from lavcap.files import read_table, write_whole
from lavcap.scoring.metrics import Metric


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Clip ids and captions of a CSV file with ``clip_id,caption`` or AudioCaps' ``youtube_id,start_time,caption``.

    Raises:
        ValueError: no table (:func:`lavcap.files.read_table`), or other columns; the message names those there are.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no caption file {path}")
    columns, rows = read_table(path)
    if {"clip_id", "caption"} <= set(columns):
        return [(row.fields["clip_id"].strip(), row.fields["caption"]) for row in rows]
    if {"youtube_id", "start_time", "caption"} <= set(columns):
        return [(clip_id, text) for clip_id, texts in read_captions(path).items() for text in texts or ("",)]
    raise ValueError(f"{path} has the columns {columns}; it must have clip_id,caption or youtube_id,start_time,caption")


def read_pair(
    predictions: Path, references: Path, ids: Collection[str] | None = None
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """One caption for each clip, and the clip's references; `ids` chooses some of the references' clips.

    Raises:
        ValueError: clips without a prediction, with several, or predictions of other clips; all are counted and some
            are named.
    """
    truths: dict[str, list[str]] = {}
    for clip_id, caption in read_rows(references):
        if ids is None or is_selected(clip_id, ids):
            truths.setdefault(clip_id, []).append(caption)
    rows = read_rows(predictions)
    counts = Counter(clip_id for clip_id, _ in rows)
    problems = [
        _problem("clips of the references have no prediction", truths.keys() - counts.keys()),
        _problem("clips have more than one prediction", {clip_id for clip_id, count in counts.items() if count > 1}),
        _problem("predictions are of clips that the references do not have", counts.keys() - truths.keys()),
    ]
    found = "; ".join(filter(None, problems))
    if found or not truths:
        chosen = "" if ids is None else f" ({len(ids)} ids chosen)"
        raise ValueError(f"{predictions} does not fit {references}{chosen}: {found or 'there is no clip to score'}")
    return dict(rows), truths


def _problem(what: str, clip_ids: set[str]) -> str:
    if not clip_ids:
        return ""
    named = ", ".join(sorted(clip_ids)[:3]) + (", ..." if len(clip_ids) > 3 else "")
    return f"{len(clip_ids)} {what} ({named})"


def write_captions(
    path: Path,
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    metrics: Sequence[Metric] = (),
) -> None:
    """One line a clip: id, caption, its own scores, its references. ``lavcap score`` reads it as predictions."""
    most = max(map(len, references.values()))
    header = ["clip_id", "caption", *(m.name for m in metrics), *(f"reference_{i + 1}" for i in range(most))]
    rows: Iterable[list[str]] = (
        [clip_id, predictions[clip_id], *(f"{m.per_clip[i]:.4f}" for m in metrics), *texts]
        for i, (clip_id, texts) in enumerate(references.items())
    )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_whole(path, text.getvalue())
