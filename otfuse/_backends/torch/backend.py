"""Plain PyTorch, any device.

Nothing here looks at a tensor's values from Python, so all of it can be traced, mapped and captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otfuse._attention import Marginals
from otfuse._backends.base import OPTIONS, Backend, Solution
from otfuse._backends.torch.implicit import attach_implicit_gradient
from otfuse._backends.torch.solver import scaling, solve, without_offset
from otfuse._problem import LossProblem, Problem


class TorchBackend(Backend):
    name = "torch"
    options = OPTIONS  # all, whatever is added

    def unavailable(self) -> list[str]:
        return []

    def unsupported_loss(self, problem: LossProblem) -> list[str]:
        return []

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        # Known from the dtype alone: a mask is uniform over what it keeps.
        uniform = all(weights is None or weights.dtype == torch.bool for weights in (problem.a, problem.b))

        def solver(s: Tensor, a: Tensor, b: Tensor) -> Solution:
            bound = problem.similarity_bound
            return scaling(s, a, b, problem.options, bound, uniform, p.masked)

        run = without_offset(solver, p.masked) if problem.similarity_bound is None else solver
        if problem.options.grad == "unroll":
            return solve(run, similarity, p)
        with torch.no_grad():  # which does not stop forward mode: hence detached as well
            solution = solve(run, similarity.detach(), p._replace(a=p.a.detach(), b=p.b.detach()))
        if problem.options.grad == "detach":
            return solution
        return attach_implicit_gradient(solution, similarity, p, problem.options.epsilon)
