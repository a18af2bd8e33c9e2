"""What is here: versions, devices, and each backend usable or why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import otfuse
from otfuse._backends.tpc import emulator as _tpc_emulator

PACKAGES = ("torch", "triton", "numba", "habana-torch-plugin", "POT", "av", "matplotlib", "numpy")


def gather() -> dict[str, Any]:
    """Versions, devices and backends as plain data."""
    return {
        "otfuse": otfuse.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "backends": {name: {"usable": not reasons, "reasons": reasons} for name, reasons in otfuse.backends().items()},
        "tpc_emulator": _tpc_emulator.COMPILER,
        "GC_KERNEL_PATH": os.environ.get("GC_KERNEL_PATH"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    hpu: Any = getattr(torch, "hpu", None)  # once habana_frameworks has been imported
    if hpu is not None and hpu.is_available():
        devices += [f"hpu:{i} {hpu.get_device_name(i)}" for i in range(hpu.device_count())]
    return devices


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m otfuse info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for machines")
    facts = gather()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"otfuse {facts['otfuse']}, Python {facts['python']}, {facts['platform']}")
    print(
        "packages: " + ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["packages"].items())
    )
    print(f"devices:  {', '.join(facts['devices'])}; {facts['threads']} CPU threads")
    print('backends, in the order in which "auto" asks them:')
    for name, state in facts["backends"].items():
        print(f"  {name:<7} {'usable' if state['usable'] else 'not usable: ' + '; '.join(state['reasons'])}")
    compiler = facts["tpc_emulator"]
    emulated = f"usable, with {compiler}" if compiler else f"not usable: {_tpc_emulator.HOW_TO_GET_ONE}"
    print(f'tpc on CPU tensors (emulated, by backend="tpc" alone): {emulated}')
    print(f"GC_KERNEL_PATH: {facts['GC_KERNEL_PATH'] or 'not set'}")
    return 0
