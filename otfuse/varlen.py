"""Packed tokens of different lengths: FlashAttention's ``cu_seqlens`` convention.

Letters: B batch, D features, T tokens of the whole batch, one batch element after the other.
"""

from __future__ import annotations

from torch import Tensor

from otfuse._attention import full_precision
from otfuse._backends.select import select
from otfuse._problem import SinkhornAttendOutput, SolveOptions, varlen_problem


def sinkhorn_attend_varlen(
    x: Tensor,
    y: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    max_seqlen_x: int,
    max_seqlen_y: int,
    epsilon: float = 0.1,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    similarity: str = "cosine",
    num_iters: int = 50,
    tol: float | None = None,
    weights: str = "plan",
    grad: str = "unroll",
    return_plan: bool = False,
    backend: str = "auto",
) -> SinkhornAttendOutput:
    """:func:`otfuse.sinkhorn_attend` for batch elements of different lengths, packed without padding.

    ``triton`` reads the packed tokens; ``cpu`` groups batch elements of equal lengths; ``torch`` and ``tpc`` pad, and
    so does ``cpu`` where it cannot read the offsets: under ``torch.compile``, or ``vmap`` over them.

    Batch element ``i`` aligns ``x[cu_seqlens_x[i]:cu_seqlens_x[i+1]]`` with ``y[cu_seqlens_y[i]:cu_seqlens_y[i+1]]``.

    Args:
        x: [T_x, D], the tokens of all batch elements one after the other.
        y: [T_y, D], same dtype and device.
        cu_seqlens_x: [B+1], int32, non-decreasing from 0 to T_x, on the device of the tokens.
        cu_seqlens_y: [B+1], int32, likewise for ``y``.
        max_seqlen_x: Length of the longest batch element of ``x``; longer ones come back as NaN.
        max_seqlen_y: Likewise for ``y``.
        a, b: [T_x], [T_y]: weights or boolean masks, as in :func:`otfuse.sinkhorn_attend`.
        epsilon, similarity, num_iters, tol, weights, grad, return_plan, backend: as in
            :func:`otfuse.sinkhorn_attend`.

    Returns:
        :class:`SinkhornAttendOutput`: x [T_x, D], y [T_y, D]; plan [B, max_seqlen_x, max_seqlen_y], zero outside
        an element's lengths, or None; f [T_x], g [T_y]; marginal_error [B]; num_iters [B].

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        BackendError: the named backend cannot run this; lists every reason.

    Example:
        >>> import torch, otfuse
        >>> x, y = torch.randn(7, 16), torch.randn(5, 16)
        >>> ends_x, ends_y = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 4, 5]).int()
        >>> otfuse.sinkhorn_attend_varlen(x, y, ends_x, ends_y, max_seqlen_x=4, max_seqlen_y=4).x.shape
        torch.Size([7, 16])
    """
    options = SolveOptions(epsilon, num_iters, tol, grad)
    problem = varlen_problem(
        x, y, cu_seqlens_x, cu_seqlens_y, max_seqlen_x, max_seqlen_y, a, b, options, similarity, weights, return_plan
    )
    chosen = select(problem, backend)
    with full_precision(x.device):
        return chosen.attend_varlen(problem)
