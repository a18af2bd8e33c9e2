"""Inputs of a workload, and the right answer to it: the specification in float64, and how far off an answer may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

import otfuse
from benchmarks.cases import Case, Workload
from otfuse.testing import clustered_tokens, specified_attend, specified_sinkhorn

# Entry-iterations of the largest check: seconds in float64, where an iteration takes two exponentials an entry.
LARGEST_CHECK = {"cpu": 2e8, "cuda": 4e10, "hpu": 2e8}
FEATURES_OF_A_COST = 16  # of the tokens that a cost is made of where the case has none
CHECKED_ROW = 16  # of so many rows of a large plan one is looked at
MOST_ITERATIONS, CONVERGED_AT = 5_000, 1e-9
# The order of an iteration; CONVERGED for what gets there in its own way.
ROWS_FIRST, COLUMNS_FIRST, CONVERGED = "rows first", "columns first", "converged"
Call = Callable[..., Sequence[Tensor]]


def with_gradient(call: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """Forward and backward: inputs and as many gradients sent to the outputs in, gradients of the inputs out."""

    def gradients(*inputs_and_sent: Tensor) -> Sequence[Tensor]:
        inputs, sent = inputs_and_sent[: len(inputs_and_sent) // 2], inputs_and_sent[len(inputs_and_sent) // 2 :]
        # Leaves made here: those of another stream could not be waited for while a graph is captured.
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(call(*leaves), leaves, sent)

    return gradients


def inputs_of(workload: Workload, device: torch.device) -> tuple[Tensor, ...]:
    """x and y, or a cost; and for a backward the gradients sent to the outputs."""
    case, generator = workload.case, torch.Generator().manual_seed(1)
    shapes = (case.B, case.N, case.M, case.D or FEATURES_OF_A_COST)
    if workload.kind == "clustered":
        values = clustered_tokens(*shapes)
    else:
        B, N, M, D = shapes
        values = tuple(torch.randn(B, side, D, generator=generator) for side in (N, M))
    if workload.op == "solve":
        values = (1 - otfuse.similarity_matrix(*values),)
    sent = () if workload.grad is None else [torch.randn(value.shape, generator=generator) for value in values]
    return tuple(value.to(device, workload.dtype) for value in (*values, *sent))


def ours(workload: Workload, backend: str, **changes: Any) -> Call:
    case = workload.case
    options = {"num_iters": case.T, "tol": workload.tol, "grad": workload.grad or "unroll"} | changes

    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = otfuse.sinkhorn_attend(x, y, case.epsilon, **options, backend=backend)
        return out.x, out.y

    def solve(cost: Tensor) -> tuple[Tensor]:
        return (otfuse.sinkhorn(cost, case.epsilon, **options, backend=backend).plan,)

    return attend if workload.op == "attend" else solve


def mean_iterations(workload: Workload, inputs: tuple[Tensor, ...], backend: str) -> float:
    case = workload.case
    if workload.tol is None:
        return case.T
    call = otfuse.sinkhorn_attend if workload.op == "attend" else otfuse.sinkhorn
    values = inputs if workload.grad is None else inputs[: len(inputs) // 2]
    out = call(*values, case.epsilon, num_iters=case.T, tol=workload.tol, backend=backend)
    return float(out.num_iters.float().mean())


@dataclass(frozen=True)
class Answer:
    """What is right, in float64, and how far off an answer may be."""

    exact: Sequence[Tensor]  # tokens out, or a plan, or gradients
    residuals: Sequence[Tensor | float]  # what is in them unchanged: tokens in, the gradients sent; 0 for a plan
    allowed: float = math.inf
    lacking: float = math.inf  # of what was to be added, at most
    every: int = 1  # of how many elements one is looked at
    rows: int = 1  # of how many rows one

    def error(self, results: Sequence[Tensor]) -> float:
        """The distance from what is right over the size of what was added to the residual, of the worst output.

        Added is a hundredth or so of a token: against the whole token a result without it would pass for right in
        bfloat16. Infinite where more of it is lacking than rounding takes away.
        """
        seen = slice(None, None, self.every), slice(None, None, self.rows)
        found = [result[seen].to(e.device).to(e.dtype) for result, e in zip(results, self.exact)]
        if self.missing(found) > self.lacking:
            return math.inf
        return self._worst(found, lambda off, added: off.norm() / added.norm())

    def missing(self, found: Sequence[Tensor]) -> float:
        """Which part of what was added is not there."""
        return self._worst(found, lambda off, added: (off * added).sum().abs() / added.square().sum())

    def _worst(self, found: Sequence[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Of all outputs; NaN where there is one."""
        sides = zip(found, self.exact, self.residuals)
        return float(torch.stack([measure(r - e, e - x) for r, e, x in sides]).max())


def as_good_as(plain: Sequence[Tensor], exact: Sequence[Tensor], residuals: Sequence[Tensor | float]) -> Answer:
    """Allowed is twice the error of ``plain``, PyTorch's in the same dtype, and a rounding in float32."""
    right, plain = Answer(exact, residuals), [tensor.double() for tensor in plain]
    size = max(float(e.norm() / (e - x).norm()) for e, x in zip(exact, residuals))
    allowed = 2 * right.error(plain) + torch.finfo(torch.float32).eps * size
    return replace(right, allowed=allowed, lacking=2 * right.missing(plain) + 0.1)


class Answers:
    """The answer for each order of the iterations, computed when first asked for.

    Of a batch that would take long to check only every so many-th element is looked at, as many as ``LARGEST_CHECK``
    holds: elements do not depend on each other.
    """

    def __init__(self, workload: Workload, inputs: tuple[Tensor, ...]) -> None:
        self.workload = workload
        device = inputs[0].device.type
        self.every = looked_at_every(workload.case, workload.case.T, device)
        looked_at = [tensor[:: self.every] for tensor in inputs]
        # A Gaudi has no float64: what is right is computed on its host.
        self.looked_at = [tensor.cpu() for tensor in looked_at] if device == "hpu" else looked_at
        self.of = cache(self._of)

    def _of(self, follows: str) -> Answer:
        if follows == CONVERGED:  # of the problem, whatever the number of iterations
            problem = replace(self.workload, case=replace(self.workload.case, T=1), tol=None)
            return converged(problem, self.looked_at[0].device)
        return self._after_iterations(follows)

    def _after_iterations(self, follows: str) -> Answer:
        """An element within rounding of ``tol`` may stop an iteration sooner or later. That moves ``tol`` of its mass
        at most, to a single token at worst, where the map is spread over all. The specification has the unrolled
        gradient alone; for the others the torch backend stands in.
        """
        workload, inputs = self.workload, self.looked_at
        if workload.checked_by_rows:
            return self._by_rows(follows)
        call = specified(workload, follows)
        if workload.grad not in (None, "unroll"):
            call = ours(workload, "torch")
        if workload.grad is not None:
            call = with_gradient(call)
        exact = [tensor.double() for tensor in call(*(tensor.double() for tensor in inputs))]
        residuals = (0.0,) if workload.op == "solve" else [tensor.double() for tensor in inputs[-2:]]
        answer = as_good_as(call(*inputs), exact, residuals)
        stopped = (workload.tol or 0) * max(workload.case.N, workload.case.M) ** 0.5
        return replace(answer, allowed=answer.allowed + stopped, every=self.every)

    def _by_rows(self, follows: str) -> Answer:
        """The same iterations in scalings in float64: far from the ends of its range they are the specification's."""
        (cost,), case = self.looked_at, self.workload.case
        exact, plain = (some_rows(c, case.epsilon, case.T, follows) for c in (cost.double(), cost))
        return replace(as_good_as([plain], [exact], (0.0,)), rows=CHECKED_ROW)


def some_rows(cost: Tensor, epsilon: float, num_iters: int, follows: str) -> Tensor:
    """Every so many-th row of the plan, [1, N / CHECKED_ROW, M], for uniform weights, in the cost's dtype."""
    (K,), (N, M) = torch.exp((cost.min() - cost) / epsilon), cost.shape[1:]
    u, v = cost.new_full((N,), 1 / N), cost.new_full((M,), 1 / M)
    for _ in range(num_iters):
        if follows == COLUMNS_FIRST:
            v = 1 / M / (K.mT @ u)
        u = 1 / N / (K @ v)
        if follows != COLUMNS_FIRST:
            v = 1 / M / (K.mT @ u)
    return (K[::CHECKED_ROW] * u[::CHECKED_ROW, None] * v)[None]


def looked_at_every(case: Case, iterations: int, device: str) -> int:
    """Of how many elements one is checked."""
    return min(case.B, max(1, math.ceil(case.B * case.N * case.M * iterations / LARGEST_CHECK[device])))


@lru_cache(maxsize=4)
def converged(workload: Workload, device: torch.device) -> Answer:
    """The end of the way, for what gets there in its own way: any error is allowed."""
    every = looked_at_every(workload.case, MOST_ITERATIONS, device.type)
    inputs = [tensor[::every] for tensor in inputs_of(workload, device)]
    exact = specified(workload, CONVERGED)(*(tensor.double() for tensor in inputs))
    return Answer(exact, (0.0,), every=every)


def specified(workload: Workload, follows: str) -> Call:
    """The specification of the iterations."""
    case = workload.case
    options: dict[str, Any] = {"num_iters": case.T, "tol": workload.tol}
    if follows == CONVERGED:
        options = {"num_iters": MOST_ITERATIONS, "tol": CONVERGED_AT}
    if workload.op == "attend":
        assert follows != COLUMNS_FIRST, "no peer attends with the columns first"
        return lambda x, y: specified_attend(x, y, case.epsilon, **options)[:2]
    assert follows in (ROWS_FIRST, COLUMNS_FIRST, CONVERGED)

    def solve(cost: Tensor) -> tuple[Tensor]:
        if follows == COLUMNS_FIRST:
            plan = specified_sinkhorn(cost.mT.contiguous(), case.epsilon, **options).plan.mT
        else:
            plan = specified_sinkhorn(cost, case.epsilon, **options).plan
        return (plan.to(cost.dtype),)

    return solve
