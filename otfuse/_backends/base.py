"""What a backend is: a name, the reasons why it cannot run, and the solve."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from otfuse import _alignment as alignment
from otfuse import _attention as attention
from otfuse._attention import Marginals
from otfuse._backends.padded import Packing
from otfuse._problem import (
    LossProblem,
    Problem,
    SinkhornAttendOutput,
    SinkhornOutput,
    SolveOptions,
    VarlenProblem,
)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the problem."""


class Solution(NamedTuple):
    """A solved batch, in the solve dtype. A batch element without mass has a zero plan and potentials of -inf."""

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


OPTIONS = {field.name: field.default for field in dataclasses.fields(SolveOptions)}


class Backend:
    """One way to solve. Subclasses answer for themselves and never import their toolkit before they run."""

    name: str
    device: str | None = None  # the type of device it runs on; None is any
    options: Collection[str] = ("epsilon", "num_iters", "tol", "grad")  # of SolveOptions, those it knows

    def unavailable(self) -> list[str]:
        """Reasons why this backend cannot run here, whatever the problem; empty when it can."""
        raise NotImplementedError

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot run this problem; looks at device, dtype and shape only."""
        reasons = self._elsewhere(problem.values)
        return reasons if len(self.options) == len(OPTIONS) else reasons + self._unknown(problem)

    def unsupported_loss(self, problem: LossProblem) -> list[str]:
        """The same for a loss."""
        return ["it has no kernel for the loss"]

    def _unknown(self, problem: Problem) -> list[str]:
        return [
            f"it has no option {name}"
            for name, default in OPTIONS.items()
            if name not in self.options and getattr(problem.options, name) != default
        ]

    def _elsewhere(self, values: Tensor) -> list[str]:
        if self.device in (None, values.device.type):
            return []
        return [f"the tensors are on '{values.device}' (needs {str(self.device).upper()})"]

    def why_not(self, problem: Problem | LossProblem) -> list[str]:
        """Every reason at once, so that the user mends them in one go."""
        if isinstance(problem, LossProblem):
            return self.unavailable() + self.unsupported_loss(problem)
        return self.unavailable() + self.unsupported(problem)

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        """Sinkhorn-Knopp on ``similarity`` [B, N, M] in the solve dtype, with the gradient that it asks for."""
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
        """The whole operator on packed tokens, by way of a padded batch; the plan in the dtype of the tokens.

        A backend with kernels for packed tokens overrides this.
        """
        return attend_padded(problem, self)

    def token_terms(self, problem: LossProblem) -> tuple[Tensor, Tensor]:
        """What each token adds to the loss [B, N + M], and which batch elements have mass [B]; as ``_alignment``."""
        p = problem
        return alignment.token_terms(p.plan, p.similarity, p.a, p.b, p.temperature, *p.kinds)


def attend(backend: Backend, problem: Problem) -> SinkhornAttendOutput:
    """The whole operator, the plan in the dtype of the tokens, or None unless the problem asks for it."""
    out, _ = attend_in_solve_dtype(backend, problem)
    return out._replace(
        plan=out.plan.to(problem.values.dtype) if problem.return_plan and out.plan is not None else None
    )


def attend_in_solve_dtype(
    backend: Backend, problem: Problem, similarity: bool = False
) -> tuple[SinkhornAttendOutput, Tensor | None]:
    """The same with the plan in the solve dtype, and if asked for the similarity it was solved for."""
    assert problem.x is not None and problem.y is not None
    with attention.full_precision(problem.x.device):
        if 0 in problem.shape[1:]:
            empty = _without_tokens(problem)
            return SinkhornAttendOutput(problem.x + 0, problem.y + 0, *empty), empty.plan
        return backend.attend(problem, similarity)


def solve(backend: Backend, problem: Problem) -> SinkhornOutput:
    """The solver on the problem's cost."""
    with attention.full_precision(problem.values.device):
        return _without_tokens(problem) if 0 in problem.shape[1:] else backend.sinkhorn(problem)


def _without_tokens(problem: Problem) -> SinkhornOutput:
    """N or M is zero: nothing to transport, for any backend."""
    B, N, M = problem.shape
    empty = problem.values.new_empty(0)
    potentials = empty.to(problem.solve_dtype)
    return SinkhornOutput(
        empty.new_zeros(B, N, M) if problem.cost is None else problem.cost + 0,
        potentials.new_full((B, N), -float("inf")),
        potentials.new_full((B, M), -float("inf")),
        potentials.new_zeros(B),
        potentials.new_zeros(B).int(),
    )


def attend_padded(problem: VarlenProblem, backend: Backend) -> SinkhornAttendOutput:
    """Packed tokens by way of a padded batch: work and memory as of the longest."""
    x, y = problem.x, problem.y
    assert x is not None and y is not None
    packing_x = Packing(problem.cu_seqlens_x, problem.max_seqlen_x, len(x))
    packing_y = Packing(problem.cu_seqlens_y, problem.max_seqlen_y, len(y))
    weights = packing_x.pad_weights(problem.a), packing_y.pad_weights(problem.b)
    out = attend(backend, problem.dense(packing_x.pad(x), packing_y.pad(y), *weights))
    fits = packing_x.fits & packing_y.fits  # [B]
    return SinkhornAttendOutput(
        packing_x.pack(out.x, fits),
        packing_y.pack(out.y, fits),
        None if out.plan is None else torch.where(fits[:, None, None], out.plan, torch.nan),
        packing_x.pack(out.f, fits),
        packing_y.pack(out.g, fits),
        torch.where(fits, out.marginal_error, torch.nan),
        out.num_iters,
    )
