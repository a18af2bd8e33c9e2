"""Where the time of the main sizes goes: launches, the host, rounds and tokens; and what NVIDIA's profilers say.

``python benchmarks/profile_gpu.py --out FOLDER`` writes ``profile.json`` and prints a line for each size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import CUDA_CASES, TINY
from conditions import conditions
from measured import Measured, inputs_of, ours
from peers import with_gradient
from timing import Contender, device_seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CALLS, TURNS = (
    100,
    10,
)  # calls between two waits: few enough for the device's queue, so that the host never waits for it
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__grid_size",
    "smsp__inst_executed.sum",
    "smsp__sass_inst_executed_op_local.sum",
)
NCU_PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
NSYS_PLACES = ("/usr/local/cuda*/bin/nsys", "/opt/nvidia/nsight-systems/*/bin/nsys")
PATIENCE = 40  # seconds for a profiler of NVIDIA's


def bound(measured: Measured, device: torch.device) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The call that is profiled, and its inputs."""
    attend = ours(measured, "triton")
    return attend if measured.grad is None else with_gradient(attend), inputs_of(measured, device)


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels, copies and fills on the device in one call, and their time, from torch's profiler."""
    call()
    torch.cuda.synchronize()
    calls = 20
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = sorted({event.name for event in events})
    times = {name: [event.time_range.elapsed_us() for event in events if event.name == name] for name in names}
    return {
        "launches_per_call": len(events) / calls,
        "kernels": {
            name: {"per_call": len(us) / calls, "median_us": statistics.median(us)} for name, us in times.items()
        },
    }


def host_time(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Median microseconds that a call takes the host without waiting for the device, and those in Triton's launcher."""
    totals, launcher = [], [0.0]
    on_gpu = device.type == "cuda"
    call()
    with timed_launcher(launcher):
        for _ in range(TURNS if on_gpu else 1):
            if on_gpu:
                torch.cuda.synchronize()
            for _ in range(CALLS if on_gpu else 2):
                before, launcher[0] = time.perf_counter(), 0.0
                call()
                totals.append((time.perf_counter() - before, launcher[0]))
    total, in_triton = (statistics.median(column) * 1e6 for column in zip(*totals))
    return {"total_us": total, "triton_launcher_us": in_triton, "python_and_torch_us": total - in_triton}


@contextlib.contextmanager
def timed_launcher(spent: list[float]) -> Iterator[None]:
    """Adds up in ``spent[0]`` the time in Triton's launcher of compiled kernels."""
    from triton.compiler import CompiledKernel

    original = CompiledKernel.__getitem__

    def timed(self: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            start = time.perf_counter()
            original(self, grid)(*args, **options)
            spent[0] += time.perf_counter() - start

        return run

    CompiledKernel.__getitem__ = timed
    try:
        yield
    finally:
        CompiledKernel.__getitem__ = original


def microseconds(measured: Measured, device: torch.device) -> float:
    """A call on the device's clock, replayed."""
    call, inputs = bound(measured, device)
    return device_seconds(Contender("ours", call), inputs, measured.traffic) * 1e6


def parts(measured: Measured, device: torch.device) -> dict[str, float]:
    """What a round costs and what 64 features cost, as differences between sizes; the rest is neither.

    With fewer features an item may be spread over fewer programs, so their share is a rough one.
    """
    case = measured.case
    all_us = microseconds(measured, device)
    one_round = microseconds(replace(measured, case=replace(case, T=1)), device)
    few_features = microseconds(replace(measured, case=replace(case, D=64)), device)
    return {
        "call_us": all_us,
        "one_round_us": one_round,
        "few_features_us": few_features,
        "us_per_round": (all_us - one_round) / max(1, case.T - 1),
        "us_per_64_features": (all_us - few_features) / max(1, case.D / 64 - 1),
    }


def profiled(measured: Measured, device: torch.device) -> dict[str, Any]:
    call, inputs = bound(measured, device)
    facts = measured.facts | {"case": str(measured), "host": host_time(lambda: call(*inputs), device)}
    if device.type == "cpu":
        return facts  # the interpreter has no launches to count, and its time says nothing
    return facts | launches(lambda: call(*inputs)) | {"device": parts(measured, device)}


def too_many_launches(results: list[dict[str, Any]]) -> list[str]:
    """Forwards that are not one launch or two."""
    counts = {
        one["case"]: one["launches_per_call"] for one in results if not one["grad"] and "launches_per_call" in one
    }
    return [f"{case}: {count:g} launches, not one or two" for case, count in counts.items() if count not in (1, 2)]


def line(facts: dict[str, Any]) -> str:
    host = facts["host"]
    text = f"{facts['case']}: host {host['total_us']:.0f} us ({host['triton_launcher_us']:.0f} in Triton's launcher)"
    if "device" not in facts:
        return text
    device = facts["device"]
    return (
        f"{text}; {facts['launches_per_call']:g} launches, device {device['call_us']:.1f} us: "
        f"{device['us_per_round']:.3f} a round, {device['us_per_64_features']:.2f} for 64 features"
    )


def found(name: str, places: tuple[str, ...]) -> str | None:
    """A program on the path or where NVIDIA's installers put it."""
    candidates = (path for place in places for path in sorted(Path("/").glob(place.lstrip("/")), reverse=True))
    return shutil.which(name) or next(map(str, candidates), None)


def external() -> dict[str, str]:
    """What ncu and nsys say of forward and backward of the main size; or why they say nothing."""
    this = [sys.executable, __file__, "--once"]
    ncu, nsys = found("ncu", NCU_PLACES), found("nsys", NSYS_PLACES)
    options = [
        "--clock-control",
        "none",
        "-k",
        "regex:_attend|_similarity",
        "--launch-skip",
        "4",
        "--launch-count",
        "2",
    ]
    return {
        "ncu": said([ncu, *options, "--metrics", ",".join(METRICS), *this]) if ncu else "not found",
        "nsys": said([nsys, "stats", "--report", "cuda_gpu_kern_sum", *trace(nsys, this)]) if nsys else "not found",
    }


def trace(nsys: str, command: list[str]) -> list[str]:
    """Record the command; the file to make a summary of."""
    file = Path(tempfile.mkdtemp()) / "otfuse.nsys-rep"
    said([nsys, "profile", "--trace=cuda", "--output", str(file), *command])
    return [str(file)]


def said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"took more than {PATIENCE} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "\n".join(lines[-60:])


def once() -> None:
    """A few forwards and backwards of the main size, for a profiler to watch."""
    call, inputs = bound(Measured(CUDA_CASES[0], torch.bfloat16, "unroll"), torch.device("cuda"))
    for _ in range(5):
        call(*inputs)
    torch.cuda.synchronize()


def chosen(device: torch.device, quick: bool) -> list[Measured]:
    """In the order of importance."""
    if device.type == "cpu":
        cases = [(TINY, None), (TINY, "unroll")]
    else:
        main, large, small, *_ = CUDA_CASES
        square = next(case for case in CUDA_CASES if case.N == 128)
        cases = [(main, None), (main, "unroll"), (large, None)]
        cases += [] if quick else [(large, "unroll"), (main, "implicit"), (small, None), (square, None)]
    return [Measured(case, torch.bfloat16, grad) for case, grad in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for profile.json (default: this one)")
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: a tiny size in the interpreter")
    parser.add_argument("--quick", action="store_true", help="the first three, and none of NVIDIA's profilers")
    parser.add_argument("--once", action="store_true", help="only run a few calls, for a profiler to watch")
    options = parser.parse_args()
    if options.once:
        return once()
    device = torch.device(options.device)
    result: dict[str, Any] = {"conditions": conditions(device), "sizes": []}
    for measured in chosen(device, options.quick):
        result["sizes"].append(profiled(measured, device))
        print(line(result["sizes"][-1]), flush=True)
        write(result, options.out)
    if device.type == "cuda" and not options.quick:
        result |= external()
        print(result["ncu"], result["nsys"], sep="\n")
        write(result, options.out)
    if wrong := too_many_launches(result["sizes"]):
        sys.exit("\n".join(wrong))


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
