"""A race: every contender's answer is checked, then all are timed in turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from limits import cache_bytes, memory_available
from measured import CHECK, Answers, Measured
from timing import Contender, DeviceTurn, HostTurn, copies_beyond_cache, rates, row
from torch import Tensor

FAR_OFF = 10  # times what is allowed: a peer this wrong does something else, and is not timed
FEWEST, MOST, SLOW = 5, 400, 0.5  # turns of each contender; two where one takes SLOW seconds or more
FULL_CHECK = 2e10  # entry-rounds of the largest check of an item on a CPU with --full: some minutes
CHECKED_A_SECOND = 3e7
Extra = Callable[[Sequence[Tensor]], dict[str, Any]]  # what else there is to say of an answer, for its row


class Entered(NamedTuple):
    contender: Contender
    turn: Any  # None where nothing is timed
    error: float  # NaN where it gives no answer
    extra: dict[str, Any]


def why_not(measured: Measured, device: torch.device, full: bool, spent: bool) -> str:
    """The reason to leave a measurement out; empty where there is none."""
    if spent:
        return "the time for all was spent (--minutes)"
    # Copies and outputs; and the check of an item in float64.
    needed = 8 * measured.traffic + 48 * measured.case.N * measured.case.M
    if measured.checked_by_rows:  # no copies: it is beyond the cache as it is
        needed = 3 * measured.traffic + 16 * measured.case.N * measured.case.M
    if needed > memory_available(device):
        return f"it needs some {needed / 1e9:.1f} GB of memory, more than is free here"
    too_long = measured.check_entry_rounds > (FULL_CHECK if full else CHECK) and not measured.checked_by_rows
    if device.type == "cpu" and too_long:
        more = "" if full else " (--full allows more)"
        return (
            f"the check in float64 alone would take {measured.check_entry_rounds / CHECKED_A_SECOND:.0f} s or so{more}"
        )
    return ""


def enter_all(
    contenders: Sequence[Contender], inputs: tuple[Tensor, ...], measured: Measured, clock: str, extra: Extra | None
) -> tuple[list[Entered], dict[str, str]]:
    """Those whose answers are right, ours first, and why others are not among them. Without a ``clock`` none is timed.

    A peer that fails or is far off is left out; ours raises.
    """
    answers, entered, absent = Answers(measured, inputs), [], {}
    for contender in contenders:
        try:
            entered.append(enter(contender, inputs, measured.traffic, answers, not entered, clock, extra))
        except Exception as failure:  # whatever it has to say
            if not entered or not (clock or isinstance(failure, TimeoutError)):
                raise  # ours, or it would go unnoticed
            absent[contender.name] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
    return entered, absent


def enter(
    contender: Contender, inputs: tuple[Tensor, ...], traffic: int, answers: Answers, ours: bool, clock: str,
    extra: Extra | None = None,
) -> Entered:  # fmt: skip
    """What is checked is what a turn has computed, on CUDA from its graph where it has one."""
    turn = begin(contender, inputs, traffic, clock) if clock else None
    outputs = contender.call(*contender.prepare(*inputs)) if turn is None else turn.outputs[-1]
    if isinstance(turn, HostTurn):
        turn.outputs = []  # in the way of larger ones
    if not contender.answers:
        return Entered(contender, turn, math.nan, {})
    tensors, answer = contender.read(outputs), answers.of(contender.follows)
    off, allowed = answer.error(tensors), answer.allowed if ours else FAR_OFF * answer.allowed
    assert off <= allowed, f"{contender.name} is off by {off:.3g}, allowed {allowed:.3g}: not timed"
    return Entered(
        contender, turn, off, {"checked_items": len(answer.exact[0])} | ({} if extra is None else extra(tensors))
    )


def begin(contender: Contender, inputs: tuple[Tensor, ...], traffic: int, clock: str) -> HostTurn | DeviceTurn:
    device = inputs[0].device
    copies = copies_beyond_cache(inputs, traffic, cache_bytes(device))
    if device.type == "cpu":
        return HostTurn(contender, copies, clock)
    return DeviceTurn(contender, copies, getattr(torch, device.type))


def take_turns(benchmark: Any, turns: Sequence[Any], seconds: float, dry: bool) -> None:
    """Each has an equal part of the time, some turns at least; who needs fewer of them spreads them over all.

    Ours, the first, is shown by pytest-benchmark; the others are timed before its turns.
    """
    fewest = [2 if dry or turn.seconds > SLOW else FEWEST for turn in turns]
    counts = [max(few, min(MOST, int(seconds / len(turns) / turn.seconds))) for few, turn in zip(fewest, turns)]
    rounds, current = max(counts), itertools.count()
    ours, *others = turns

    def others_first() -> None:
        now = next(current)
        for turn, count in zip(others, counts[1:]):
            if now * count // rounds != (now - 1) * count // rounds:
                turn.timed()

    benchmark.pedantic(ours.timed, setup=others_first, rounds=rounds)


def rows(case: str, measured: Measured, entered: Sequence[Entered], rounds: float) -> list[dict[str, Any]]:
    """``rounds``: the mean of those that were run."""
    found, work = [], (measured.traffic, measured.flops(rounds))
    for contender, turn, error, extra in entered:
        one = row(case, contender, turn, entered[0].turn, error) | {"rounds": rounds} | measured.facts | extra
        found.append(one | rates(one["median_ms"], *work) if contender.answers else one)
    return found
