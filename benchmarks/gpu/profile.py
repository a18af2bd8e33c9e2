"""Where the time of the main sizes goes: launches, the host, iterations and tokens; and what NVIDIA's profilers say.

``python -m benchmarks.gpu.profile --out FOLDER`` writes ``profile.json`` and prints a line for each size.
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
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.answers import inputs_of, ours, with_gradient
from benchmarks.cases import CUDA_CASES, TINY, Workload
from benchmarks.contenders import Contender
from benchmarks.measuring import device_seconds
from benchmarks.results import ROOT, conditions

# Calls between two waits: few enough for the device's queue, so that the host never waits for it.
CALLS, TURNS = 100, 10
METRICS = (
    "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "launch__shared_mem_per_block", "launch__grid_size", "smsp__inst_executed.sum",
    "smsp__sass_inst_executed_op_local.sum",
)  # fmt: skip
NCU_OPTIONS = "--clock-control none -k regex:_attend|_similarity --launch-skip 4 --launch-count 2 --metrics"
INSTALLED = {  # where NVIDIA's installers put a program
    "ncu": ("usr/local/cuda*/bin/ncu", "opt/nvidia/nsight-compute/*/ncu"),
    "nsys": ("usr/local/cuda*/bin/nsys", "opt/nvidia/nsight-systems/*/bin/nsys"),
}
PATIENCE = 40  # seconds for a profiler of NVIDIA's


def call_of(workload: Workload, device: torch.device) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The call that is profiled, and its inputs."""
    attend = ours(workload, "triton")
    return attend if workload.grad is None else with_gradient(attend), inputs_of(workload, device)


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels, copies and fills on the device in one call, and their time, from torch's profiler."""
    call()
    torch.cuda.synchronize()
    calls = 20
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    kernels = {
        name: {"per_call": len(us) / calls, "median_us": statistics.median(us)} for name, us in sorted(times.items())
    }
    return {"launches_per_call": sum(map(len, times.values())) / calls, "kernels": kernels}


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


def parts(workload: Workload, device: torch.device) -> dict[str, float]:
    """What an iteration costs and what 64 features cost, as differences between sizes; the rest is neither.

    With fewer features an element may be spread over fewer programs, so their share is a rough one.
    """

    def microseconds(**changes: int) -> float:
        changed = replace(workload, case=replace(workload.case, **changes))
        call, inputs = call_of(changed, device)
        return device_seconds(Contender("ours", call), inputs, changed.traffic) * 1e6

    case, whole, one_iteration, few_features = workload.case, microseconds(), microseconds(T=1), microseconds(D=64)
    return {
        "call_us": whole,
        "one_iteration_us": one_iteration,
        "few_features_us": few_features,
        "us_per_iteration": (whole - one_iteration) / max(1, case.T - 1),
        "us_per_64_features": (whole - few_features) / max(1, case.D / 64 - 1),
    }


def profiled(workload: Workload, device: torch.device) -> dict[str, Any]:
    call, inputs = call_of(workload, device)
    facts = workload.facts | {"case": str(workload), "host": host_time(lambda: call(*inputs), device)}
    if device.type == "cpu":
        return facts  # the interpreter has no launches to count, and its time says nothing
    return facts | launches(lambda: call(*inputs)) | {"device": parts(workload, device)}


def line(facts: dict[str, Any]) -> str:
    host, device = facts["host"], facts.get("device")
    text = f"{facts['case']}: host {host['total_us']:.0f} us ({host['triton_launcher_us']:.0f} in Triton's launcher)"
    if device is None:
        return text
    return (
        f"{text}; {facts['launches_per_call']:g} launches, device {device['call_us']:.1f} us: "
        f"{device['us_per_iteration']:.3f} an iteration, {device['us_per_64_features']:.2f} for 64 features"
    )


def external() -> dict[str, str]:
    """What ncu and nsys say of forward and backward of the main size; or why they say nothing."""
    once, said = [sys.executable, "-m", "benchmarks.gpu.profile", "--once"], dict.fromkeys(INSTALLED, "not found")
    if ncu := found("ncu"):
        said["ncu"] = output([ncu, *NCU_OPTIONS.split(), ",".join(METRICS), *once])
    if nsys := found("nsys"):
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/otfuse.nsys-rep"
            output([nsys, "profile", "--trace=cuda", "--output", file, *once])
            said["nsys"] = output([nsys, "stats", "--report", "cuda_gpu_kern_sum", file])
    return said


def found(name: str) -> str | None:
    candidates = (path for place in INSTALLED[name] for path in sorted(Path("/").glob(place), reverse=True))
    return shutil.which(name) or next(map(str, candidates), None)


def output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"took more than {PATIENCE} s"
    return "\n".join([line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-60:])


def call_main_size() -> None:
    """A few forwards and backwards, for a profiler to watch."""
    call, inputs = call_of(Workload(CUDA_CASES[0], torch.bfloat16, "unroll"), torch.device("cuda"))
    for _ in range(5):
        call(*inputs)
    torch.cuda.synchronize()


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """In the order of importance."""
    if device.type == "cpu":
        cases = [(TINY, None), (TINY, "unroll")]
    else:
        main, large, small, *_ = CUDA_CASES
        square = next(case for case in CUDA_CASES if case.N == 128)
        cases = [(main, None), (main, "unroll"), (large, None)]
        cases += [] if quick else [(large, "unroll"), (main, "implicit"), (small, None), (square, None)]
    return [Workload(case, torch.bfloat16, grad) for case, grad in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for profile.json (default: this one)")
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: a tiny size in the interpreter")
    parser.add_argument("--quick", action="store_true", help="the first three, and none of NVIDIA's profilers")
    parser.add_argument("--once", action="store_true", help="only run a few calls, for a profiler to watch")
    options = parser.parse_args()
    if options.once:
        return call_main_size()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"conditions": conditions(device), "sizes": []}

    def write() -> None:
        (options.out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")

    for workload in workloads(device, options.quick):
        result["sizes"].append(profiled(workload, device))
        print(line(result["sizes"][-1]), flush=True)
        write()
    if device.type == "cuda" and not options.quick:
        result |= external()
        print(result["ncu"], result["nsys"], sep="\n")
        write()
    forwards = [one for one in result["sizes"] if not one["grad"] and "launches_per_call" in one]
    if many := [one for one in forwards if one["launches_per_call"] not in (1, 2)]:
        sys.exit("\n".join(f"{one['case']}: {one['launches_per_call']:g} launches, not one or two" for one in many))


if __name__ == "__main__":
    main()
