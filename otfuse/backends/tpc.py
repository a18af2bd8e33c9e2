"""TPC-C kernels for Intel Gaudi."""

from __future__ import annotations

from otfuse.backends.base import Backend, is_installed
from otfuse.problem import Problem


class TpcBackend(Backend):
    name = "tpc"

    def unavailable(self) -> list[str]:
        reasons = ["this version of otfuse has no TPC kernels yet"]
        if not is_installed("habana_frameworks"):
            reasons.append("habana_frameworks is not installed (it comes with Intel's Gaudi containers)")
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        device = problem.values.device
        return [] if device.type == "hpu" else [f"the tensors are on '{device}' (needs HPU)"]
