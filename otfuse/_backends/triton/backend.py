"""Triton kernels for CUDA: what they can, and which ops are called.

The device code is in ``otfuse.kernels.triton``; launchers are named as the kernels that they launch: ``attend.py``
(similarity, solver and both attends in one launch or two, an item's kernel matrix on chip), ``small.py``,
``streaming.py``, ``cluster.py``, ``varlen.py``, ``loss.py``. With ``TRITON_INTERPRET=1``, set before Triton is first
imported, they run on CPU tensors, when asked for by name: slow, and for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from otfuse import _ops as ops
from otfuse._backends.base import Backend, is_installed
from otfuse._backends.triton import attend, loss, varlen, version  # noqa: F401, launchers register themselves
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._problem import (
    LossProblem,
    Problem,
    SinkhornAttendOutput,
    SinkhornOutput,
    VarlenProblem,
)


class TritonBackend(Backend):
    name = "triton"
    device = "cuda"

    def unavailable(self) -> list[str]:
        reasons = []
        if not is_installed("triton"):
            reasons.append("triton is not installed (pip install 'otfuse[cuda]')")
        else:
            reasons += version.why_too_old()
        if not INTERPRETED and not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        if not reasons:
            from otfuse._backends.triton import triton_import

            reasons += triton_import.UNAVAILABLE
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        if INTERPRETED and problem.values.device.type == "cpu":
            return self._unknown(problem)
        return super().unsupported(problem)

    def unsupported_loss(self, problem: LossProblem) -> list[str]:
        reasons = self._elsewhere(problem.values)
        if forward_ad._current_level >= 0:
            reasons.append("the loss has no forward-mode derivatives")
        if not loss.fits(problem.plan):
            reasons.append("the plan is empty, or too large for a tile")
        return reasons

    def sinkhorn(self, problem: Problem) -> SinkhornOutput:
        assert problem.cost is not None
        inputs, history = _prepared(problem, problem.cost)
        cost, _, a, b = inputs
        op = torch.ops.otfuse.sinkhorn_triton.default
        return SinkhornOutput(*ops.call(op, cost, a, b, *ops.option_arguments(problem.options, -1), history)[:5])

    def attend(self, problem: Problem, similarity: bool = False) -> tuple[SinkhornAttendOutput, Tensor | None]:
        assert problem.x is not None and problem.y is not None
        inputs, history = _prepared(problem, problem.x, problem.y)
        wanted = (history, problem.return_plan, similarity)
        kinds = problem.similarity == "cosine", problem.weights == "barycentric"
        op = torch.ops.otfuse.sinkhorn_attend_triton.default
        x, y, plan, made, *solution = ops.call(op, *inputs, *kinds, *ops.option_arguments(problem.options, 1), *wanted)
        out = SinkhornAttendOutput(x, y, plan if problem.return_plan else None, *solution[:4])
        return out, made if similarity else None

    def attend_varlen(self, problem: VarlenProblem) -> SinkhornAttendOutput:
        assert problem.x is not None and problem.y is not None
        inputs, history = _prepared(problem, problem.x, problem.y)
        packing = problem.cu_seqlens_x, problem.cu_seqlens_y, problem.max_seqlen_x, problem.max_seqlen_y
        kinds = problem.similarity == "cosine", problem.weights == "barycentric"
        op = torch.ops.otfuse.sinkhorn_attend_varlen_triton.default
        options = (*packing, *kinds, *ops.option_arguments(problem.options, 1), history, problem.return_plan)
        x, y, plan, *solution = ops.call(op, *inputs, *options)
        return SinkhornAttendOutput(x, y, plan.to(x.dtype) if problem.return_plan else None, *solution[:4])

    def token_terms(self, problem: LossProblem) -> tuple[Tensor, Tensor]:
        p = problem
        op = torch.ops.otfuse.alignment_loss_triton.default
        terms, _, has_mass = ops.call(op, p.plan, p.similarity, p.a, p.b, ops.numbers(p.temperature), *p.kinds)
        return terms, has_mass


def _prepared(problem: Problem, *values: Tensor) -> tuple[tuple[Tensor | None, ...], bool]:
    """The tensors of the problem, x and y or a cost and None, and whether a backward may want a history."""
    inputs = (values[0], values[1] if len(values) == 2 else None, problem.a, problem.b)
    return inputs, torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
