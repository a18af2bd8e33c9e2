"""What a number is worth nothing without: machine, versions, commit, and how fast memory is here."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("otfuse", "torch", "numba", "numpy", "POT", "ott-jax", "jax")
CUDA_PACKAGES = ("otfuse", "torch", "triton", "POT", "flash-sinkhorn")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
COPY_BYTES = 2**30  # of the source: many times any cache


def conditions(device: torch.device) -> dict[str, Any]:
    packages = CUDA_PACKAGES if device.type == "cuda" else PACKAGES
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": commit(),
    }
    return facts | {"gpu": _gpu(device)} if device.type == "cuda" else facts


def file_name(facts: dict[str, Any]) -> str:
    machine = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    place = machine if "gpu" in facts else f"{machine}-{facts['cores']}-cores"
    return f"{facts['date']}-{place}.json"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """Empty where the tree does not know."""
    return _output("git", "rev-parse", "--short", "HEAD") + (
        "+changes" if _output("git", "status", "--porcelain", "-uno") else ""
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / statistics.median(seconds[2:])


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    clocks = _nvidia_smi(*CLOCKS)
    return {
        "driver": "".join(_nvidia_smi("driver_version")) or None,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 1e6,
        "memory_gb": properties.total_memory / 1e9,
        "clocks": dict(zip(CLOCKS, clocks)) or None,
    }


def _nvidia_smi(*names: str) -> list[str]:
    """Empty where it is not installed."""
    line = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader").partition("\n")[0]
    return [value.strip() for value in line.split(",")] if line else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
