"""What is measured of ``sinkhorn_attend``: a case in a dtype, with or without a backward; its inputs and its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from peers import with_gradient
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, specified_attend


@dataclass(frozen=True)
class Measured:
    case: Case
    dtype: torch.dtype
    grad: str | None = None  # None: the forward alone
    tol: float | None = None

    def __str__(self) -> str:
        stop = "" if self.tol is None else f" tol {self.tol:g}"
        return f"{self.case} {self.dtype_name} {self.grad or 'forward'}{stop}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def traffic(self) -> int:
        return self.case.attend_traffic(self.dtype.itemsize, self.grad)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row is found by."""
        case = self.case
        return {"size": case.name, "B": case.B, "dtype": self.dtype_name, "grad": self.grad, "tol": self.tol}


def tokens(measured: Measured, device: torch.device) -> tuple[Tensor, ...]:
    """x, y, and for a backward the gradients sent to both outputs."""
    case = measured.case
    x, y = clustered_tokens(case.B, case.N, case.M, case.D, dtype=measured.dtype, device=device)
    if measured.grad is None:
        return x, y
    generator = torch.Generator(device).manual_seed(1)
    return x, y, *(torch.randn(t.shape, generator=generator, device=device).to(t.dtype) for t in (x, y))


def ours(measured: Measured, backend: str, **changes: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    case = measured.case
    options = {"num_iters": case.T, "tol": measured.tol, "grad": measured.grad or "unroll"} | changes

    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = otfuse.sinkhorn_attend(x, y, case.epsilon, **options, backend=backend)
        return out.x, out.y

    return attend


@dataclass(frozen=True)
class Answer:
    """What is right, in float64, and how far off an answer may be."""

    exact: Sequence[Tensor]  # tokens out, or their gradients
    residuals: Sequence[Tensor]  # what is in them unchanged: tokens in, or the gradients sent
    allowed: float = math.inf
    lacking: float = math.inf  # of what was to be added, at most

    def error(self, results: Sequence[Tensor]) -> float:
        """The distance from what is right over the size of what was added to the residual, of the worse side.

        Added is a hundredth or so of a token: against the whole token a result without it would pass for right in
        bfloat16. Infinite where more of it is lacking than rounding takes away.
        """
        if self.missing(results) > self.lacking:
            return math.inf
        return self._worst(results, lambda off, added: off.norm() / added.norm())

    def missing(self, results: Sequence[Tensor]) -> float:
        """Which part of what was added is not there."""
        return self._worst(results, lambda off, added: (off * added).sum().abs() / added.square().sum())

    def _worst(self, results: Sequence[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Of both sides; NaN where there is one."""
        sides = zip(results, self.exact, self.residuals)
        return float(torch.stack([measure(r.double() - e, e - x) for r, e, x in sides]).max())


def answer(measured: Measured, inputs: tuple[Tensor, ...]) -> Answer:
    """Allowed is twice the error of plain PyTorch in the same dtype, and a rounding in float32.

    An item within rounding of ``tol`` may stop a round sooner or later. That moves ``tol`` of its mass at most, to
    a single token at worst, where the map is spread over all. The specification has the unrolled gradient alone;
    for the others the torch backend stands in.
    """
    case = measured.case

    def specified(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return specified_attend(x, y, case.epsilon, num_iters=case.T, tol=measured.tol)[:2]

    call = specified if measured.grad in (None, "unroll") else ours(measured, "torch")
    if measured.grad is not None:
        call = with_gradient(call)
    exact = call(*(tensor.double() for tensor in inputs))
    residuals = [tensor.double() for tensor in inputs[-2:]]
    plain, right = call(*inputs), Answer(exact, residuals)
    size = max(float(e.norm() / (e - x).norm()) for e, x in zip(exact, residuals))
    stopped = (measured.tol or 0) * max(case.N, case.M) ** 0.5
    allowed = 2 * right.error(plain) + torch.finfo(torch.float32).eps * size + stopped
    return Answer(exact, residuals, allowed, lacking=2 * right.missing(plain) + 0.1)


def mean_rounds(measured: Measured, inputs: tuple[Tensor, ...]) -> float:
    case = measured.case
    if measured.tol is None:
        return case.T
    out = otfuse.sinkhorn_attend(*inputs, case.epsilon, num_iters=case.T, tol=measured.tol, backend="triton")
    return float(out.num_iters.float().mean())
