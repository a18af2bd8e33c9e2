"""What the best possible guess reaches, from the task's rules alone, by going through all that can happen.

Parts of a clip are drawn independently and alike, so one part says it all: 24 ways to place its three events, 30
ordered pairs of objects, 30 of sounds, each of the 21,600 equally likely. Loudness, delay, noise and where an object
stands are drawn in the same way whichever event it is, and say nothing about the caption.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

from lavcap.study.task import FRAMES_A_PART, NUM_PARTS, OBJECTS, SOUNDS


class Part(NamedTuple):
    """What happens in one part."""

    frame: tuple[int, int, int]  # of what is seen and heard, seen only, heard only
    object: tuple[int, int]  # of what is seen and heard, seen only
    sound: tuple[int, int]  # of what is seen and heard, heard only


class Ceiling(NamedTuple):
    pair: Fraction
    object: Fraction
    sound: Fraction
    exact: Fraction


def every_part() -> Iterator[Part]:
    """All that can happen in a part, each equally likely."""
    for frame, thing, sound in product(
        permutations(range(FRAMES_A_PART), 3), permutations(range(len(OBJECTS)), 2), permutations(range(len(SOUNDS)), 2)
    ):
        yield Part(frame, thing, sound)


def _heard(part: Part) -> list[tuple[int, int]]:
    return sorted([(part.frame[0], part.sound[0]), (part.frame[2], part.sound[1])])


def _seen(part: Part) -> list[tuple[int, int]]:
    return sorted([(part.frame[0], part.object[0]), (part.frame[1], part.object[1])])


def _in_turn(events: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(what for _, what in events)


# What an observer gets to know of a part. Each is given without noise.
OBSERVERS: dict[str, Callable[[Part], Hashable]] = {
    "sound alone": lambda part: tuple(_heard(part)),
    "picture alone": lambda part: tuple(_seen(part)),
    "both, without times": lambda part: (frozenset(part.sound), frozenset(part.object)),
    "both, each in its own order": lambda part: (_in_turn(_heard(part)), _in_turn(_seen(part))),
    "both, on one clock": lambda part: (tuple(_heard(part)), tuple(_seen(part))),
}


@cache
def ceiling(observe: Callable[[Part], Hashable]) -> Ceiling:
    """Expected shares of the guess that is the likeliest for what is observed, each word for itself and the pair."""
    seen: dict[Hashable, list[Part]] = defaultdict(list)
    for part in every_part():
        seen[observe(part)].append(part)
    total = sum(map(len, seen.values()))

    def best(answer: Callable[[Part], Hashable]) -> Fraction:
        return Fraction(sum(max(Counter(map(answer, parts)).values()) for parts in seen.values()), total)

    pair = best(lambda part: (part.object[0], part.sound[0]))
    return Ceiling(pair, best(lambda part: part.object[0]), best(lambda part: part.sound[0]), pair**NUM_PARTS)
