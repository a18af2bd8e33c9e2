"""Packed tokens of different lengths: FlashAttention's ``cu_seqlens`` convention.

Letters: B batch, D features, T tokens of all items one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otfuse.attention import full_precision
from otfuse.backends import select, triton_varlen  # noqa: F401, it registers what runs behind its ops
from otfuse.functional import attend
from otfuse.problem import (
    SIMILARITIES,
    WEIGHTS,
    Problem,
    SinkhornAttendOutput,
    VarlenProblem,
    check_choice,
    check_pair,
    check_solver,
    check_tensor,
    check_weights,
    dtype_name,
)


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
    """:func:`otfuse.sinkhorn_attend` for items of different lengths, packed without padding.

    ``triton`` works on the packed tokens, ``cpu`` on dense batches of equal lengths; ``torch`` and ``tpc`` pad,
    and so does ``cpu`` where it may not look at the offsets: under ``torch.compile``, or ``vmap`` over them.

    Item ``i`` aligns ``x[cu_seqlens_x[i]:cu_seqlens_x[i+1]]`` with ``y[cu_seqlens_y[i]:cu_seqlens_y[i+1]]``.

    Args:
        x: [T_x, D], the items' tokens one after the other.
        y: [T_y, D], same dtype and device.
        cu_seqlens_x: [B+1], int32, non-decreasing from 0 to T_x, on the device of the tokens.
        cu_seqlens_y: [B+1], int32, likewise for ``y``.
        max_seqlen_x: Length of the longest item of ``x``; a smaller number makes longer items NaN.
        max_seqlen_y: Likewise for ``y``.
        a, b: [T_x], [T_y]: weights or boolean masks, as in :func:`otfuse.sinkhorn_attend`, per item.
        epsilon, similarity, num_iters, tol, weights, grad, return_plan, backend: as in
            :func:`otfuse.sinkhorn_attend`.

    Returns:
        :class:`SinkhornAttendOutput`: x [T_x, D], y [T_y, D]; plan [B, max_seqlen_x, max_seqlen_y], zero outside
        an item's lengths, or None; f [T_x], g [T_y]; marginal_error [B]; num_iters [B].

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
    check_tensor("x", x, "[T_x, D]")
    check_tensor("y", y, "[T_y, D]")
    check_pair(x, y, ((1, "feature size D"),))
    _check_packing("x", cu_seqlens_x, max_seqlen_x, x)
    _check_packing("y", cu_seqlens_y, max_seqlen_y, y)
    if cu_seqlens_x.shape != cu_seqlens_y.shape:
        raise ValueError(
            f"cu_seqlens_x and cu_seqlens_y must both have length B+1; got {len(cu_seqlens_x)} and {len(cu_seqlens_y)}"
        )
    check_weights("a", a, tuple(x.shape[:1]), "[T_x]", x)
    check_weights("b", b, tuple(y.shape[:1]), "[T_y]", x)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("weights", weights, WEIGHTS)
    check_solver(epsilon, num_iters, tol, grad, x.dtype)
    problem = VarlenProblem(
        x, y, None, a, b, epsilon, num_iters, tol, grad, similarity, weights, return_plan,
        cu_seqlens_x=cu_seqlens_x, cu_seqlens_y=cu_seqlens_y, max_seqlen_x=max_seqlen_x, max_seqlen_y=max_seqlen_y,
    )  # fmt: skip
    chosen = select(problem, backend)
    if not chosen.packs:
        return attend_padded(problem, chosen.name)
    with full_precision(x.device):
        return chosen.attend_varlen(problem)


def attend_padded(problem: VarlenProblem, backend: str) -> SinkhornAttendOutput:
    """By way of a padded batch, for a backend without kernels for packed tokens: work and memory as of the longest."""
    x, y = problem.x, problem.y
    assert x is not None and y is not None
    packing_x = _Packing(problem.cu_seqlens_x, problem.max_seqlen_x, len(x))
    packing_y = _Packing(problem.cu_seqlens_y, problem.max_seqlen_y, len(y))
    padded = Problem(
        packing_x.pad(x), packing_y.pad(y), None, packing_x.pad_weights(problem.a), packing_y.pad_weights(problem.b),
        problem.epsilon, problem.num_iters, problem.tol, problem.grad, problem.similarity, problem.weights,
        problem.return_plan,
    )  # fmt: skip
    out = attend(padded, backend)
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


class _Packing:
    """Where each packed token stands in the padded batch, worked out on the device."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()  # [B]
        places = torch.arange(max_seqlen, device=cu_seqlens.device)
        source = starts[:, None] + places  # [B, max_seqlen], in the packed tokens
        self.fits = ends - starts <= max_seqlen  # [B]
        self.valid = source < ends[:, None]
        self.source = source.clamp(0, max(total - 1, 0))
        tokens = torch.arange(total, device=cu_seqlens.device)
        self.item = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True).clamp(0, max(len(starts) - 1, 0))
        self.place = (tokens - starts[self.item] if len(starts) else tokens).clamp(0, max(max_seqlen - 1, 0))

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, D] to [B, max_seqlen, D]."""
        if not len(tokens):
            return tokens.new_zeros(*self.valid.shape, tokens.shape[1])
        return tokens[self.source]

    def pad_weights(self, weights: Tensor | None) -> Tensor:
        """[T] to [B, max_seqlen]; a mask stays one."""
        if weights is None or not len(weights):
            return self.valid
        return torch.where(self.valid, weights[self.source], 0 if weights.dtype != torch.bool else False)

    def pack(self, padded: Tensor, fits: Tensor) -> Tensor:
        """[B, max_seqlen, ...] to [T, ...]; NaN for an item that was cut off."""
        if not len(self.item):
            return padded.flatten(0, 1)[:0]
        packed = padded[self.item, self.place]
        whole = fits[self.item]
        return torch.where(whole[:, None] if packed.dim() == 2 else whole, packed, torch.nan)


def _check_packing(side: str, cu_seqlens: object, max_seqlen: object, tokens: Tensor) -> None:
    name = f"cu_seqlens_{side}"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 torch.Tensor of length B+1; got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must have shape [B+1]; got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {dtype_name(cu_seqlens.dtype)}; pass {name}.int()")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"{name} must be on '{tokens.device}' like the tokens; got '{cu_seqlens.device}'; "
            f"pass {name}.to('{tokens.device}')"
        )
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(
            f"max_seqlen_{side} must be an int; got {type(max_seqlen).__name__}; pass int(max_seqlen_{side})"
        )
    if max_seqlen < min(1, len(tokens)):
        raise ValueError(f"max_seqlen_{side} must be at least 1 where there are tokens; got {max_seqlen}")
