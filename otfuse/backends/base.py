"""What a backend is: a name, the reasons why it cannot run, and the solve."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from torch import Tensor

from otfuse import attention
from otfuse.attention import Marginals
from otfuse.problem import Problem, SinkhornAttendOutput, SinkhornOutput, VarlenProblem


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the problem."""


class Solution(NamedTuple):
    """A solved batch, in the solve dtype. An item without mass has a zero plan and potentials of -inf."""

    plan: Tensor  # [B, N, M]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    marginal_error: Tensor  # [B]
    num_iters: Tensor  # [B], int32


_installed: dict[str, bool] = {}  # a functools.cache would be traced past, with a warning, by torch.compile


def is_installed(package: str) -> bool:
    """Whether a package could be imported; it is not imported to find out."""
    if package not in _installed:
        _installed[package] = importlib.util.find_spec(package) is not None
    return _installed[package]


class Backend:
    """One way to solve. Subclasses answer for themselves and never import their toolkit before they run."""

    name: str
    device: str | None = None  # the type of device it runs on; None is any
    packs = False  # whether it takes packed tokens as they are, or else padded ones

    def unavailable(self) -> list[str]:
        """Reasons why this backend cannot run here, whatever the problem; empty when it can."""
        raise NotImplementedError

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot run this problem; looks at device, dtype and shape only."""
        device = problem.values.device
        if self.device in (None, device.type):
            return []
        return [f"the tensors are on '{device}' (needs {str(self.device).upper()})"]

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason at once, so that the user mends them in one go."""
        return self.unavailable() + self.unsupported(problem)

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        """Sinkhorn-Knopp on ``similarity`` [B, N, M] in the solve dtype, differentiable as ``problem.grad`` says."""
        raise NotImplementedError

    def solve_cost(self, cost: Tensor, p: Marginals, problem: Problem) -> Solution:
        """The same for a cost, which is a similarity with the other sign."""
        return self.solve(-cost, p, problem)

    def solve_tokens(self, x: Tensor, y: Tensor, p: Marginals, problem: Problem) -> tuple[Tensor, Solution]:
        """The similarity of tokens in the solve dtype, padding cleared, and its solution."""
        similarity = attention.similarity(x, y, problem.similarity)
        return similarity, self.solve(similarity, p, problem)

    def sinkhorn(self, problem: Problem) -> SinkhornOutput:
        """The solver on the problem's cost; a backend that fuses the conversions overrides this."""
        assert problem.cost is not None
        cost = attention.solve_precision(problem.cost)
        solution = self.solve_cost(cost, attention.marginals(problem), problem)
        return SinkhornOutput(*solution._replace(plan=solution.plan.to(problem.cost.dtype)))

    def attend(self, problem: Problem, similarity: bool = False) -> tuple[SinkhornAttendOutput, Tensor | None]:
        """The whole operator, and if asked for the similarity [B, N, M]; a backend that fuses it all overrides this.

        Plan and similarity come in the solve dtype; either may come unasked.
        """
        assert problem.x is not None and problem.y is not None
        x, y = attention.solve_precision(problem.x), attention.solve_precision(problem.y)
        p = attention.marginals(problem)
        x_tokens = attention.without_padding(x, p.a, p.masked)
        y_tokens = attention.without_padding(y, p.b, p.masked)
        made, solution = self.solve_tokens(x_tokens, y_tokens, p, problem)
        x_out, y_out = attention.attend(x, y, x_tokens, y_tokens, solution.plan, p, problem.weights)
        if x is not problem.x:
            x_out, y_out = x_out.to(problem.x.dtype), y_out.to(problem.y.dtype)
        return SinkhornAttendOutput(x_out, y_out, *solution), made

    def attend_varlen(self, problem: VarlenProblem) -> SinkhornAttendOutput:
        """The whole operator on packed tokens, by a backend that ``packs``; the plan in the dtype of the tokens."""
        raise NotImplementedError
