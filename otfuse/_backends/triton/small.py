"""Launchers of the Triton kernels for many small costs: several items a program (kernels/triton/small.py).

Letters: B batch, N rows, M columns.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse._backends.triton import ops as fused_ops
from otfuse._backends.triton.launch import contiguous, history_mode, launch, model, new_like, on, sent, wanted
from otfuse._backends.triton.paths import SMALL_SIDE, solved_size, tile_side
from otfuse._ops import LaunchOptions
from otfuse._problem import solve_dtype

WARP = 32  # lanes; where a warp has 64, an item takes twice as many of them

# Entries of a cost that a lane holds, by bytes of an entry: what leaves a forward no stack
# (benchmarks/compiler/resources.json). Weights and stops take registers besides, and so does a backward's second tile.
HELD = {
    "small": {4: 32, 8: 8},
    "small, everything": {4: 8, 8: 2},
    "small, backward": {4: 16, 8: 4},
    "small, backward, everything": {4: 8, 8: 2},
}

# Items and warps of the tiles that would have a stack all the same, by bytes of an entry.
OTHERWISE = {
    ("small", 8, 8, 8): (4, 2),
    ("small", 4, 4, 8): (16, 1),
    ("small", 4, 2, 16): (8, 1),
    ("small, everything", 8, 8, 8): (2, 1),
    ("small, everything", 8, 16, 16): (1, 2),
}


def launch_sinkhorn_small(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions, history: bool
) -> tuple[Tensor, ...]:
    B, N, M = cost.shape
    cost, a, b = contiguous(cost, a, b)
    plan = torch.empty_like(cost)
    *solution, kept = new_like(_models(B, N, M, options.num_iters, options.grad, history, cost.dtype, cost.device))
    if B > 0:
        blocks = small_blocks(row_of("small", a, b, options.tol), N, M, cost.dtype, cost.device.type == "cpu")
        form = {"STOPS": options.tol > 0, "HISTORY": history_mode(options.grad, history)}
        arguments = (
            cost, a, b, plan, *solution, kept if history else None,
            B, N, M, 1, options.scale, 1 / abs(options.scale), options.num_iters, options.tol,
        )  # fmt: skip
        with on(cost.device):
            launch(_kernels().forward, (-(-B // blocks["ITEMS"]),), arguments, {**form, **blocks}, cost.device)
    return plan, *solution, kept.t()


def launch_sinkhorn_small_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions, rounds: Tensor, history: Tensor,
    *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, N, M = cost.shape
    cost, a, b = contiguous(cost, a, b)
    gradients = fused_ops.new_gradients(cost, a, b)
    if B > 0:
        blocks = small_blocks(row_of("small, backward", a, b, options.tol), N, M, cost.dtype, cost.device.type == "cpu")
        form = {"STOPS": options.tol > 0, "MODE": options.grad}
        arguments = (
            cost, a, b, *contiguous(rounds, history.t()), *sent(*grads), gradients[0], *map(wanted, gradients[1:]),
            B, N, M, 1, options.scale, 1 / abs(options.scale),
        )  # fmt: skip
        with on(cost.device):
            launch(_kernels().backward, (-(-B // blocks["ITEMS"]),), arguments, {**form, **blocks}, cost.device)
    return gradients


def small_blocks(kernel: str, N: int, M: int, dtype: torch.dtype, interpreted: bool = False) -> dict[str, int]:
    """Of a row of HELD: a warp a program, with as many items as it has room for; of a side of 16 lanes hold half, and
    where it is conditions on padding that take the registers.

    EXACT, where N and M are powers of two: a lane reads four entries of a row at once, if the lanes of an item are
    enough to hold a row in this way.
    """
    BLOCK_N, BLOCK_M = tile_side(N, 2), tile_side(M, 2)
    held = HELD[kernel][solved_size(dtype)] // (2 if max(BLOCK_N, BLOCK_M) == SMALL_SIDE else 1)
    if kernel == "small" and (N, M) != (BLOCK_N, BLOCK_M):
        held //= 2
    lanes = max(1, BLOCK_N * BLOCK_M // held)  # of an item
    items, warps = max(1, WARP // lanes), max(1, lanes // WARP)
    items, warps = OTHERWISE.get((kernel, solved_size(dtype), BLOCK_N, BLOCK_M), (items, warps))
    exact = (N, M) == (BLOCK_N, BLOCK_M) and 4 * WARP * warps >= M * items
    if interpreted:  # a step costs the interpreter the same, whatever it holds
        items = WARP
    sizes = {"EXACT": exact, "BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "ITEMS": items}
    return {**sizes, "num_warps": warps, "num_stages": 1}


def row_of(kernel: str, a: Tensor | None, b: Tensor | None, tol: float) -> str:
    return kernel if a is None and b is None and tol <= 0 else f"{kernel}, everything"


@lru_cache(maxsize=4096)
def _models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """As fused_ops.new_small_solution, the history as it lies in memory."""
    solve = solve_dtype(dtype)
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
