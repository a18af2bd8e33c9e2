"""Launchers of the Triton kernels for many small costs: several items a program (kernels/triton/small.py).

Letters: B batch, N rows, M columns.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse import fused_ops
from otfuse.backends._triton_launch import contiguous, launch, model, new_like, on, sent, wanted
from otfuse.backends._triton_paths import solved_size, tile_side
from otfuse.fused_ops import UNROLL

WARP = 32  # lanes; where a warp has 64, an item takes twice as many of them

# Bytes of a cost, widened, that a lane holds of an item. A backward holds two tiles.
HELD = {"small": 256, "small_backward": 128}


def launch_sinkhorn_small(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int, history: bool
) -> tuple[Tensor, ...]:
    B, N, M = cost.shape
    cost, a, b = contiguous(cost, a, b)
    plan = torch.empty_like(cost)
    *solution, kept = new_like(_models(B, N, M, num_iters, grad, history, cost.dtype, cost.device))
    if B > 0:
        blocks = small_blocks("small", N, M, cost.dtype)
        mode = 0 if not history else 2 if grad == UNROLL else 1  # attend.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL
        options = {"EXACT": is_exact(N, M), "STOPS": tol > 0, "HISTORY": mode}
        arguments = (cost, a, b, plan, *solution, kept if history else None, B, N, M, scale, num_iters, tol)
        with on(cost.device):
            launch(_kernels().forward, (-(-B // blocks["ITEMS"]),), arguments, {**options, **blocks}, cost.device)
    return plan, *solution, kept.t()


def launch_sinkhorn_small_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int,
    rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, N, M = cost.shape
    cost, a, b = contiguous(cost, a, b)
    gradients = fused_ops.new_gradients(cost, a, b)
    if B > 0:
        blocks = small_blocks("small_backward", N, M, cost.dtype)
        options = {"EXACT": is_exact(N, M), "STOPS": tol > 0, "MODE": grad}
        arguments = (
            cost, a, b, *contiguous(rounds, history.t()), *sent(*grads), gradients[0], *map(wanted, gradients[1:]),
            B, N, M, scale,
        )  # fmt: skip
        with on(cost.device):
            launch(_kernels().backward, (-(-B // blocks["ITEMS"]),), arguments, {**options, **blocks}, cost.device)
    return gradients


def small_blocks(kernel: str, N: int, M: int, dtype: torch.dtype) -> dict[str, int]:
    """A warp a program; as many items as it has room for."""
    BLOCK_N, BLOCK_M = tile_side(N, 2), tile_side(M, 2)
    lanes = max(1, BLOCK_N * BLOCK_M * solved_size(dtype) // HELD[kernel])  # of an item
    return {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "ITEMS": max(1, WARP // lanes), "num_warps": 1, "num_stages": 1}


def is_exact(N: int, M: int) -> bool:
    return tile_side(N, 2) == N and tile_side(M, 2) == M


@lru_cache(maxsize=4096)
def _models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """As fused_ops.new_small_solution, the history as it lies in memory."""
    solve = torch.float64 if dtype == torch.float64 else torch.float32
    shapes, num_iters_shape = fused_ops.solution_shapes(B, N, M, num_iters, grad, history)
    f, g, error = (model(shape, solve, device) for shape in shapes[:3])
    kept = fused_ops.small_kept(M, num_iters, grad, history)
    return f, g, error, model(num_iters_shape, torch.int32, device), model((kept, B), solve, device)


class Kernels(NamedTuple):
    forward: Any
    backward: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import small, small_backward

    return Kernels(small._small_fwd_kernel, small_backward._small_bwd_kernel)
