"""Clips whose sounds and pictures are made here, with captions: for pictures of lavcap that belong to nobody.

Shapes and sounds are those of otfuse's demo. In each clip one kind of event comes a few times, then another.
"""

from __future__ import annotations

import csv
from itertools import permutations
from pathlib import Path

import numpy as np

from otfuse.demo.synthesize import KINDS, Event, draw_pictures, make_sound, write_media

SECONDS = 10.0
STARTS = (0.4, 1.9, 3.4, 5.4, 6.9, 8.4)  # of the events: three of one kind, then three of another
LASTS = 0.7
NAMES = ("disc", "square", "triangle", "cross")
DEEDS = ("hums low", "beeps high", "chirps upwards", "hisses")


def write_clips(folder: Path, count: int = 6) -> Path:
    """Up to six clips ``<first>-<second>_0.mp4``, and ``captions.csv`` in AudioCaps' format; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(permutations(range(len(KINDS)), 2))[::2][:count]
    rows = []
    for number, (first, second) in enumerate(pairs):
        name = f"{NAMES[first]}-{NAMES[second]}"
        kinds = [first] * 3 + [second] * 3
        events = [Event(kind, start, start + LASTS) for kind, start in zip(kinds, STARTS)]
        rng = np.random.default_rng(number)
        pictures = draw_pictures(events, SECONDS, rng)
        write_media(folder / f"{name}_0.mp4", pictures, make_sound(events, SECONDS, rng))
        rows += [(f"{name}{k}", name, 0, caption) for k, caption in enumerate(_captions(first, second))]
    path = folder / "captions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("audiocap_id", "youtube_id", "start_time", "caption"), *rows])
    return path


def _captions(first: int, second: int) -> list[str]:
    one, other = (f"a {NAMES[kind]} {DEEDS[kind]}" for kind in (first, second))
    return [f"{one} three times, then {other}", f"{one}, followed by {other}", f"{one} before {other}"]
