"""TPC-C kernels for Intel Gaudi."""

from __future__ import annotations

from otfuse.backends.base import Backend, is_installed


class TpcBackend(Backend):
    name = "tpc"
    device = "hpu"

    def unavailable(self) -> list[str]:
        reasons = ["this version of otfuse has no TPC kernels yet"]
        if not is_installed("habana_frameworks"):
            reasons.append("habana_frameworks is not installed (it comes with Intel's Gaudi containers)")
        return reasons
