"""The most memory that a call holds at once beyond its inputs and outputs.

``python -m benchmarks.memory`` prints it as JSON, a row for each case and way: on a CPU it is the peak of a stretch of
the process, so it takes a fresh one in which nothing else goes on. On a GPU the allocator tells.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.answers import inputs_of, with_gradient
from benchmarks.cases import Case, Workload
from benchmarks.contenders import EAGER, batched_log_domain, bound, our_backends

# Every array gets pages of its own and gives them back, so that a peak is what is alive at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SLACK = 2**20  # bytes: pages, the allocator's own, Python's objects
LINES = 8  # arrays of [B, N + M] in float64 that a call may hold: potentials, norms, sums


class Promise(NamedTuple):
    workload: Workload
    promised: dict[str, float]  # by backend: [B, N, M] in float32 that it may hold beyond the outputs, at most


BATCH = Case("square", 64, 128, 128, 64)  # the largest that Triton keeps on chip
ONE = Case("square", 1, 1024, 1024, 64, T=10)
PROMISES = [
    Promise(Workload(BATCH), {"triton": 0, "tpc": 0, "cpu": 2}),
    Promise(Workload(BATCH, tol=1e-3), {"triton": 0, "tpc": 0, "cpu": 2}),
    Promise(Workload(BATCH, grad="unroll"), {"triton": 0}),
    Promise(Workload(BATCH, op="solve"), {"triton": 0, "tpc": 0, "cpu": 0}),
    Promise(Workload(ONE, op="solve"), {"cpu": 0}),
    Promise(Workload(ONE, grad="unroll", op="solve"), {"cpu": 1}),  # the plan, kept for the backward
    Promise(Workload(ONE, grad="implicit", op="solve"), {"cpu": 1}),
    Promise(Workload(ONE), {"cpu": 2}),  # similarity and plan: they do not stay in a cache
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or hpu")
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu" and not os.access(CLEAR, os.W_OK):
        sys.exit("this system does not tell the peak memory of a stretch of a process")
    torch.set_num_threads(1)
    json.dump([row for promise in PROMISES for row in rows(promise, device)], sys.stdout)


def rows(promise: Promise, device: torch.device) -> list[dict[str, Any]]:
    """Ours, and what the same costs in plain PyTorch."""
    workload = promise.workload
    wrap = with_gradient if workload.grad else lambda call: call
    plain = wrap(bound(workload.op, batched_log_domain, workload.case))
    inputs = inputs_of(workload, device)
    contenders, _ = our_backends(workload, inputs)
    calls = [(one.name, one.call) for one in contenders] + [(EAGER, plain)]
    return [row(promise, name, call, inputs) for name, call in calls]


def row(promise: Promise, name: str, call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    workload, case = promise.workload, promise.workload.case
    call(*inputs)  # brings in code, data and the buffers that a library keeps for products of this size
    peak, outputs = peak_bytes(lambda: call(*inputs), inputs[0].device)
    given = sum(tensor.nbytes for tensor in outputs)
    extra, matrix = peak - given, 4 * case.B * case.N * case.M
    lines = 8 * case.B * (case.N + case.M) * (LINES + (case.T if workload.grad == "unroll" else 0))
    matrices = promise.promised.get(name.removeprefix("otfuse "))
    promised = None if matrices is None else (matrices * matrix + lines + SLACK) / 1e6
    return {
        "suite": "memory", "case": f"memory of {workload}", "contender": name, "extra_mb": extra / 1e6,
        "inputs_mb": sum(tensor.nbytes for tensor in inputs) / 1e6, "outputs_mb": given / 1e6,
        "matrices": extra / matrix, "promised_mb": promised, **workload.facts,
    }  # fmt: skip


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """At once, beyond what was there before; and what the call returned."""
    gc.collect()
    if device.type != "cpu":
        api = getattr(torch, device.type)
        api.synchronize()
        api.reset_peak_memory_stats()
        before = api.memory_allocated()
        outputs = call()
        api.synchronize()
        return api.max_memory_allocated() - before, outputs
    CLEAR.write_text("5")  # the peak starts here
    before = _status("VmRSS")
    outputs = call()
    return _status("VmHWM") - before, outputs


def _status(key: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
