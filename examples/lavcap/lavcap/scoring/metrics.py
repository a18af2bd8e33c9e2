"""BLEU, ROUGE-L, METEOR, CIDEr-D, SPICE and SPIDEr by pycocoevalcap's scorers, with what their resampling needs.

A score of a set is a function of sums over its clips: means for most, ratios of counts for BLEU and METEOR, which are
no means of clips' scores. :class:`Metric` keeps each clip's summands, so that :mod:`lavcap.scoring.bootstrap` can
score any resample without scoring captions again. Clips are in the order of the references.
"""

from __future__ import annotations

import inspect
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor
from pycocoevalcap.rouge.rouge import Rouge

from lavcap.scoring.java import check_java, find_java, java_environment, plain_path
from lavcap.scoring.spice import spice_per_clip, why_no_spice
from lavcap.scoring.tokens import tokenise

Tokens = Mapping[str, Sequence[str]]  # of each clip: tokenised captions


class Metric(NamedTuple):
    """One score of a set of clips."""

    name: str
    score: float
    per_clip: np.ndarray  # [n]
    summands: np.ndarray  # [n, k]
    of_sums: Callable[[np.ndarray], np.ndarray]  # [..., k] to [...]: the score of clips whose summands add up to these


class Scores(NamedTuple):
    metrics: list[Metric]
    missing: dict[str, str]  # metrics that could not be computed here, and what they need


def score_captions(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """Score one caption a clip against its references."""
    if predictions.keys() != references.keys() or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} clips must be the same clips, one at least"
        )
    check_java()
    hypotheses = tokenise({clip_id: [predictions[clip_id]] for clip_id in references})
    truths = tokenise(references)
    empty = [clip_id for clip_id, texts in truths.items() if not texts or not all(texts)]
    if empty:
        raise ValueError(f"{len(empty)} clips have a reference without a word, or none: {', '.join(empty[:3])}")
    with MeteorScorer() as meteor:
        return score_tokens(hypotheses, truths, meteor)


def score_tokens(hypotheses: Tokens, truths: Tokens, meteor: MeteorScorer) -> Scores:
    """As :func:`score_captions`, of what is tokenised; one METEOR process can serve several calls."""
    cider = _mean_metric("CIDEr-D", Cider().compute_score(truths, hypotheses)[1])
    rouge = _mean_metric("ROUGE-L", Rouge().compute_score(truths, hypotheses)[1])
    metrics = [*_bleu(hypotheses, truths), rouge, meteor.score(hypotheses, truths), cider]
    why_not = why_no_spice()
    if why_not is not None:
        return Scores(metrics, {"SPICE": why_not, "SPIDEr": "it is the mean of CIDEr-D and SPICE"})
    spice = _mean_metric("SPICE", spice_per_clip(hypotheses, truths))
    spider = _mean_metric("SPIDEr", (cider.per_clip + spice.per_clip) / 2)
    return Scores([*metrics, spice, spider], {})


def _mean_metric(name: str, per_clip: Sequence[float] | np.ndarray) -> Metric:
    values = np.asarray(per_clip, dtype=np.float64)
    summands = np.stack([values, np.ones_like(values)], axis=1)
    return Metric(name, float(values.mean()), values, summands, _mean)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _bleu(hypotheses: Tokens, truths: Tokens) -> list[Metric]:
    scorer = BleuScorer(n=4)
    for clip_id, texts in truths.items():
        scorer += (hypotheses[clip_id][0], texts)
    scores, per_clip = scorer.compute_score(option="closest", verbose=0)
    summands = np.array([_bleu_summands(counts) for counts in scorer.ctest], dtype=np.float64)
    return [
        Metric(f"BLEU-{order}", scores[order - 1], np.array(per_clip[order - 1]), summands, _bleu_of_sums(order))
        for order in range(1, 5)
    ]


def _bleu_summands(counts: Mapping[str, Any]) -> list[int]:
    """Matched n-grams, n-grams (four of each), length, and the length of the closest reference."""
    length = counts["testlen"]
    closest = min(counts["reflen"], key=lambda other: (abs(other - length), other))
    return [*counts["correct"], *counts["guess"], length, closest]


def _bleu_of_sums(order: int) -> Callable[[np.ndarray], np.ndarray]:
    def score(sums: np.ndarray) -> np.ndarray:
        precisions = (sums[..., :order] + 1e-15) / (sums[..., 4 : 4 + order] + 1e-9)
        ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
        brevity = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
        return np.asarray(np.prod(precisions, axis=-1) ** (1.0 / order) * brevity)

    return score


class MeteorScorer(Meteor):
    """pycocoevalcap's METEOR, which keeps each clip's counts: for resamples, and not to align a pair twice."""

    def __init__(self) -> None:
        """Pycocoevalcap's would start Java with the user's locale, beside itself."""
        java = find_java()
        self._stack = ExitStack()
        jar = self._stack.enter_context(plain_path(Path(inspect.getfile(Meteor)).with_name(METEOR_JAR)))
        command = [java, "-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        pipe = subprocess.PIPE
        self.meteor_p: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=java_environment())
        self.lock = threading.Lock()
        self._known: dict[tuple[str, ...], str] = {}

    def __enter__(self) -> MeteorScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.meteor_p.kill()
        with suppress(BrokenPipeError):  # what it was not sent does not matter any more
            self.meteor_p.stdin.close()
        self.meteor_p.wait()
        self.meteor_p.stdout.close()
        self.meteor_p.stderr.close()
        self._stack.close()

    def __del__(self) -> None:
        """Nothing: pycocoevalcap's would wait for ever for a lock that an error inside it leaves taken."""

    def score(self, hypotheses: Tokens, truths: Tokens) -> Metric:
        try:
            score, per_clip = self.compute_score(truths, {clip_id: hypotheses[clip_id] for clip_id in truths})
        except (BrokenPipeError, ValueError) as error:  # no answer is no number
            self.meteor_p.kill()
            message = self.meteor_p.stderr.read().decode(errors="replace").strip()[-500:]
            raise RuntimeError(f"METEOR's Java process ended: {message or error}") from error
        stats = [self._stat(hypotheses[clip_id][0], texts).split() for clip_id, texts in truths.items()]
        counts = np.array(stats, dtype=np.float64)
        whole = (counts[:, 21:23] == counts[:, 0:2]).all(1) & (counts[:, 20] == 1)
        counts[whole, 20] = 0  # METEOR does not count the one chunk of a caption that is its reference
        return Metric("METEOR", score, np.array(per_clip), counts, meteor_of_sums)

    def _stat(self, hypothesis_str: str, reference_list: Sequence[str]) -> str:
        key = (hypothesis_str, *reference_list)
        if key not in self._known:
            self._known[key] = super()._stat(hypothesis_str, reference_list)
        return self._known[key]


# METEOR 1.5's parameters for English (Denkowski and Lavie 2014, Table 1), which its jar uses.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


def meteor_of_sums(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 of added-up counts, as the jar's EVAL computes it.

    The 23 counts of a clip: length of caption and reference, their function words, matches by stage (content words of
    caption and of reference, function words of caption and of reference), chunks, matched words of both.
    """
    lengths, functions = sums[..., 0:2], sums[..., 2:4]
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # [..., stage, content/content/function/function]
    content, function = (_STAGE_WEIGHTS @ stages[..., part] for part in (slice(0, 2), slice(2, 4)))
    matched = _DELTA * content + (1 - _DELTA) * function
    total = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.moveaxis(np.divide(matched, total, out=np.zeros_like(matched), where=total > 0), -1, 0)
    blend = _ALPHA * precision + (1 - _ALPHA) * recall
    f_mean = np.divide(precision * recall, blend, out=np.zeros_like(blend), where=blend > 0)
    words = sums[..., 21:23].mean(-1)
    fragments = np.divide(sums[..., 20], words, out=np.zeros_like(words), where=words > 0)
    return np.asarray(f_mean * (1 - _GAMMA * fragments**_BETA))
