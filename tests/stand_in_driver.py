"""A driver for Triton that has no device: kernels are bound, specialised and compiled as for one, and not run.

Run as a program, it reports what launching costs the host, and how often something is compiled. It goes without the
interpreter, so in a process of its own: ``python tests/stand_in_driver.py``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import otfuse
from otfuse import _ops as ops
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import cluster as triton_cluster
from otfuse._backends.triton import device as devices
from otfuse._backends.triton import varlen as triton_varlen
from otfuse._backends.triton.backend import TritonBackend
from otfuse._backends.triton.cluster import HELD
from otfuse._ops import LaunchOptions
from otfuse.kernels.constants import UNROLL

launches: list[tuple[Any, ...]] = []


class StandIn:
    """What Triton asks of a driver, for an H100."""

    records = True
    stream = 7
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
        load_binary=lambda *binary: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return StandIn.stream

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            # Tensors are not kept: their memory is to be used again, as it would be.
            if StandIn.records:
                launches.append((metadata.name, args[:4], [a for a in args if type(a) in (int, float)]))

        return launch


def use() -> None:
    """From here on CPU tensors are launched on, as if they were an H100's."""
    driver.set_active(StandIn())
    for name in ("sinkhorn_attend_triton", "sinkhorn_triton"):
        for op in (name, f"{name}_backward"):
            launcher = op.replace("_triton", "").replace("sinkhorn_attend", "attend")
            ops.implement(op, getattr(backend, f"launch_{launcher}"), "CPU")
    ops.implement("sinkhorn_attend_varlen_triton", triton_varlen.launch_attend_varlen, "CPU")
    TritonBackend.device = "cpu"
    TritonBackend.unavailable = lambda self: []
    devices.multiprocessors = lambda device: 132
    devices.target_of = lambda device: "sm_90"
    backend.held_by = lambda device: HELD["sm_90"]


def attend(B: int = 64, N: int = 64, M: int = 20, D: int = 768, dtype: Any = torch.bfloat16, **options: Any) -> Any:
    x, y = torch.empty(B, N, D, dtype=dtype), torch.empty(B, M, D, dtype=dtype)
    return otfuse.sinkhorn_attend(x, y, backend="triton", **options)


def packed(longest_x: int, longest_y: int, B: int, **options: Any) -> None:
    """Items of one token, whatever the longest is said to be: nothing is run."""
    tokens, ends = torch.empty(B, 64, dtype=torch.bfloat16), torch.arange(B + 1, dtype=torch.int32)
    otfuse.sinkhorn_attend_varlen(
        tokens, tokens.clone(), ends, ends.clone(), longest_x, longest_y, backend="triton", **options
    )


def microseconds(call: Callable[[], Any], turns: int = 1000) -> float:
    """The least of five medians: what else runs on the machine adds to a median, and takes nothing from it."""
    medians = []
    for _ in range(5):
        times = []
        for _ in range(turns // 5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return 1e6 * min(medians)


def variants(kernel: Any = None) -> list[Any]:
    from otfuse.kernels.triton.attend import _attend_fwd_kernel

    return [kernel for caches in (kernel or _attend_fwd_kernel).device_caches.values() for kernel in caches[0].values()]


def compiled(kernel: Any = None) -> int:
    return len(variants(kernel))


def type_of_item() -> str:
    """What the number of an item is made before anything is done with it."""
    lines = variants()[0].asm["ttir"].splitlines()
    (number,) = (line.split("=")[0].strip() for line in lines if "tt.get_program_id x" in line)
    uses = [line for line in lines if f"{number} " in line and "get_program_id" not in line]
    return "i64" if uses and all("arith.extsi" in line and "to i64" in line for line in uses) else "\n".join(uses)


def precisions() -> list[bool | None]:
    """Whether products of float32 tokens are in tf32, in a kernel compiled for it: as torch is at first, where it
    allows it, and, with a kernel that is there already, back again."""
    found: list[bool | None] = []
    for allowed in (torch.backends.cuda.matmul.allow_tf32, True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        before = {id(kernel) for kernel in variants()}
        attend(B=2, N=16, M=16, D=32, dtype=torch.float32)
        found += [".tf32" in kernel.asm["ptx"] for kernel in variants() if id(kernel) not in before] or [None]
    return found


def main() -> None:
    use()
    attend()
    report: dict[str, Any] = {"first": compiled()}
    for N, M in ((63, 19), (33, 17), (64, 32), (50, 25), (48, 18)):  # one tile, 64 x 32
        attend(N=N, M=M)
    attend(B=3, num_iters=7, epsilon=0.02)
    report["same tile"] = compiled()
    attend(N=65)
    report["next tile"] = compiled()
    report["item"] = type_of_item()
    report["names"] = [name for name, _, _ in launches]
    report["streams"] = sorted({place[3] for _, place, _ in launches})
    _, (*report["grid"], _), report["numbers"] = launches[-1]
    StandIn.stream = 8
    attend()
    report["another stream"] = launches[-1][1][3]
    launches.clear()
    attend(B=2, N=256, D=1024)
    report["small batch"] = [(name, place[:3]) for name, place, _ in launches]
    report["tf32"] = precisions()
    launches.clear()
    for longest_x, longest_y, B in ((64, 20, 256), (33, 17, 7), (48, 32, 1)):
        packed(longest_x, longest_y, B, epsilon=B / 100, num_iters=B)
    report["packed"] = [(name, place[:3]) for name, place, _ in launches]
    report["packed, compiled"] = compiled(triton_varlen._kernels().attend_fwd)
    launches.clear()
    cost = torch.empty(3, 200, 130, requires_grad=True)
    otfuse.sinkhorn(cost, 0.1, num_iters=5, backend="triton").plan.sum().backward()
    report["cluster"] = [(name, place[:3]) for name, place, _ in launches]
    kernels = triton_cluster.rounds_kernel(), triton_cluster.adjoint_rounds_kernel()
    report["blocks"] = [kernel.metadata.num_ctas for name in kernels for kernel in variants(name)]
    StandIn.records = False
    x, y = torch.empty(64, 64, 768, dtype=torch.bfloat16), torch.empty(64, 20, 768, dtype=torch.bfloat16)
    options = (None, None, True, False, LaunchOptions(10.0, 50, -1.0, UNROLL), False, False, False)
    report["launcher, microseconds"] = microseconds(lambda: backend.launch_attend(x, y, *options))
    report["public function, microseconds"] = microseconds(lambda: otfuse.sinkhorn_attend(x, y, backend="triton"))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
