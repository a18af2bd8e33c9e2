"""A few real clips through every part: decode, front end, LoRA, OT-Att, OT loss, Trainer, beam search, scores.

    python tiny.py --clips DIR --captions CSV --work DIR --out DIR

The clips are MP4 files named <youtube_id>_<start>; the captions are AudioCaps' CSV that holds them. What it shows is
that the pipeline learns: the captions that come out are captions that went in. It shows nothing about captioning.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import time
from pathlib import Path

from lavcap.cli import main as lavcap

CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "otfuse", "av", "pycocoevalcap")


def run(clips: Path, captions: Path, work: Path, out: Path, machine: str, settings: list[str]) -> None:
    """Prepare, train and evaluate in ``work``, anew, and write what came of it to ``out``."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    ids = sorted(path.stem for path in clips.glob("*.mp4"))
    if not ids:
        raise SystemExit(f"no MP4 file in {clips}")
    _select(captions, set(ids), work / "captions.csv")
    overrides = [word for setting in [*settings, f"data.folder={work / 'prepared'}"] for word in ("--set", setting)]
    media = ["--media", str(clips), "--captions", str(work / "captions.csv"), "--workers", "0"]
    seconds = {
        "prepare": _timed(["prepare", str(CONFIG), *media, "--split", "clips", *overrides]),
        "train": _timed(["train", str(CONFIG), "--output", str(work / "run"), *overrides]),
        "evaluate": _timed(["evaluate", str(work / "run"), "--out", str(work / "scores")]),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_captions(work / "scores" / "captions.csv", out / "captions.csv")
    shutil.copy(work / "scores" / "scores.json", out / "scores.json")
    _write(out / "log.json", _log(work / "run"))
    _write(out / "conditions.json", _conditions(machine, seconds))


def _select(captions: Path, ids: set[str], target: Path) -> None:
    """The lines of AudioCaps' CSV that are about these clips."""
    with captions.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    clip = [header.index(name) for name in ("youtube_id", "start_time")]
    with target.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(row for row in rows if "_".join(row[column] for column in clip) in ids)])


def _timed(command: list[str]) -> dict[str, float]:
    """Seconds of a lavcap command, of the clock and of processors (Java's too), start of Python not counted."""
    start, busy = time.perf_counter(), sum(os.times()[:4])
    if lavcap(command) != 0:
        raise SystemExit(f"lavcap {' '.join(command)} failed")
    spent = {"clock": time.perf_counter() - start, "processors": sum(os.times()[:4]) - busy}
    return {name: round(value, 1) for name, value in spent.items()}


def _write_captions(scored: Path, target: Path) -> None:
    """Captions and their scores; the references stay where they are from, beside whether one of them came back."""
    with scored.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in rows[0] if not name.startswith("reference")]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*kept, "is_a_reference"])
        for row in rows:
            references = {text for name, text in row.items() if name.startswith("reference")}
            writer.writerow([*(row[name] for name in kept), row["caption"] in references])


def _log(folder: Path) -> dict[str, object]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    shown = ("step", "loss", "ce_loss", "ot_loss", "grad_norm", "learning_rate", "eval_loss")
    losses = [{name: _short(row[name]) for name in shown if name in row} for row in rows]
    return {
        "losses": [row for row in losses if len(row) > 1],
        "captions": [{name: sample[name] for name in ("step", "clip_id", "caption")} for sample in samples],
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _conditions(machine: str, seconds: dict[str, dict[str, float]]) -> dict[str, object]:
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "seconds": seconds,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _write(path: Path, content: dict[str, object]) -> None:
    """JSON; of a list every row has one line."""
    parts = []
    for key, value in content.items():
        rows = [json.dumps(row, ensure_ascii=False) for row in value] if isinstance(value, list) else None
        text = json.dumps(value) if rows is None else "[\n  " + ",\n  ".join(rows) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="A few real clips through every part of lavcap.")
    parser.add_argument("--clips", type=Path, required=True, help="folder of MP4 files named <youtube_id>_<start>")
    parser.add_argument("--captions", type=Path, required=True, help="AudioCaps' CSV that holds their captions")
    parser.add_argument("--work", type=Path, required=True, help="folder for the prepared set and the run; made anew")
    parser.add_argument("--out", type=Path, required=True, help="folder for log, captions and scores")
    parser.add_argument("--machine", default=platform.processor(), help="what the conditions say it ran on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the config")
    args = parser.parse_args()
    run(args.clips, args.captions, args.work, args.out, args.machine, args.set)


if __name__ == "__main__":
    main()
