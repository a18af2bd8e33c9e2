"""Confidence intervals by resampling clips (Efron's percentile bootstrap)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lavcap.scoring.metrics import Metric


class Interval(NamedTuple):
    low: float
    high: float


def intervals(
    metrics: Sequence[Metric], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """For each metric, the interval that holds the score of `confidence` of the resamples of its clips.

    A resample draws as many clips as there are, with replacement, the same for every metric, and scores it as a set of
    its own (BLEU and METEOR from added-up counts). CIDEr-D's document frequencies stay those of all references.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be positive and confidence in (0, 1), got {resamples} and {confidence}")
    num_clips = len(metrics[0].per_clip)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=resamples)  # [resamples, n]
    tail = (1 - confidence) / 2
    found = {}
    for metric in metrics:
        scores = metric.of_sums(counts @ metric.summands)
        low, high = np.quantile(scores, [tail, 1 - tail])
        found[metric.name] = Interval(float(low), float(high))
    return found
