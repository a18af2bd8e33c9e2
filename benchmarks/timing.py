"""Turns: a contender called often enough to be timed, by the host's clock or by the device's."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from limits import Limits, cache_bytes
from torch import Tensor

TURN = 0.01  # seconds
PASS = 0.1  # seconds of the host's time to launch all of a pass, at most


# The processor's time of this process is not disturbed by others on the machine; it adds up threads.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ROWS_FIRST, COLUMNS_FIRST, CONVERGED = "rows first", "columns first", "converged"


@dataclass(frozen=True)
class Contender:
    """``call`` takes one copy of the inputs, as ``prepare`` made it, and returns the answer, as ``read`` finds it."""

    name: str
    call: Callable[..., Any]
    replayed: bool = True  # from a CUDA graph; False where its code looks at values on the way
    answers: bool = True  # False: it does something else, timed for comparison
    follows: str = ROWS_FIRST  # the answer that it is held against; CONVERGED where its rounds are of another kind
    note: str = ""  # what it is given, or gives, that is not as ours
    prepare: Callable[..., Sequence[Any]] = lambda *inputs: inputs  # before the clock: to the arrays of its library
    read: Callable[[Any], Sequence[Tensor]] = lambda outputs: outputs  # after the clock: to the tensors of the answer


class HostTurn:
    """A contender called often enough for a turn of TURN seconds, on one copy of its inputs after another."""

    def __init__(self, contender: Contender, copies: Sequence[tuple[Tensor, ...]], clock: str = "wall") -> None:
        self.call, self.times, self.calls, self.clock = contender.call, [], 1, CLOCKS[clock]
        self.copies = [tuple(contender.prepare(*copy)) for copy in copies]
        self.outputs = [self.call(*self.copies[0])]
        self._next = itertools.cycle(self.copies).__next__
        self.seconds = self.timed()
        if self.seconds < TURN:  # the first may have been a warm-up
            self.seconds = min(self.timed() for _ in range(2))
        self.calls = max(1, round(TURN / self.seconds))
        self.seconds *= self.calls
        self.times = []

    def timed(self) -> float:
        start = self.clock()
        for _ in range(self.calls):
            self.call(*self._next())
        self.times.append(self.clock() - start)
        return self.times[-1]

    def per_call(self) -> list[float]:
        return [seconds / self.calls for seconds in self.times]


class DeviceTurn:
    """A contender called on one copy of its inputs after another, on CUDA in a graph; time is the device's.

    ``api`` is ``torch.cuda`` or ``torch.hpu``: streams and events go by the same names in both.

    All copies of a pass are in use at once, outputs too, so that no call finds in the cache what an earlier one
    left. A contender of which PASS holds fewer calls than there are copies gets fewer: a cache could only help it.
    """

    def __init__(self, contender: Contender, copies: Sequence[tuple[Tensor, ...]], api: Any = torch.cuda) -> None:
        self.call, self.times, self.passes, self.api = contender.call, [], 1, api
        prepared = [tuple(contender.prepare(*copy)) for copy in copies]
        self.copies = prepared[: max(1, int(PASS / self._warm_up(prepared[0])))]
        self.graph = self._captured() if contender.replayed and api is torch.cuda else None
        self._run_pass()
        self.seconds = self._pass_seconds()
        self.passes = max(1, round(TURN / self.seconds))
        self.seconds *= self.passes

    @property
    def calls(self) -> int:
        return self.passes * len(self.copies)

    def timed(self) -> float:
        self.times.append(self._pass_seconds())
        return self.times[-1]

    def per_call(self) -> list[float]:
        return [seconds / self.calls for seconds in self.times]

    def _warm_up(self, copy: tuple[Tensor, ...]) -> float:
        """Compile, load and allocate what the first calls do; seconds of a call after that. Not on the default
        stream, where what is captured later must not have a past."""
        stream = self.api.Stream()
        stream.wait_stream(self.api.current_stream())
        with self.api.stream(stream):
            for _ in range(3):
                self.api.synchronize()
                start = time.perf_counter()
                self.call(*copy)
                self.api.synchronize()
        return time.perf_counter() - start

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = [self.call(*copy) for copy in self.copies]
        return graph

    def _run_pass(self) -> None:
        if self.graph is None:
            self.outputs = [self.call(*copy) for copy in self.copies]
        else:
            self.graph.replay()

    def _pass_seconds(self) -> float:
        """Of ``passes`` passes, between two events. A pass before the first keeps the device busy while the host
        launches; where a pass is long that does not matter."""
        start, end = (self.api.Event(enable_timing=True) for _ in range(2))
        if self.passes > 1:
            self._run_pass()
        start.record()
        for _ in range(self.passes):
            self._run_pass()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copies_beyond_cache(
    inputs: tuple[Tensor, ...], traffic: int, cache: int, limit: int = 256
) -> list[tuple[Tensor, ...]]:
    """As many copies as make ``traffic`` bytes a call pass over twice the cache; one where a call does that alone."""
    count = min(limit, math.ceil(2 * cache / traffic))
    return [inputs, *(tuple(tensor.clone() for tensor in inputs) for _ in range(count - 1))]


def device_seconds(contender: Contender, inputs: tuple[Tensor, ...], traffic: int, turns: int = 9) -> float:
    """Median of a call, on the device's clock."""
    turn = DeviceTurn(contender, copies_beyond_cache(inputs, traffic, cache_bytes(inputs[0].device)))
    for _ in range(turns):
        turn.timed()
    return statistics.median(turn.per_call())


def row(
    case: str, contender: Contender, turn: HostTurn | DeviceTurn, ours: HostTurn | DeviceTurn, error: float
) -> dict[str, Any]:
    low, median, high = statistics.quantiles(turn.per_call(), n=4)
    return {
        "case": case,
        "contender": contender.name,
        "median_ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "times_ours": median / statistics.median(ours.per_call()),
        "turns": len(turn.times),
        "calls_per_turn": turn.calls,
        "replayed": isinstance(turn, DeviceTurn) and turn.graph is not None,
        "copies": len(turn.copies),
        "error": None if math.isnan(error) else error,
        "against": contender.follows if contender.answers else None,
        "note": contender.note,
    }


def rates(median_ms: float, traffic: int, flops: int) -> dict[str, float]:
    """What the case needs over the time taken; a contender that moves more than that is not credited with it."""
    seconds = median_ms / 1e3
    return {
        "traffic_mb": traffic / 1e6,
        "gflop": flops / 1e9,
        "gb_per_s": traffic / seconds / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
    }


def shares(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Of what this machine can do: the time of a copy of as many bytes, or of a matrix product of as many operations,
    whichever takes longer, over the time taken. Nothing where the row has no rates."""
    if "gb_per_s" not in row:
        return {}
    copy, product = limits.copy() / 1e9, limits.product(getattr(torch, row["dtype"])) / 1e9
    by_copy, by_product = row["gb_per_s"] / copy, row["gflop_per_s"] / product
    return {
        "copy_gb_per_s": copy,
        "product_gflop_per_s": product,
        "share_of_copy": by_copy,
        "share_of_product": by_product,
        "share_of_limit": max(by_copy, by_product),
        "limit": "copy" if by_copy >= by_product else "product",
    }
