"""numba on a CPU: what it can, and which ops it calls.

The launchers (``launch.py``) stand behind the ops of ``ops.py``, so that autograd, vmap, ``torch.compile`` and
``torch.export`` see one node each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otfuse import _attention as attention
from otfuse import _ops as ops
from otfuse._attention import Marginals
from otfuse._backends.base import Backend, Solution, attend
from otfuse._backends.cpu import launch as _launch  # noqa: F401  (registers what runs behind the ops)
from otfuse._backends.cpu.varlen import attend_by_length, can_read
from otfuse._problem import Problem, SinkhornAttendOutput, VarlenProblem


class CpuBackend(Backend):
    name = "cpu"
    device = "cpu"

    def unavailable(self) -> list[str]:
        from otfuse._backends.cpu import numba_import

        return list(numba_import.UNAVAILABLE)

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        return self._solve(similarity, 1, p, problem)

    def solve_cost(self, cost: Tensor, p: Marginals, problem: Problem) -> Solution:
        return self._solve(cost, -1, p, problem)

    def _solve(self, values: Tensor, sign: int, p: Marginals, problem: Problem) -> Solution:
        inputs, options = _prepared(problem, sign, values, p.a, p.b)
        return Solution(*ops.call(torch.ops.otfuse.sinkhorn_cpu.default, *inputs, *options)[:5])

    def solve_tokens(self, x: Tensor, y: Tensor, p: Marginals, problem: Problem) -> tuple[Tensor, Solution]:
        inputs, options = _prepared(problem, 1, x, y, p.a, p.b)
        similarity, *outputs = ops.call(
            torch.ops.otfuse.sinkhorn_tokens_cpu.default, *inputs, problem.similarity == "cosine", *options
        )
        if problem.options.grad == "detach" and torch.is_grad_enabled():
            similarity = attention.similarity(x, y, problem.similarity)  # the loss still learns through it
        return similarity, Solution(*outputs[:5])

    def attend_varlen(self, problem: VarlenProblem) -> SinkhornAttendOutput:
        offsets = problem.cu_seqlens_x, problem.cu_seqlens_y
        if len(offsets[0]) > 1 and all(map(can_read, offsets)):
            return attend_by_length(problem, lambda dense: attend(self, dense))
        return super().attend_varlen(problem)


def _prepared(problem: Problem, sign: int, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The inputs as its ``grad`` asks for them, and the ops' options: OPTIONS and whether to keep a history."""
    grad = problem.options.grad
    if grad == "detach":
        inputs = tuple(tensor.detach() for tensor in inputs)
    history = grad == "unroll" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return inputs, (*ops.option_arguments(problem.options, sign), history)
