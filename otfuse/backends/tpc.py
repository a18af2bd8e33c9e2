"""TPC-C kernels for Intel Gaudi."""

from __future__ import annotations

import importlib.util

from otfuse.backends.base import Backend
from otfuse.problem import Problem


class TpcBackend(Backend):
    name = "tpc"

    def unavailable(self) -> list[str]:
        reasons = ["this version of otfuse has no TPC kernels yet"]
        if importlib.util.find_spec("habana_frameworks") is None:
            reasons.append("habana_frameworks is not installed (it comes with Intel's Gaudi containers)")
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        device = problem.values.device
        return [] if device.type == "hpu" else [f"the tensors are on '{device}' (needs HPU)"]
