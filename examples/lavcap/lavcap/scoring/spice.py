"""SPICE, where CoreNLP's models and a Java that it runs on are found; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pycocoevalcap

from lavcap.scoring.java import java_locale, java_version

CORENLP = "stanford-corenlp-3.6.0"
JARS = (f"{CORENLP}.jar", f"{CORENLP}-models.jar")
JAVA_VERSIONS = (8, 11)


def why_no_spice() -> str | None:
    """What SPICE lacks here, and where it goes; None where it can run."""
    folder = _library()
    absent = [jar for jar in JARS if not (folder / jar).is_file()]
    if absent:
        return (
            f"{' and '.join(absent)} not found in pycocoevalcap/spice/lib: put them there, from "
            "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
        )
    version = java_version()
    if version not in JAVA_VERSIONS:
        return f"it runs on Java {' or '.join(map(str, JAVA_VERSIONS))}, and 'java' here is {version or 'missing'}"
    return None


def spice_per_clip(hypotheses: Mapping[str, Sequence[str]], truths: Mapping[str, Sequence[str]]) -> np.ndarray:
    """F-scores [n] in the order of `truths`."""
    from pycocoevalcap.spice.spice import Spice  # it asks for its models when it is made

    with java_locale():
        _, results = Spice().compute_score(dict(truths), dict(hypotheses))
    by_id = dict(zip(sorted(truths), results))  # it sorts the ids
    return np.array([by_id[clip_id]["All"]["f"] for clip_id in truths], dtype=np.float64)


def _library() -> Path:
    return Path(next(iter(pycocoevalcap.__path__))) / "spice" / "lib"
