"""Turns: a contender called often enough to be timed, by the host's clock or by the device's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TURN = 0.01  # seconds
PASS = 0.1  # seconds of the host's time to launch all of a pass, at most


@dataclass(frozen=True)
class Contender:
    """``call`` takes one copy of the inputs and returns tensors, in the order of the answer it is checked against."""

    name: str
    call: Callable[..., Sequence[Tensor]]
    replayed: bool = True  # from a CUDA graph; False where its code looks at values on the way
    answers: bool = True  # False: it does something else, timed for comparison


class HostTurn:
    """A contender called often enough for a turn of TURN seconds."""

    def __init__(self, contender: Callable[[], Any], enabled: bool) -> None:
        self.contender, self.calls, self.seconds = contender, 1, 0.0
        self.times: list[float] = []
        if enabled:
            self.seconds = min(self.timed() for _ in range(3))
            self.calls = max(1, round(TURN / self.seconds))
            self.seconds *= self.calls
            self.times = []

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.contender()

    def timed(self) -> float:
        start = time.perf_counter()
        self()
        self.times.append(time.perf_counter() - start)
        return self.times[-1]

    def per_call(self) -> list[float]:
        return [seconds / self.calls for seconds in self.times]


class DeviceTurn:
    """A contender called on one copy of its inputs after another, in a CUDA graph; time is the device's.

    All copies of a pass are in use at once, outputs too, so that no call finds in the cache what an earlier one
    left. A contender of which PASS holds fewer calls than there are copies gets fewer: a cache could only help it.
    """

    def __init__(self, contender: Contender, copies: Sequence[tuple[Tensor, ...]]) -> None:
        self.call, self.times, self.passes = contender.call, [], 1
        self.copies = copies[: max(1, int(PASS / self._warm_up(copies[0])))]
        self.graph = self._captured() if contender.replayed else None
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                self.call(*copy)
                torch.cuda.synchronize()
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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    """As many copies as make ``traffic`` bytes a call pass over twice the cache."""
    count = min(limit, max(2, math.ceil(2 * cache / traffic)))
    return [tuple(tensor.clone() for tensor in inputs) for _ in range(count)]


def device_seconds(contender: Contender, inputs: tuple[Tensor, ...], traffic: int, turns: int = 9) -> float:
    """Median of a call, on the device's clock."""
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    turn = DeviceTurn(contender, copies_beyond_cache(inputs, traffic, cache))
    for _ in range(turns):
        turn.timed()
    return statistics.median(turn.per_call())


def row(
    case: str, contender: str, turn: HostTurn | DeviceTurn, ours: HostTurn | DeviceTurn, error: float
) -> dict[str, Any]:
    low, median, high = statistics.quantiles(turn.per_call(), n=4)
    return {
        "case": case,
        "contender": contender,
        "median_ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "times_ours": median / statistics.median(ours.per_call()),
        "turns": len(turn.times),
        "calls_per_turn": turn.calls,
        "error": None if math.isnan(error) else error,
    }


def rates(median_ms: float, traffic: int, flops: int, peak: float | None) -> dict[str, Any]:
    """What the case needs over the time taken; a contender that moves more than that is not credited with it.

    ``peak`` is the bytes a second of a copy in the same run.
    """
    seconds = median_ms / 1e3
    return {
        "traffic_mb": traffic / 1e6,
        "gflop": flops / 1e9,
        "gb_per_s": traffic / seconds / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
        "copy_gb_per_s": None if peak is None else peak / 1e9,
        "share_of_copy": None if peak is None else traffic / seconds / peak,
    }
