"""What this machine can do at most, measured in the same run: copies and matrix products."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30, "hpu": 2**30}  # of the source: several times any cache
SIDE = {"cpu": 1024, "cuda": 8192, "hpu": 8192}  # of the matrices
TURNS = 12
UNKNOWN_CACHE = 2**25  # bytes, where a machine does not say: more than most have


class Limits:
    """Bytes and operations a second, each measured when it is first asked for."""

    def __init__(self, device: torch.device, small: bool = False) -> None:
        """``small``: of small matrices, to try this out; the figures say nothing."""
        self.device, self.small = device, small
        self.copy = cache(self._copy)
        self._product = cache(self._product_in)
        self._products: dict[str, float] = {}

    def _copy(self) -> float:
        """Bytes a second that a copy within the device's memory reads and writes."""
        size = 2**12 if self.small else COPY_BYTES[self.device.type]
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * size / _seconds(lambda: target.copy_(source), self.device)

    def product(self, dtype: torch.dtype) -> float:
        """Operations a second of a product of square matrices, in the dtype or in float32, whichever is faster."""
        on_cpu = self.device.type == "cpu"
        slow = on_cpu and dtype not in (torch.float32, torch.bfloat16)  # of these a CPU makes a loop
        return max(map(self._product, {torch.float32} if slow else {dtype, torch.float32}))

    def _product_in(self, dtype: torch.dtype) -> float:
        side = 16 if self.small else SIDE[self.device.type]
        left, right = (torch.rand(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        rate = 2 * side**3 / _seconds(lambda: torch.mm(left, right, out=out), self.device)
        self._products[str(dtype).removeprefix("torch.")] = rate / 1e9
        return rate

    def facts(self) -> dict[str, Any]:
        return {"copy_gb_per_s": self.copy() / 1e9, "product_gflop_per_s": dict(self._products)}


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


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The least of some turns, since it is a limit; by the clock of the device where it has one."""
    for _ in range(2):
        call()
    return min((_on_host if device.type == "cpu" else _on_device)(call, device) for _ in range(TURNS))


def _on_host(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_device(call: Callable[[], Any], device: torch.device) -> float:
    api = getattr(torch, device.type)
    start, end = (api.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
