"""How well a plan finds events at known times: the share of a sound's mass on pictures of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from otfuse.demo.synthesize import Event

NOTHING = -1  # the label of a token during which no event goes on


@dataclass(frozen=True)
class Recovery:
    """Mass shares are over the sound tokens that hear an event; sounds are counted whole."""

    share: float  # of their mass on pictures that show the same kind of event
    chance: float  # the same for the plan that ignores the tokens (uniform)
    ceiling: float  # the most that any plan with uniform marginals can reach
    unseen_share: float  # `share` for the sound whose own picture was never shown; NaN if there is none
    num_found: int  # events heard whose largest mass on any picture is on one of their kind
    num_heard: int


def token_labels(events: Sequence[Event], times: np.ndarray, sense: str) -> np.ndarray:
    """The kind of event `sense` ("seen" or "heard") at each time, or NOTHING: [T]."""
    labels = np.full(len(times), NOTHING)
    for event in events:
        if getattr(event, sense):
            labels[(times >= event.start) & (times < event.end)] = event.kind
    return labels


def recovery(plan: np.ndarray, events: Sequence[Event], sound_times: np.ndarray, picture_times: np.ndarray) -> Recovery:
    """Score a plan [N, M] with uniform marginals, whose rows are sounds and whose columns are pictures."""
    heard = token_labels(events, sound_times, "heard")
    seen = token_labels(events, picture_times, "seen")
    is_event = heard != NOTHING
    same = (heard[:, None] == seen[None, :]) & is_event[:, None]
    chance = float(same[is_event].mean())
    most = sum(min((heard == kind).mean(), (seen == kind).mean()) for kind in set(heard[is_event].tolist()))
    found, heard_events, unseen = 0, 0, float("nan")
    for event in events:
        rows = (sound_times >= event.start) & (sound_times < event.end)
        if not event.heard or not rows.any():
            continue
        heard_events += 1
        mass = plan[rows].sum(0)
        found += int(seen[mass.argmax()] == event.kind)
        if not event.seen:
            unseen = float(mass[seen == event.kind].sum() / mass.sum())
    return Recovery(
        share=float(plan[same].sum() / plan[is_event].sum()),
        chance=chance,
        ceiling=float(most / is_event.mean()),
        unseen_share=unseen,
        num_found=found,
        num_heard=heard_events,
    )
