"""What a backend is: a name, the reasons why it cannot run, and the solve."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from otfuse import attention
from otfuse.attention import Marginals
from otfuse.problem import Problem, SinkhornAttendOutput


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the problem."""


class Solution(NamedTuple):
    """A solved batch, in the solve dtype. An item without mass has a zero plan and potentials of -inf."""

    plan: Tensor  # [B, N, M]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    marginal_error: Tensor  # [B]
    num_iters: Tensor  # [B], int32


class Backend:
    """One way to solve. Subclasses answer for themselves and never import their toolkit before they run."""

    name: str

    def unavailable(self) -> list[str]:
        """Reasons why this backend cannot run here, whatever the problem; empty when it can."""
        raise NotImplementedError

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot run this problem; looks at device, dtype and shape only."""
        raise NotImplementedError

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason at once, so that the user mends them in one go."""
        return self.unavailable() + self.unsupported(problem)

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        """Sinkhorn-Knopp on ``similarity`` [B, N, M] in the solve dtype, differentiable as ``problem.grad`` says."""
        raise NotImplementedError

    def attend(self, problem: Problem) -> SinkhornAttendOutput:
        """Similarity, solve and both attends one after the other; a fused backend overrides this.

        The plan comes back in the solve dtype whether or not the problem asks for it.
        """
        assert problem.x is not None and problem.y is not None
        x, y = problem.x.to(problem.solve_dtype), problem.y.to(problem.solve_dtype)
        p = attention.marginals(problem)
        x_tokens = attention.without_padding(x, p.a, p.masked)
        y_tokens = attention.without_padding(y, p.b, p.masked)
        similarity = attention.similarity(x_tokens, y_tokens, problem.similarity)
        solution = self.solve(similarity, p, problem)
        x_out, y_out = attention.attend(x, y, x_tokens, y_tokens, solution.plan, p, problem.weights)
        return SinkhornAttendOutput(x_out.to(problem.x.dtype), y_out.to(problem.y.dtype), *solution)
