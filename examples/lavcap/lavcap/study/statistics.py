"""Intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448)


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % interval, infinite for a single value."""

    mean: float
    half: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """By Student's t, which takes the seeds' results as draws from a normal distribution."""
    count = len(values)
    if not 1 <= count <= len(_T) + 1:
        raise ValueError(f"an interval needs 1 to {len(_T) + 1} values, got {count}")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, _T[count - 2] * math.sqrt(variance / count), count)


def paired(values: dict[int, float], others: dict[int, float]) -> Estimate | None:
    """Of the differences between two conditions' values by seed, over the seeds that both have; None if none."""
    both = sorted(values.keys() & others.keys())
    return estimate([values[seed] - others[seed] for seed in both]) if both else None
