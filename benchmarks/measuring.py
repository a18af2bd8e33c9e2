"""The answer is checked, then contenders take turns, by the host's clock or the device's; what a machine can do.

A limit is what this machine reached in the same run: bytes a second of a copy, operations a second of a matrix product.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import CHECK, Workload
from benchmarks.contenders import Contender

TURN = 0.01  # seconds
PASS = 0.1  # seconds of the host's time to launch all of a pass, at most
FAR_OFF = 10  # times what is allowed: a peer this wrong does something else, and is not timed
FEWEST, MOST, SLOW = 5, 400, 0.5  # turns of each contender; two where one takes SLOW seconds or more
FULL_CHECK = 2e10  # entry-iterations of the largest check of an element on a CPU with --full: some minutes
CHECKED_A_SECOND = 3e7
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30, "hpu": 2**30}  # of the source: several times any cache
SIDE = {"cpu": 1024, "cuda": 8192, "hpu": 8192}  # of the matrices
LIMIT_TURNS = 12
UNKNOWN_CACHE = 2**25  # bytes, where a machine does not say: more than most have
# The processor's time of this process is not disturbed by others on the machine; it adds up threads.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Extra = Callable[[Sequence[Tensor]], dict[str, Any]]  # what else there is to say of an answer, for its row


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
        if self.passes > 1:
            self._run_pass()
        return event_seconds(lambda: [self._run_pass() for _ in range(self.passes)], self.api)


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


def event_seconds(call: Callable[[], Any], api: Any) -> float:
    """Of a call on the device, between two events."""
    start, end = (api.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Checked(NamedTuple):
    contender: Contender
    turn: Any  # None where nothing is timed
    error: float  # NaN where it gives no answer
    extra: dict[str, Any]


def why_not(workload: Workload, device: torch.device, full: bool) -> str:
    """The reason to leave a measurement out; empty where there is none."""
    # Copies and outputs; and the check of an element in float64.
    needed = 8 * workload.traffic + 48 * workload.case.N * workload.case.M
    if workload.checked_by_rows:  # no copies: it is beyond the cache as it is
        needed = 3 * workload.traffic + 16 * workload.case.N * workload.case.M
    if needed > memory_available(device):
        return f"it needs some {needed / 1e9:.1f} GB of memory, more than is free here"
    too_long = workload.check_entry_iterations > (FULL_CHECK if full else CHECK) and not workload.checked_by_rows
    if device.type == "cpu" and too_long:
        more = "" if full else " (--full allows more)"
        seconds = workload.check_entry_iterations / CHECKED_A_SECOND
        return f"the check in float64 alone would take {seconds:.0f} s or so{more}"
    return ""


def check_all(
    contenders: Sequence[Contender], inputs: tuple[Tensor, ...], traffic: int, answers: Any, clock: str,
    extra: Extra | None = None,
) -> tuple[list[Checked], dict[str, str]]:  # fmt: skip
    """Those whose answers are right, ours first, and why others are not among them. Without a ``clock`` none is timed.

    A peer that fails or is far off is left out; ours raises.
    """
    checked, absent = [], {}
    for contender in contenders:
        try:
            checked.append(check(contender, inputs, traffic, answers, not checked, clock, extra))
        except Exception as failure:  # whatever it has to say
            if not checked or not (clock or isinstance(failure, TimeoutError)):
                raise  # ours, or it would go unnoticed
            absent[contender.name] = f"{type(failure).__name__}: {failure}".partition("\n")[0][:200]
    return checked, absent


def check(
    contender: Contender, inputs: tuple[Tensor, ...], traffic: int, answers: Any, ours: bool, clock: str,
    extra: Extra | None = None,
) -> Checked:  # fmt: skip
    """What is checked is what a turn has computed, on CUDA from its graph where it has one."""
    turn = begin(contender, inputs, traffic, clock) if clock else None
    outputs = contender.call(*contender.prepare(*inputs)) if turn is None else turn.outputs[-1]
    if isinstance(turn, HostTurn):
        turn.outputs = []  # in the way of larger ones
    if not contender.answers:
        return Checked(contender, turn, math.nan, {})
    tensors, answer = contender.read(outputs), answers.of(contender.follows)
    off, allowed = answer.error(tensors), answer.allowed if ours else FAR_OFF * answer.allowed
    assert off <= allowed, f"{contender.name} is off by {off:.3g}, allowed {allowed:.3g}: not timed"
    return Checked(
        contender, turn, off, {"checked_elements": len(answer.exact[0])} | ({} if extra is None else extra(tensors))
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
    turns_of_ours, current = max(counts), itertools.count()
    ours, *others = turns

    def others_first() -> None:
        now = next(current)
        for turn, count in zip(others, counts[1:]):
            if now * count // turns_of_ours != (now - 1) * count // turns_of_ours:
                turn.timed()

    benchmark.pedantic(ours.timed, setup=others_first, rounds=turns_of_ours)


def rows(case: str, workload: Any, checked: Sequence[Checked], iterations: float) -> list[dict[str, Any]]:
    """``iterations``: the mean of those that were run."""
    found, ours = [], statistics.median(checked[0].turn.per_call())
    for contender, turn, error, extra in checked:
        low, median, high = statistics.quantiles(turn.per_call(), n=4)
        row = {
            "case": case,
            "contender": contender.name,
            "median_ms": median * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "times_ours": median / ours,
            "turns": len(turn.times),
            "calls_per_turn": turn.calls,
            "replayed": isinstance(turn, DeviceTurn) and turn.graph is not None,
            "copies": len(turn.copies),
            "error": None if math.isnan(error) else error,
            "against": contender.follows if contender.answers else None,
            "note": contender.note,
            "iterations": iterations,
        }
        work = rates(median * 1e3, workload.traffic, workload.flops(iterations)) if contender.answers else {}
        found.append(row | workload.facts | extra | work)
    return found


def rates(median_ms: float, traffic: int, flops: int) -> dict[str, float]:
    """What the case needs over the time taken; a contender that moves more than that is not credited with it."""
    seconds = median_ms / 1e3
    return {
        "traffic_mb": traffic / 1e6,
        "gflop": flops / 1e9,
        "gb_per_s": traffic / seconds / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
    }


def shares(row: dict[str, Any], limits: MachineLimits) -> dict[str, Any]:
    """Of its limit: the time of a copy of as many bytes, or of a matrix product of as many operations,
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


class MachineLimits:
    """Bytes and operations a second: the best of all turns, of which ``again`` makes more in the course of a run."""

    def __init__(
        self, device: torch.device, small: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``small``: of small matrices, to try this out; the figures say nothing. ``clock``: of the host."""
        self.device, self.small, self.clock = device, small, clock
        self.best: dict[str, float] = {}  # seconds of a turn: of "copy", or of a product in a dtype

    def copy(self) -> float:
        """Bytes a second that a copy within the device's memory reads and writes."""
        return 2 * self._copy_bytes / self._seconds("copy")

    def product(self, dtype: torch.dtype) -> float:
        """Operations a second of a product of square matrices, in the dtype or in float32, whichever is faster."""
        on_cpu = self.device.type == "cpu"
        slow = on_cpu and dtype not in (torch.float32, torch.bfloat16)  # of these a CPU makes a loop
        names = {"float32"} if slow else {str(dtype).removeprefix("torch."), "float32"}
        return 2 * self._side**3 / min(map(self._seconds, names))

    def again(self) -> None:
        """More turns of what was workload: a machine is not always as fast as it can be."""
        for name in self.best:
            self.best[name] = min(self.best[name], self._measured(name, turns=2))

    def facts(self) -> dict[str, Any]:
        products = {name: 2 * self._side**3 / seconds / 1e9 for name, seconds in self.best.items() if name != "copy"}
        return {"copy_gb_per_s": self.copy() / 1e9, "product_gflop_per_s": products}

    @property
    def _copy_bytes(self) -> int:
        return 2**12 if self.small else COPY_BYTES[self.device.type]

    @property
    def _side(self) -> int:
        return 16 if self.small else SIDE[self.device.type]

    def _seconds(self, name: str) -> float:
        if name not in self.best:
            self.best[name] = self._measured(name, LIMIT_TURNS)
        return self.best[name]

    def _measured(self, name: str, turns: int) -> float:
        """The least of some turns, by the clock of the device where it has one."""
        call = self._copying() if name == "copy" else self._multiplying(getattr(torch, name))
        seconds = self._on_host if self.device.type == "cpu" else self._on_device
        call()
        return min(seconds(call) for _ in range(turns))

    def _on_host(self, call: Callable[[], Any]) -> float:
        start = self.clock()
        call()
        return self.clock() - start

    def _on_device(self, call: Callable[[], Any]) -> float:
        return event_seconds(call, getattr(torch, self.device.type))

    def _copying(self) -> Callable[[], Any]:
        source = torch.empty(self._copy_bytes, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _multiplying(self, dtype: torch.dtype) -> Callable[[], Any]:
        left, right = (torch.rand(self._side, self._side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[1]) * 1024 for text in sizes if (size := re.match(r"(\d+)K", text))]
    return max(found) if found and device.type == "cpu" else UNKNOWN_CACHE


def memory_available(device: torch.device) -> float:
    """Bytes; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found and device.type == "cpu" else math.inf
