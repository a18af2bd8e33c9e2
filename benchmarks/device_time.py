"""Time on a CUDA device: graphs captured and replayed between two events, contenders in turn, inputs not in the cache.

Events around calls that are launched one by one measure the host wherever a call is shorter than its launch; a
replayed graph measures the device.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TURN = 2e-3  # seconds of device time between two events, at least
CAPTURED = 10e-3  # seconds of eager calls that go into one graph: bounds the nodes of a graph of many launches
PAST_CACHE = 3  # copies of inputs and outputs weigh this many times the L2 cache
MOST_COPIES = 256

Call = Callable[..., Any]  # takes one copy of the inputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of other people's code, which the test runner takes for errors, are not ours to answer for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copies(tensors: Sequence[Tensor], traffic: int) -> list[tuple[Tensor, ...]]:
    """The inputs and as many clones as it takes to leave the L2 cache before one is read again."""
    cache = torch.cuda.get_device_properties(tensors[0].device).L2_cache_size
    count = min(MOST_COPIES, max(2, math.ceil(PAST_CACHE * cache / traffic)))
    return [tuple(tensors)] + [tuple(t.clone() for t in tensors) for _ in range(count - 1)]


class Timed:
    """A contender over copies of its inputs, in a graph if it can be captured; ``turn`` gives seconds a call."""

    def __init__(self, call: Call, inputs: list[tuple[Tensor, ...]]) -> None:
        self.call, self.note = call, ""
        eager = self._eager_seconds(inputs[0])
        self.inputs = inputs[: max(1, min(len(inputs), int(CAPTURED / eager)))]
        self.graph = self._captured()
        self.repeats, self.seconds = 1, []
        for _ in range(2):  # the first is still cold
            once = self.turn() * len(self.inputs)
        self.repeats, self.seconds = max(1, min(1000, math.ceil(TURN / once))), []

    @property
    def how(self) -> str:
        """What a row says of the way it was timed."""
        way = "graph replay" if self.graph is not None else f"events around eager calls ({self.note})"
        return f"{way}, {len(self.inputs)} input copies"

    def turn(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            self._once()
        end.record()
        end.synchronize()
        self.seconds.append(start.elapsed_time(end) * 1e-3 / (self.repeats * len(self.inputs)))
        return self.seconds[-1]

    def _once(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for tensors in self.inputs:
                self.call(*tensors)

    def _eager_seconds(self, tensors: tuple[Tensor, ...]) -> float:
        """Of a warm call; on a stream of its own, as a capture wants its warm-up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                self.call(*tensors)
                torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        return time.perf_counter() - start

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                # Kept to the end of the capture: or every call would write to the same memory, which stays in the cache.
                kept = [self.call(*tensors) for tensors in self.inputs]
                del kept
        except Exception as refused:  # whatever a peer does that a capture forbids
            torch.cuda.synchronize()
            self.note = f"not captured: {type(refused).__name__}"
            return None
        graph.replay()
        torch.cuda.synchronize()
        return graph


def interleaved(calls: dict[str, Call], inputs: list[tuple[Tensor, ...]], seconds: float) -> dict[str, Timed]:
    """All contenders timed turn by turn, for about ``seconds`` in all, so that they see the same state of the device."""
    with quiet():
        timed = {name: Timed(call, inputs) for name, call in calls.items()}
        round_seconds = sum(_timed_turn(one) for one in timed.values())
        for _ in range(max(11, min(200, int(seconds / round_seconds)))):
            for one in timed.values():
                one.turn()
    return timed


def _timed_turn(one: Timed) -> float:
    start = time.perf_counter()
    one.turn()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, read and written, of a device-to-device copy: median of ten."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    rates = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * size / (start.elapsed_time(end) * 1e-3))
    return sorted(rates[2:])[5]
