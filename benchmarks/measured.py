"""What is measured: an operation on a case in a dtype, with or without a backward; its inputs and its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from cases import Case
from peers import with_gradient
from timing import COLUMNS_FIRST, CONVERGED, ROWS_FIRST
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, specified_attend, specified_sinkhorn

# Entry-rounds of the largest check: seconds in float64, where a round takes two exponentials an entry.
LARGEST_CHECK = {"cpu": 2e8, "cuda": 4e10, "hpu": 2e8}
CHECK = 4e8  # entry-rounds of an item that the specification is asked for: ten seconds on a CPU
LONG_ROUNDS, LONG_TOKENS = 1e8, 4e7  # entry-rounds, numbers in all tokens
FEATURES_OF_A_COST = 16  # of the tokens that a cost is made of where the case has none
CHECKED_ROW = 16  # of so many rows of a large plan one is looked at
MOST_ROUNDS, CONVERGED_AT = 5_000, 1e-9
Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    case: Case
    dtype: torch.dtype = torch.float32
    grad: str | None = None  # None: the forward alone
    tol: float | None = None
    op: str = "attend"  # tokens to attended tokens; "solve": a cost to its plan
    kind: str = "clustered"  # of tokens; "random": independent, which converge in a few rounds

    def __post_init__(self) -> None:
        assert self.op == "solve" or self.case.D, f"{self.case} has no tokens to attend to"

    def __str__(self) -> str:
        stop = "" if self.tol is None else f" tol {self.tol:g}"
        kind = "" if self.kind == "clustered" else f" {self.kind} tokens"
        return f"{self.op} {self.case} {self.dtype_name} {self.grad or 'forward'}{stop}{kind}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def traffic(self) -> int:
        bytes_of = self.case.attend_traffic if self.op == "attend" else self.case.solve_traffic
        return bytes_of(self.dtype.itemsize, self.grad)

    def flops(self, rounds: float) -> int:
        return (self.case.attend_flops if self.op == "attend" else self.case.solve_flops)(self.grad, rounds)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row is found by."""
        case = self.case
        return {
            "op": self.op, "size": case.name, "B": case.B, "N": case.N, "M": case.M, "D": case.D,
            "epsilon": case.epsilon, "dtype": self.dtype_name, "grad": self.grad, "tol": self.tol, "tokens": self.kind,
        }  # fmt: skip

    def shrunk(self) -> Measured:
        """The same way through the code on a size that costs nothing, to run where nothing is timed."""
        case, at_most = self.case, {"B": 2, "N": 12, "M": 12, "D": 24, "T": 3}
        return replace(self, case=replace(case, **{k: min(v, getattr(case, k)) for k, v in at_most.items()}))

    @property
    def takes_long(self) -> bool:
        """On a CPU: seconds, for everybody together."""
        case = self.case
        return case.B * case.N * case.M * case.T > LONG_ROUNDS or case.B * (case.N + case.M) * case.D > LONG_TOKENS

    @property
    def check_entry_rounds(self) -> int:
        """Of the smallest check, which is that of an item."""
        return self.case.N * self.case.M * self.case.T

    @property
    def checked_by_rows(self) -> bool:
        """A single plan that the specification would take minutes for is held against some of its rows."""
        whole = self.grad is None and self.tol is None and self.case.B == 1
        return self.op == "solve" and whole and self.check_entry_rounds > CHECK


def inputs_of(measured: Measured, device: torch.device) -> tuple[Tensor, ...]:
    """x and y, or a cost; and for a backward the gradients sent to the outputs."""
    case, generator = measured.case, torch.Generator().manual_seed(1)
    shapes = (case.B, case.N, case.M, case.D or FEATURES_OF_A_COST)
    if measured.kind == "clustered":
        values = clustered_tokens(*shapes)
    else:
        B, N, M, D = shapes
        values = tuple(torch.randn(B, side, D, generator=generator) for side in (N, M))
    if measured.op == "solve":
        values = (1 - otfuse.similarity_matrix(*values),)
    sent = () if measured.grad is None else [torch.randn(value.shape, generator=generator) for value in values]
    return tuple(value.to(device, measured.dtype) for value in (*values, *sent))


def ours(measured: Measured, backend: str, **changes: Any) -> Call:
    case = measured.case
    options = {"num_iters": case.T, "tol": measured.tol, "grad": measured.grad or "unroll"} | changes

    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = otfuse.sinkhorn_attend(x, y, case.epsilon, **options, backend=backend)
        return out.x, out.y

    def solve(cost: Tensor) -> tuple[Tensor]:
        return (otfuse.sinkhorn(cost, case.epsilon, **options, backend=backend).plan,)

    return attend if measured.op == "attend" else solve


def mean_rounds(measured: Measured, inputs: tuple[Tensor, ...], backend: str) -> float:
    case = measured.case
    if measured.tol is None:
        return case.T
    call = otfuse.sinkhorn_attend if measured.op == "attend" else otfuse.sinkhorn
    values = inputs if measured.grad is None else inputs[: len(inputs) // 2]
    out = call(*values, case.epsilon, num_iters=case.T, tol=measured.tol, backend=backend)
    return float(out.num_iters.float().mean())


@dataclass(frozen=True)
class Answer:
    """What is right, in float64, and how far off an answer may be."""

    exact: Sequence[Tensor]  # tokens out, or a plan, or gradients
    residuals: Sequence[Tensor | float]  # what is in them unchanged: tokens in, the gradients sent; 0 for a plan
    allowed: float = math.inf
    lacking: float = math.inf  # of what was to be added, at most
    every: int = 1  # of how many items one is looked at
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


class Answers:
    """The answer for each order of the rounds, made when first asked for.

    Of a batch that would take long to check only every so many-th item is looked at, as many as ``LARGEST_CHECK``
    holds: items do not depend on each other.
    """

    def __init__(self, measured: Measured, inputs: tuple[Tensor, ...]) -> None:
        self.measured = measured
        device = inputs[0].device.type
        self.every = looked_at_every(measured.case, measured.case.T, device)
        looked_at = [tensor[:: self.every] for tensor in inputs]
        # A Gaudi has no float64: what is right is computed on its host.
        self.looked_at = [tensor.cpu() for tensor in looked_at] if device == "hpu" else looked_at
        self.of = cache(self._of)

    def _of(self, follows: str) -> Answer:
        if follows == CONVERGED:  # of the problem, whatever the number of rounds
            problem = replace(self.measured, case=replace(self.measured.case, T=1), tol=None)
            return converged(problem, self.looked_at[0].device)
        return self._after_rounds(follows)

    def _after_rounds(self, follows: str) -> Answer:
        """Allowed is twice the error of plain PyTorch in the same dtype, and a rounding in float32.

        An item within rounding of ``tol`` may stop a round sooner or later. That moves ``tol`` of its mass at most, to
        a single token at worst, where the map is spread over all. The specification has the unrolled gradient alone;
        for the others the torch backend stands in.
        """
        measured, inputs = self.measured, self.looked_at
        if measured.checked_by_rows:
            return self._by_rows(follows)
        call = specified(measured, follows)
        if measured.grad not in (None, "unroll"):
            call = ours(measured, "torch")
        if measured.grad is not None:
            call = with_gradient(call)
        exact = [tensor.double() for tensor in call(*(tensor.double() for tensor in inputs))]
        residuals = self._residuals()
        plain, right = call(*inputs), Answer(exact, residuals)
        size = max(float(e.norm() / (e - x).norm()) for e, x in zip(exact, residuals))
        stopped = (measured.tol or 0) * max(measured.case.N, measured.case.M) ** 0.5
        found = [tensor.double() for tensor in plain]
        allowed = 2 * right.error(plain) + torch.finfo(torch.float32).eps * size + stopped
        return Answer(exact, residuals, allowed, 2 * right.missing(found) + 0.1, self.every)

    def _by_rows(self, follows: str) -> Answer:
        """The same rounds in scalings in float64: far from the ends of its range they are the specification's."""
        (cost,), case = self.looked_at, self.measured.case
        exact = some_rows(cost.double(), case.epsilon, case.T, follows)
        right = Answer([exact], (0.0,), rows=1)
        plain = [some_rows(cost, case.epsilon, case.T, follows).double()]
        allowed = 2 * right.error(plain) + torch.finfo(torch.float32).eps
        return replace(right, allowed=allowed, lacking=2 * right.missing(plain) + 0.1, rows=CHECKED_ROW)

    def _residuals(self) -> Sequence[Tensor | float]:
        if self.measured.op == "solve":
            return (0.0,)
        return [tensor.double() for tensor in self.looked_at[-2:]]


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


def looked_at_every(case: Case, rounds: int, device: str) -> int:
    """Of how many items one is checked."""
    return min(case.B, max(1, math.ceil(case.B * case.N * case.M * rounds / LARGEST_CHECK[device])))


@lru_cache(maxsize=4)
def converged(measured: Measured, device: torch.device) -> Answer:
    """The end of the way, for what gets there in its own way: any error is allowed."""
    every = looked_at_every(measured.case, MOST_ROUNDS, device.type)
    inputs = [tensor[::every] for tensor in inputs_of(measured, device)]
    exact = specified(measured, CONVERGED)(*(tensor.double() for tensor in inputs))
    return Answer(exact, (0.0,), every=every)


def specified(measured: Measured, follows: str) -> Call:
    """The specification of the rounds."""
    case = measured.case
    options: dict[str, Any] = {"num_iters": case.T, "tol": measured.tol}
    if follows == CONVERGED:
        options = {"num_iters": MOST_ROUNDS, "tol": CONVERGED_AT}
    if measured.op == "attend":
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
