"""Packed tokens by Triton: which launches a batch takes, and the launchers behind the ops of ``varlen_ops.py``.

The host knows how long the longest item is, and no more: to look at the others would stall the device. So a large batch
has a launch for every size that an item may have, and a program for every item in each, which leaves at once if another
launch solves it. The device code is in ``otfuse.kernels.triton.varlen``. Items that no tile holds are solved as those
of padded batches are beyond the chip (``varlen_streaming.py``).

Letters: B batch, T_x and T_y tokens of all items, D features.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from otfuse import _ops as ops
from otfuse._backends.triton import device, varlen_ops
from otfuse._backends.triton.device import launch_shape, precision
from otfuse._backends.triton.launch import INTERPRETED, contiguous, history_mode, launch, on, sent, wanted
from otfuse._backends.triton.ops import new_gradients
from otfuse._backends.triton.places import Packed, SizeClass
from otfuse._backends.triton.varlen_streaming import launch_long, launch_long_backward
from otfuse._ops import LaunchOptions


def _packed(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int,
) -> Packed:  # fmt: skip
    x, y, cu_seqlens_x, cu_seqlens_y, a, b = contiguous(x, y, cu_seqlens_x, cu_seqlens_y, a, b)
    return Packed(x, y, cu_seqlens_x, cu_seqlens_y, a, b, longest_x, longest_y)


def launch_attend_varlen(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int, cosine: bool, barycentric: bool, options: LaunchOptions,
    history: bool, plan: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    items = _packed(x, y, a, b, cu_seqlens_x, cu_seqlens_y, longest_x, longest_y)
    sizes = items.B, longest_x, longest_y, options.num_iters
    outputs = varlen_ops.new_outputs(items.x, items.y, *sizes, options.grad, history, plan)
    if items.B == 0:
        return outputs
    x_out, y_out, padded_plan, *solution, kept = outputs
    matrix = items.matrix() if plan else None
    keep = history_mode(options.grad, history)
    form = {"COSINE": cosine, "BARYCENTRIC": barycentric, "STOPS": options.tol > 0, "HISTORY": keep}
    with on(x.device):
        for of in items.classes():
            parts, features = _spread(items, of)
            arguments = (
                *items.tensors(), x_out, y_out, matrix, *solution, kept if history else None,
                *items.sizes(of), items.D, features, *options[:3],
            )  # fmt: skip
            constants = {**form, "PRECISION": precision(x.dtype), **items.blocks("forward", of.tile)}
            launch(_kernels().attend_fwd, (items.B, parts), arguments, constants, x.device)
        if items.has_long():
            made = x_out, y_out, padded_plan if plan else None, *solution, kept if history else None
            launch_long(
                items, made, cosine, barycentric, options, keep, precision(x.dtype), device.memory_of(x.device)
            )  # fmt: skip
        if matrix is not None:
            _move_matrix(items, matrix, padded_plan, solution[2])
    return outputs


def launch_attend_varlen_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int, cosine: bool, barycentric: bool, options: LaunchOptions,
    rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    items = _packed(x, y, a, b, cu_seqlens_x, cu_seqlens_y, longest_x, longest_y)
    gradients = new_gradients(items.x, items.y, items.a, items.b)
    if items.B == 0:
        return gradients
    grad_x_out, grad_y_out, grad_plan, grad_f, grad_g = sent(*grads)
    gradients_wanted = *gradients[:2], *map(wanted, gradients[2:])
    rounds, history = contiguous(rounds, history)
    form = {"COSINE": cosine, "BARYCENTRIC": barycentric, "MODE": options.grad, "PRECISION": precision(x.dtype)}
    packed_grad_plan = None if grad_plan is None else items.matrix()
    with on(x.device):
        if packed_grad_plan is not None:
            _move_matrix(items, packed_grad_plan, grad_plan)
        for of in items.classes():
            parts, features = _spread(items, of)
            arguments = (
                *items.tensors(), rounds, history,
                grad_x_out, grad_y_out, packed_grad_plan, grad_f, grad_g, *gradients_wanted,
                *items.sizes(of), items.D, features, *options[:2],
            )  # fmt: skip
            constants = {**form, **items.blocks("backward", of.tile)}
            launch(_kernels().attend_bwd, (items.B, parts), arguments, constants, x.device)
        if items.has_long():
            launch_long_backward(
                items, (rounds, history), (grad_x_out, grad_y_out, grad_plan, grad_f, grad_g), gradients_wanted,
                cosine, barycentric, options, precision(x.dtype), device.memory_of(x.device),
            )  # fmt: skip
    return gradients


def _spread(items: Packed, of: SizeClass) -> tuple[int, int]:
    """Programs an item, and features of each; the similarity has no launch of its own."""
    token_bytes = sum(of.most) * items.D * items.x.element_size()
    return launch_shape(items.B, token_bytes, items.D, items.x.device)[:2]


def _move_matrix(items: Packed, matrix: Tensor, padded: Tensor, error: Tensor | None = None) -> None:
    """From [B, longest_x, longest_y] to where the kernels on chip have matrices of items; with their errors, back."""
    grid = (items.B, -(-items.longest_x // _MOVED["BLOCK_N"]))
    arguments = matrix, padded, error, items.cu_seqlens_x, items.cu_seqlens_y, *items.counts(), *items.on_chip()
    if padded.numel():
        launch(_kernels().matrix, grid, arguments, {"PACK": error is None, **_MOVED}, matrix.device)


_MOVED = {"BLOCK_N": 16, "BLOCK_M": 64, "num_warps": 4, "num_stages": 1}


class Kernels(NamedTuple):
    attend_fwd: Any
    attend_bwd: Any
    matrix: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import varlen

    return Kernels(varlen._varlen_fwd_kernel, varlen._varlen_bwd_kernel, varlen._varlen_matrix_kernel)


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.implement("sinkhorn_attend_varlen_triton", launch_attend_varlen, _key)
    ops.implement("sinkhorn_attend_varlen_triton_backward", launch_attend_varlen_backward, _key)
