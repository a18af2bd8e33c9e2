"""What this machine can do at most, measured in the same run: copies and matrix products."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[], float]
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30, "hpu": 2**30}  # of the source: several times any cache
SIDE = {"cpu": 1024, "cuda": 8192, "hpu": 8192}  # of the matrices
TURNS = 12
UNKNOWN_CACHE = 2**25  # bytes, where a machine does not say: more than most have


class Limits:
    """Bytes and operations a second: the best of all turns, of which ``again`` makes more in the course of a run."""

    def __init__(self, device: torch.device, small: bool = False, clock: Clock = time.perf_counter) -> None:
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
        """More turns of what was measured: a machine is not always as fast as it can be."""
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
            self.best[name] = self._measured(name, TURNS)
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
        api = getattr(torch, self.device.type)
        start, end = (api.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

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
