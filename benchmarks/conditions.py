"""What a number is worth nothing without: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "otfuse", "torch", "numba", "numpy", "triton", "POT", "geomloss", "ott-jax", "jax", "flash-sinkhorn",
    "liger-kernel", "habana-torch-plugin",
)  # fmt: skip
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def conditions(device: torch.device, note: str = "", clock: str = "wall") -> dict[str, Any]:
    """``note``: what the person who ran it has to say of the machine."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "machine": cpu() if device.type == "cpu" else getattr(torch, device.type).get_device_name(device),
        "note": note,
        "clock": clock if device.type == "cpu" else "device",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }
    return facts | {"gpu": _gpu(device)} if device.type == "cuda" else facts


def file_name(facts: dict[str, Any]) -> str:
    machine = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    place = machine if facts["device"] != "cpu" else f"{machine}-{facts['cores']}-cores"
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
