"""Triton kernels for CUDA."""

from __future__ import annotations

import importlib.util

import torch

from otfuse.backends.base import Backend
from otfuse.problem import Problem


class TritonBackend(Backend):
    name = "triton"

    def unavailable(self) -> list[str]:
        reasons = ["this version of otfuse has no Triton kernels yet"]
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed (pip install 'otfuse[cuda]')")
        if not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        device = problem.values.device
        return [] if device.type == "cuda" else [f"the tensors are on '{device}' (needs CUDA)"]
