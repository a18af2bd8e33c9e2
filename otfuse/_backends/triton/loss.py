"""The alignment loss by Triton: its ops with their derivatives, and the launchers behind them.

``otfuse::alignment_loss_triton`` is one launch, and so is its backward; that one can itself be differentiated, by way
of plain PyTorch. The device code is in ``otfuse.kernels.triton.loss``.

Letters: B batch, N tokens of ``x``, M tokens of ``y``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otfuse import _alignment as alignment
from otfuse import _ops as ops
from otfuse._backends.triton.device import blocks, precision
from otfuse._backends.triton.launch import INTERPRETED, contiguous, launch, on
from otfuse._backends.triton.paths import LARGEST_TILE, tile_side
from otfuse._problem import solve_dtype

# assignment, contrast: places in _problem.ASSIGNMENTS and CONTRASTS. mean: over the tokens of a side, not their sum.
OPTIONS = "Tensor temperature, int assignment, int contrast, bool mean"
PROBLEM = "Tensor plan, Tensor similarity, Tensor? a, Tensor? b"

ops.library.define(
    f"alignment_loss_triton({PROBLEM}, {OPTIONS}) -> (Tensor terms, Tensor normaliser, Tensor has_mass)",
    tags=ops.WITH_NUMBERS,
)
ops.library.define(
    f"alignment_loss_triton_backward({PROBLEM}, {OPTIONS}, Tensor normaliser, Tensor grad_terms) -> (Tensor, Tensor)",
    tags=ops.WITH_NUMBERS,
)


def fits(plan: Tensor) -> bool:
    """Whether an item is there and of a size at which logits are better made again than read."""
    B, N, M = plan.shape
    largest = LARGEST_TILE[8 if plan.dtype == torch.float64 else 4]
    return B > 0 and N > 0 and M > 0 and tile_side(N) * tile_side(M) <= largest


def _new_terms(plan: Tensor) -> tuple[Tensor, ...]:
    """Room for the terms [B, N + M], what their softmax is shifted and divided by [B, 2, N + M], has_mass [B]."""
    B, N, M = plan.shape
    dtype = solve_dtype(plan.dtype)
    terms, normaliser = (plan.new_empty(shape, dtype=dtype) for shape in ((B, N + M), (B, 2, N + M)))
    return terms, normaliser, plan.new_empty((B,), dtype=torch.int32)


@torch.library.register_fake("otfuse::alignment_loss_triton")
def _(plan: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _new_terms(plan)


@torch.library.register_fake("otfuse::alignment_loss_triton_backward")
def _(plan: Tensor, similarity: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return plan.new_empty(plan.shape), similarity.new_empty(similarity.shape)


def launch_alignment_loss(
    plan: Tensor, similarity: Tensor, a: Tensor | None, b: Tensor | None,
    temperature: float | Tensor, assignment: int, contrast: int, mean: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from otfuse.kernels.triton import loss

    B, N, M = plan.shape
    plan, similarity, a, b = contiguous(plan, similarity, a, b)
    outputs = _new_terms(plan)
    if B == 0:
        return outputs
    sizes = blocks("loss", plan.dtype, *_sides(N, M), plan.device)
    grid = (B, -(-N // sizes["BLOCK_N"]) - (-M // sizes["BLOCK_M"]))
    arguments = plan, similarity, a, b, *outputs, N, M, 1 / float(temperature)
    options = {"ASSIGNMENT": assignment, "CONTRAST": contrast, "MEAN": mean, "PRECISION": precision(plan.dtype)}
    with on(plan.device):
        launch(loss._alignment_loss_fwd_kernel, grid, arguments, {**options, **sizes}, plan.device)
    return outputs


def launch_alignment_loss_backward(
    plan: Tensor, similarity: Tensor, a: Tensor | None, b: Tensor | None,
    temperature: float | Tensor, assignment: int, contrast: int, mean: bool, normaliser: Tensor, grad_terms: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from otfuse.kernels.triton import loss

    B, N, M = plan.shape
    plan, similarity, a, b, normaliser = contiguous(plan, similarity, a, b, normaliser)
    grad_plan, grad_similarity = plan.new_empty(plan.shape), similarity.new_empty(similarity.shape)
    if B == 0:
        return grad_plan, grad_similarity
    sizes = blocks("loss_backward", plan.dtype, *_sides(N, M), plan.device)
    grid = (B, -(-N // sizes["BLOCK_N"]), -(-M // sizes["BLOCK_M"]))
    arguments = (
        # A sum sends back one number, expanded: strides read it without a copy.
        plan, similarity, a, b, normaliser, grad_terms, grad_plan, grad_similarity, N, M, *grad_terms.stride(),
        1 / float(temperature),
    )  # fmt: skip
    options = {"ASSIGNMENT": assignment, "CONTRAST": contrast, "MEAN": mean, "PRECISION": precision(plan.dtype)}
    with on(plan.device):
        launch(loss._alignment_loss_bwd_kernel, grid, arguments, {**options, **sizes}, plan.device)
    return grad_plan, grad_similarity


def _sides(N: int, M: int) -> tuple[int, int]:
    """BLOCK_N and BLOCK_M: a product in float32 keeps its operands in registers, and those of larger blocks spill."""
    return min(tile_side(N), 32), min(tile_side(M), 32)


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.library.impl("alignment_loss_triton", launch_alignment_loss, _key)
    ops.library.impl("alignment_loss_triton_backward", launch_alignment_loss_backward, _key)


class _Loss(ops.Derivatives):
    """Of ``alignment_loss_triton``."""

    name = "alignment_loss_triton"
    tensors = 2  # plan, similarity
    options = 6  # a, b, OPTIONS
    outputs = 1  # terms

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, normaliser, has_mass = output
        ctx.options = inputs[4:]
        ctx.mark_non_differentiable(normaliser, has_mass)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], normaliser)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * 8
        *problem, normaliser = ctx.saved_tensors
        op = torch.ops.otfuse.alignment_loss_triton_backward
        return (*op(*problem, *ctx.options, normaliser, grads[0]), *[None] * 6)

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        plan, similarity = inputs
        assert plan is not None and similarity is not None
        a, b, (temperature,), *kinds = options
        return alignment.token_terms(plan, similarity, a, b, temperature, *kinds)[:1]


_Loss().register()
ops.SecondDerivatives(_Loss()).register()
