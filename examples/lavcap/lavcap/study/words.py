"""Captions as words, their token ids, and their exact scoring."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lavcap.study.task import BOTH, NUM_PARTS, OBJECTS, SOUNDS, Script

OPENINGS = ("first", "then")  # one for each part
WORDS = ("<s>", *OPENINGS, *OBJECTS, *SOUNDS)
START = 0
FIRST_OBJECT = 1 + NUM_PARTS
FIRST_SOUND = FIRST_OBJECT + len(OBJECTS)
CAPTION_LENGTH = 3 * NUM_PARTS  # opening, object and sound of each part


def caption_ids(script: Script) -> Tensor:
    """[B, CAPTION_LENGTH]: ``first ball hums then box rings``."""
    ids = torch.empty(len(script.object), NUM_PARTS, 3, dtype=torch.long)
    ids[..., 0] = 1 + torch.arange(NUM_PARTS)
    ids[..., 1] = FIRST_OBJECT + script.object[..., BOTH]
    ids[..., 2] = FIRST_SOUND + script.sound[..., BOTH]
    return ids.flatten(1)


def caption_text(ids: Tensor) -> str:
    """The words of one caption [T]."""
    return " ".join(WORDS[token] for token in ids.tolist())


class Scores(NamedTuple):
    """Shares in 0 to 1. A part counts as right only if its word stands at its very place."""

    pair: float  # object and sound of a part both right: the binding
    object: float
    sound: float
    order: float  # of the pairs that are named anywhere in the caption, those named for their part; 0 if none is
    exact: float  # captions right in every word


def score(written: Tensor, truth: Tensor) -> Scores:
    """Of captions [B, CAPTION_LENGTH] against the true ones."""
    if written.shape != truth.shape or written.shape[1] != CAPTION_LENGTH:
        raise ValueError(f"captions must be [B, {CAPTION_LENGTH}] twice; got {[*written.shape]} and {[*truth.shape]}")
    said, true = written.unflatten(1, (NUM_PARTS, 3)), truth.unflatten(1, (NUM_PARTS, 3))
    right = said == true  # [B, P, 3]
    pair = right[..., 1:].all(2)  # [B, P]
    anywhere = (said[:, None, :, 1:] == true[:, :, None, 1:]).all(3).any(2)  # [B, P]: part's pair named for any part
    return Scores(
        pair=_share(pair),
        object=_share(right[..., 1]),
        sound=_share(right[..., 2]),
        order=(pair.sum() / anywhere.sum().clamp_min(1)).item(),
        exact=_share(right.flatten(1).all(1)),
    )


def _share(right: Tensor) -> float:
    return right.float().mean().item()
