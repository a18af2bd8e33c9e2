"""Triton kernels for CUDA."""

from __future__ import annotations

import torch

from otfuse.backends.base import Backend, is_installed


class TritonBackend(Backend):
    name = "triton"
    device = "cuda"

    def unavailable(self) -> list[str]:
        reasons = ["this version of otfuse has no Triton kernels yet"]
        if not is_installed("triton"):
            reasons.append("triton is not installed (pip install 'otfuse[cuda]')")
        if not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        return reasons
