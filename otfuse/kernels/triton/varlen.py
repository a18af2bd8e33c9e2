"""Packed tokens: the kernels of padded batches, for items that start anywhere and have a length of their own.

A launch has a program for every item, and solves those that its tile suits: no larger than the tile, and too large for
the next smaller one, which is launched as well. The others leave at once. Matrices [N, M] of packed items stand in room
for [T_x, longest_y], an item's from its first token's row on and without gaps: its own N x M numbers.

Letters: B batch, N and M tokens of an item, T_x and T_y of all items, D features.
"""

import triton
import triton.language as tl

from .attend import _attend_fwd_kernel
from .attend_backward import _attend_bwd_kernel
from .constants import HISTORY_ALL, HISTORY_NONE, LAST_ROWS, UNROLL
from .places import span, wide

FILLED = tl.constexpr(1024)  # numbers that are written at a time


@triton.jit
def suits(N, M, most_x, most_y, less_x, less_y):
    """Whether a launch solves an item of N x M: at most as large as the tile, and larger than the next smaller one."""
    return (N <= most_x) & (M <= most_y) & ((N > less_x) | (M > less_y))


@triton.jit
def fill(ptr, count, value):
    places = tl.arange(0, FILLED)
    for start in range(0, count, FILLED):
        tl.store(ptr + start + places, tl.full((FILLED,), value, ptr.dtype.element_ty), mask=start + places < count)


@triton.jit(do_not_specialize=[
    "tokens_x", "tokens_y", "longest_x", "longest_y", "most_x", "most_y", "less_x", "less_y", "num_iters"
])  # fmt: skip
def _varlen_fwd_kernel(
    x_ptr, y_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr,
    x_out_ptr, y_out_ptr, plan_ptr, f_ptr, g_ptr, error_ptr, rounds_ptr, history_ptr,
    tokens_x, tokens_y, longest_x, longest_y, most_x, most_y, less_x, less_y,
    D, part_features, scale: tl.float64, num_iters, tol: tl.float64,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, STOPS: tl.constexpr, HISTORY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, part), as in ``_attend_fwd_kernel``, whose arguments these are but for the packing.

    The launch of the smallest tile, with ``less_x`` below zero, makes items NaN that are longer than announced.
    """
    item = tl.program_id(0).to(tl.int64)
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    if suits(N, M, most_x, most_y, less_x, less_y):
        # The kernel of padded batches looks for an item at ``item N``: pointers are moved by the difference.
        by_x, by_y = start_x - item * N, start_y - item * M
        if a_ptr is not None:
            a_ptr += by_x
        if b_ptr is not None:
            b_ptr += by_y
        if plan_ptr is not None:
            plan_ptr += start_x * longest_y - item * N * M
        if HISTORY != HISTORY_NONE:
            history_ptr += (num_iters if HISTORY == HISTORY_ALL else LAST_ROWS) * (by_x + by_y)
        _attend_fwd_kernel(
            x_ptr + by_x * D, y_ptr + by_y * D, None, a_ptr, b_ptr,
            x_out_ptr + by_x * D, y_out_ptr + by_y * D, plan_ptr, None, f_ptr + by_x, g_ptr + by_y,
            error_ptr, rounds_ptr, history_ptr, N, M, D, part_features, scale, num_iters, tol,
            COSINE, BARYCENTRIC, STOPS, HISTORY, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    elif (less_x < 0) & ((N > longest_x) | (M > longest_y)) & (tl.program_id(1) == 0):
        nan = float("nan")
        fill(x_out_ptr + start_x * D, wide(N) * D, nan)
        fill(y_out_ptr + start_y * D, wide(M) * D, nan)
        fill(f_ptr + start_x, N, nan)
        fill(g_ptr + start_y, M, nan)
        tl.store(error_ptr + item, nan)
        tl.store(rounds_ptr + item, 0)


@triton.jit(do_not_specialize=[
    "tokens_x", "tokens_y", "longest_x", "longest_y", "most_x", "most_y", "less_x", "less_y", "num_iters"
])  # fmt: skip
def _varlen_bwd_kernel(
    x_ptr, y_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr, rounds_ptr, history_ptr,
    grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr, grad_f_ptr, grad_g_ptr,
    grad_x_ptr, grad_y_ptr, grad_a_ptr, grad_b_ptr,
    tokens_x, tokens_y, longest_x, longest_y, most_x, most_y, less_x, less_y,
    D, part_features, scale: tl.float64, num_iters,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs as in the forward; to ``_attend_bwd_kernel`` as that is to ``_attend_fwd_kernel``.

    Items that are longer than announced have gradients of zero.
    """
    item = tl.program_id(0).to(tl.int64)
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    if suits(N, M, most_x, most_y, less_x, less_y):
        by_x, by_y = start_x - item * N, start_y - item * M
        if a_ptr is not None:
            a_ptr += by_x
        if b_ptr is not None:
            b_ptr += by_y
        if grad_x_out_ptr is not None:
            grad_x_out_ptr += by_x * D
        if grad_y_out_ptr is not None:
            grad_y_out_ptr += by_y * D
        if grad_plan_ptr is not None:
            grad_plan_ptr += start_x * longest_y - item * N * M
        if grad_f_ptr is not None:
            grad_f_ptr += by_x
        if grad_g_ptr is not None:
            grad_g_ptr += by_y
        if grad_a_ptr is not None:
            grad_a_ptr += by_x
        if grad_b_ptr is not None:
            grad_b_ptr += by_y
        history_ptr += (num_iters if MODE == UNROLL else LAST_ROWS) * (by_x + by_y)
        _attend_bwd_kernel(
            x_ptr + by_x * D, y_ptr + by_y * D, None, a_ptr, b_ptr, rounds_ptr, history_ptr,
            grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr, None, grad_f_ptr, grad_g_ptr,
            grad_x_ptr + by_x * D, grad_y_ptr + by_y * D, None, grad_a_ptr, grad_b_ptr,
            N, M, D, part_features, scale, num_iters,
            COSINE, BARYCENTRIC, MODE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    elif (less_x < 0) & ((N > longest_x) | (M > longest_y)) & (tl.program_id(1) == 0):
        fill(grad_x_ptr + start_x * D, wide(N) * D, 0.0)
        fill(grad_y_ptr + start_y * D, wide(M) * D, 0.0)
        if grad_a_ptr is not None:
            fill(grad_a_ptr + start_x, N, 0.0)
        if grad_b_ptr is not None:
            fill(grad_b_ptr + start_y, M, 0.0)


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "most_x", "most_y"])
def _varlen_matrix_kernel(
    packed_ptr, padded_ptr, error_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr,
    tokens_x, tokens_y, longest_x, longest_y, most_x, most_y,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of rows): matrices of packed items from padded ones [B, longest_x, longest_y] if PACK,
    or into them: zero beyond an item, and NaN all over where its ``error_ptr`` is, or it is longer than announced.

    Those of items that no tile on chip holds are read and written where they are padded.
    """
    item = tl.program_id(0).to(tl.int64)
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    _, M = span(cu_seqlens_y_ptr, item, tokens_y)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    packed_ptr += start_x * longest_y
    padded_ptr += item * longest_x * longest_y
    on_chip = (N <= most_x) & (M <= most_y)
    fits = (N <= longest_x) & (M <= longest_y)
    rows_inside, rows_there = rows < tl.where(on_chip, N, 0), rows < tl.where(fits & ~on_chip, N, 0)
    for start in range(0, longest_y, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        packed = rows[:, None] * M + columns[None, :]
        padded = rows[:, None] * longest_y + columns[None, :]
        inside = rows_inside[:, None] & (columns < M)[None, :]
        if PACK:
            tl.store(packed_ptr + packed, tl.load(padded_ptr + padded, mask=inside, other=0.0), mask=inside)
        else:
            matrix = tl.load(packed_ptr + packed, mask=inside, other=0.0) + tl.load(error_ptr + item) * 0.0
            there = rows_there[:, None] & (columns < M)[None, :]
            room = (rows < longest_x)[:, None] & (columns < longest_y)[None, :]
            tl.store(padded_ptr + padded, matrix, mask=room & ~there)
