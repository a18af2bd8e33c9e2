"""How time grows, in words: slopes of its logarithm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Point = tuple[float, float]  # what grows, and the time
# Up to which exponent each word holds.
WORDS = (
    (0.15, "hardly grows"),
    (0.75, "grows less than in proportion"),
    (1.25, "grows in proportion"),
    (1.75, "grows faster than in proportion"),
    (2.25, "grows with the square"),
)


def slope(points: Sequence[Point]) -> float:
    """The exponent p of time ~ size^p, by least squares."""
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def word(exponent: float) -> str:
    return next((text for limit, text in WORDS if exponent < limit), "grows faster than with the square")


def in_words(points: Sequence[Point], axis: str) -> str:
    """Of the smaller and the larger half apart: the cost of a call shows in the one, that of the work in the other."""
    points = sorted(points)
    if len(points) < 4:
        return f"{len(points)} points are too few to tell how time grows with {axis}"
    middle = len(points) // 2
    halves = points[: middle + 1], points[middle:]
    said = []
    for half in halves:
        exponent = slope(half)
        said.append(f"{word(exponent)} from {half[0][0]:,} to {half[-1][0]:,} (time ~ ({axis})^{exponent:.2f})")
    return f"time {said[0]}, and {said[1]}"


def largest_step(points: Sequence[Point]) -> str:
    """Of work that stays the same: where the time rises most from one point to the next."""
    points = sorted(points)
    factor, before, after = max((b[1] / a[1], a[0], b[0]) for a, b in itertools.pairwise(points))
    return f"the largest step is × {factor:.2f}, from {before:,} to {after:,}"
