"""Modules that hold the numbers and call the functions; no mathematics of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from otfuse import functional
from otfuse._backends.base import attend_in_solve_dtype
from otfuse._backends.select import select
from otfuse._problem import SinkhornAttendOutput, SolveOptions, token_problem
from otfuse.loss import ot_alignment_loss


class OTAttention(torch.nn.Module):
    """:func:`otfuse.sinkhorn_attend` as a module without parameters.

    Args:
        epsilon, similarity, num_iters, tol, weights, grad, return_plan, backend: as in
            :func:`otfuse.sinkhorn_attend`.

    Example:
        >>> import torch, otfuse
        >>> attend = otfuse.nn.OTAttention(epsilon=0.1, weights="barycentric")
        >>> attend(torch.randn(2, 8, 16), torch.randn(2, 5, 16)).x.shape
        torch.Size([2, 8, 16])
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        similarity: str = "cosine",
        num_iters: int = 50,
        tol: float | None = None,
        weights: str = "plan",
        grad: str = "unroll",
        return_plan: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.similarity = similarity
        self.num_iters = num_iters
        self.tol = tol
        self.weights = weights
        self.grad = grad
        self.return_plan = return_plan
        self.backend = backend

    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> SinkhornAttendOutput:
        """x [B, N, D], y [B, M, D], a [B, N], b [B, M]; see :func:`otfuse.sinkhorn_attend`."""
        return functional.sinkhorn_attend(
            x,
            y,
            self.epsilon,
            a=a,
            b=b,
            similarity=self.similarity,
            num_iters=self.num_iters,
            tol=self.tol,
            weights=self.weights,
            grad=self.grad,
            return_plan=self.return_plan,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon}, similarity={self.similarity!r}, num_iters={self.num_iters}, tol={self.tol}, "
            f"weights={self.weights!r}, grad={self.grad!r}, backend={self.backend!r}"
        )


class OTFusionOutput(NamedTuple):
    """What :class:`OTFusion` returns."""

    tokens: Tensor  # [B, N+M, D], both attended sequences, x first
    loss: Tensor  # scalar, Eq. 4
    plan: Tensor  # [B, N, M], float32 at least


class OTFusion(torch.nn.Module):
    """LAVCap's fusion: both attended sequences one after the other, and the alignment loss, from one solve.

    ``tokens = concat(x + W y, y + W' x)`` over tokens: Eq. 6 of the paper before its projector.

    Args:
        epsilon, similarity, num_iters, tol, weights, grad, backend: as in :func:`otfuse.sinkhorn_attend`.
        temperature, assignment, contrast, reduction: as in :func:`otfuse.ot_alignment_loss`.

    Example:
        >>> import torch, otfuse
        >>> fuse = otfuse.nn.OTFusion(epsilon=0.1)
        >>> fused = fuse(torch.randn(2, 64, 768), torch.randn(2, 20, 768))
        >>> fused.tokens.shape, fused.loss.shape, fused.plan.shape
        (torch.Size([2, 84, 768]), torch.Size([]), torch.Size([2, 64, 20]))
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        similarity: str = "cosine",
        num_iters: int = 50,
        tol: float | None = None,
        weights: str = "plan",
        grad: str = "unroll",
        temperature: float = 0.07,
        assignment: str = "log_plan",
        contrast: str = "similarity",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.attention = OTAttention(
            epsilon,
            similarity=similarity,
            num_iters=num_iters,
            tol=tol,
            weights=weights,
            grad=grad,
            backend=backend,
        )
        self.temperature = temperature
        self.assignment = assignment
        self.contrast = contrast
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> OTFusionOutput:
        """x [B, N, D], y [B, M, D], a [B, N], b [B, M]; see :func:`otfuse.sinkhorn_attend`."""
        o = self.attention
        options = SolveOptions(o.epsilon, o.num_iters, o.tol, o.grad)
        problem = token_problem(x, y, a, b, options, o.similarity, o.weights, return_plan=True)
        out, similarity = attend_in_solve_dtype(select(problem, o.backend), problem, similarity=True)
        assert out.plan is not None and similarity is not None
        loss = ot_alignment_loss(
            out.plan,
            similarity,
            temperature=self.temperature,
            assignment=self.assignment,
            contrast=self.contrast,
            a=a,
            b=b,
            reduction=self.reduction,
        )
        return OTFusionOutput(torch.cat((out.x, out.y), dim=1), loss, out.plan)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, assignment={self.assignment!r}, contrast={self.contrast!r}, "
            f"reduction={self.reduction!r}"
        )
