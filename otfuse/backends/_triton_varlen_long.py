"""Launches for packed items that fit no tile on chip: three forward, three backward, whatever their number.

Their matrices take room for [T_x, longest_y], which is at least all that the items need; no other is bounded by what
the host knows. The device code is in ``otfuse.kernels.triton.varlen_long`` and ``varlen_long_backward``.

Letters: B batch, T_x and T_y tokens of all items, D features.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from otfuse.backends._triton_launch import launch

if TYPE_CHECKING:
    from otfuse.backends.triton_varlen import Packed

# By bytes of a number of the solve: the tile of products and attends; of the rounds, which have no features; and of the
# gradients of tokens, where three matrices meet.
LONG_TILE = {8: (32, 32), 4: (64, 64)}
LINES_TILE = {8: (16, 64), 4: (32, 128)}
LONG_TILE_BACKWARD = {8: (32, 32), 4: (64, 32)}

VECTORS_X, VECTORS_Y = 5, 6  # of either side, in which the backward keeps what the rounds leave


def launch_long(
    items: Packed, matrix: Tensor, outputs: tuple[Any, ...], cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, history: int, precision: str,
) -> None:  # fmt: skip
    """The log kernel in ``matrix``, the rounds, which leave the plan there, and both attends."""
    x_out, y_out, *solution, kept = outputs
    where, sizes = (items.cu_seqlens_x, items.cu_seqlens_y, items.a, items.b), items.long_sizes()
    _launch_products(items, (None, None, matrix, None, None, None, None), cosine, scale, precision)
    arguments = (
        matrix, *where, items.x.new_empty(len(items.x), dtype=items.solve_dtype), *solution, kept,
        *sizes, scale, num_iters, tol,
    )  # fmt: skip
    lines: dict[str, Any] = {"STOPS": tol > 0, "HISTORY": history, **_lines(items)}
    launch(_kernels().rounds, (items.B,), arguments, lines, items.x.device)
    tokens = matrix, items.x, items.y, *where, x_out, y_out, solution[2]
    blocks = items.long_blocks(LONG_TILE)
    arguments = (*tokens, *sizes, _blocks_x(items, blocks), items.D)
    constants: dict[str, Any] = {"BARYCENTRIC": barycentric, "PRECISION": precision, **blocks}
    launch(_kernels().attend, (items.B, _blocks_of_tokens(items, blocks)), arguments, constants, items.x.device)


def launch_long_backward(
    items: Packed, rounds: Tensor, history: Tensor, grads: tuple[Tensor | None, ...], gradients: tuple[Any, ...],
    cosine: bool, barycentric: bool, scale: float, num_iters: int, mode: int, precision: str,
) -> None:  # fmt: skip
    """``grads``: of x, y, packed plan, f and g; ``gradients``: room for those of x, y, a and b, None if unwanted."""
    grad_x_out, grad_y_out, grad_plan, grad_f, grad_g = grads
    matrices = [items.matrix() for _ in range(3)]  # the log kernel, and what comes from either side's gradient
    new, dtype = items.x.new_empty, items.solve_dtype
    inverses = new(len(items.x), dtype=dtype), new(len(items.y), dtype=dtype)
    _launch_products(items, (grad_x_out, grad_y_out, *matrices, *inverses), cosine, scale, precision)
    where, sizes = (items.cu_seqlens_x, items.cu_seqlens_y, items.a, items.b), items.long_sizes()
    vectors = new(VECTORS_X, len(items.x), dtype=dtype), new(VECTORS_Y, len(items.y), dtype=dtype)
    arguments = (
        *matrices, grad_plan, *where, rounds, history, grad_f, grad_g, *gradients[2:], *vectors,
        *sizes, scale, num_iters,
    )  # fmt: skip
    lines = {"BARYCENTRIC": barycentric, "MODE": mode, **_lines(items)}
    launch(_kernels().rounds_bwd, (items.B,), arguments, lines, items.x.device)
    blocks = items.long_blocks(LONG_TILE_BACKWARD, "varlen_long_backward")
    arguments = (
        *matrices, items.x, items.y, *where, *inverses, grad_x_out, grad_y_out, *gradients[:2],
        *sizes, _blocks_x(items, blocks), items.D, scale,
    )  # fmt: skip
    constants = {"COSINE": cosine, "BARYCENTRIC": barycentric, "PRECISION": precision, **blocks}
    launch(_kernels().tokens_bwd, (items.B, _blocks_of_tokens(items, blocks)), arguments, constants, items.x.device)


def _launch_products(items: Packed, matrices: tuple[Any, ...], cosine: bool, scale: float, precision: str) -> None:
    blocks = items.long_blocks(LONG_TILE)
    arguments = (*items.tensors(), *matrices, *items.long_sizes(), items.D, scale)
    constants = {"COSINE": cosine, "PRECISION": precision, **blocks}
    launch(_kernels().products, (items.B, _blocks_x(items, blocks)), arguments, constants, items.x.device)


def _blocks_x(items: Packed, blocks: dict[str, int]) -> int:
    return -(-items.longest_x // blocks["BLOCK_N"])


def _blocks_of_tokens(items: Packed, blocks: dict[str, int]) -> int:
    return _blocks_x(items, blocks) - (-items.longest_y // blocks["BLOCK_N"])


def _lines(items: Packed) -> dict[str, int]:
    return {name: size for name, size in items.long_blocks(LINES_TILE).items() if name != "BLOCK_D"}


class Kernels(NamedTuple):
    products: Any
    rounds: Any
    attend: Any
    rounds_bwd: Any
    tokens_bwd: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import varlen_long, varlen_long_backward

    forward = varlen_long._varlen_products_kernel, varlen_long._varlen_rounds_kernel, varlen_long._varlen_attend_kernel
    return Kernels(
        *forward, varlen_long_backward._varlen_rounds_bwd_kernel, varlen_long_backward._varlen_tokens_bwd_kernel
    )
