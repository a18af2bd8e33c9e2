"""All rounds of an item in one launch, its kernel matrix on chip, spread over a cluster of multiprocessors.

It takes the place of the launches of ``streaming.py`` that go over the matrix round by round, and leaves behind what
they do: the attends and the backward are the same. A program is an item; with ``num_ctas`` Triton spreads its tile by
rows over the blocks of a cluster, which send each other their sums over columns through distributed shared memory. In
one block it runs on every device.

An item whose range is moderate is solved in scalings, and the tile on chip is ``K = exp2(L + e_u + e_v)``, with the
first exponents of ``streaming.py``. Of any other item it is L: whole exponents move with the scalings, at every half
round (docs/numerics.md).

Letters: B batch, N rows and M columns of an item, T rounds; *lines* are rows and columns, one after the other.
Logarithms are to base two.
"""

import triton
import triton.language as tl

from .constants import HISTORY_ALL, HISTORY_LAST, HISTORY_NONE, LAST_ROWS
from .rounds import (
    LN2,
    SMALLEST32,
    SMALLEST64,
    divide,
    fits_scalings,
    half_round,
    lacking,
    sign_of,
    spread,
)
from .streaming import history_of, load_lines, log_tile, wide


@triton.constexpr_function
def tile_shape(BLOCK_N, BLOCK_M, CTAS, WARPS):
    """The tile as (blocks, columns in a thread, rows in a thread, column warps, row warps and lanes, columns).

    Triton deals a tile that is loaded in this order of dimensions to threads from its end: four columns, then lanes,
    then warps, and what is left stays in the thread. So a thread gets about as many rows as columns, which take the
    fewest shuffles and registers.
    """
    width = min(64, BLOCK_M)
    groups = BLOCK_M // width
    inner = 2 if groups % 2 == 0 else 1
    column_warps = min(groups // inner, WARPS)
    inner = groups // column_warps
    rows = BLOCK_N // CTAS
    across = min(rows, WARPS // column_warps * (128 // width))
    return CTAS, inner, rows // across, column_warps, across, width


@triton.jit
def load_tile(ptr, stride_n, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """A matrix [N, M] as [BLOCK_N, BLOCK_M], zero beyond, in tile_shape's order."""
    rows = tl.reshape(tl.arange(0, BLOCK_N), (SHAPE[0], 1, SHAPE[2], 1, SHAPE[4], 1))
    columns = tl.reshape(tl.arange(0, BLOCK_M), (1, SHAPE[1], 1, SHAPE[3], 1, SHAPE[5]))
    tile = tl.load(ptr + rows * stride_n + columns, mask=(rows < N) & (columns < M), other=0.0)
    return tl.reshape(tl.permute(tile, (0, 2, 4, 1, 3, 5)), (BLOCK_N, BLOCK_M))


@triton.constexpr_function
def part_of(BLOCK_N, CTAS):
    """Rows that are looked at at a time: at least 16 of every block, where there are as many."""
    return min(BLOCK_N, max(BLOCK_N // 4, 16 * CTAS))


@triton.jit
def load_log(
    ptr, offset_ptr, a, b, stride_n, N, M, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CTAS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """L [BLOCK_N, BLOCK_M] from this address on, of what is below the offsets; -inf at padding, whatever is there."""
    similarity = load_tile(ptr, stride_n, N, M, BLOCK_N, BLOCK_M, tile_shape(BLOCK_N, BLOCK_M, CTAS, WARPS))
    rows = tl.arange(0, BLOCK_N)
    offset = load_lines(offset_ptr, rows, rows < N)[:, None]
    return log_tile(similarity.to(a.dtype), offset, a != 0, b != 0, scale, a.dtype)


@triton.jit
def store_lines(ptr, u, v, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    tl.store(ptr + rows, u, mask=rows < N)
    tl.store(ptr + N + columns, v, mask=columns < M)


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _rounds_kernel(
    matrix_ptr, weights_ptr, offset_ptr, items_ptr, first_ptr, exponent_ptr, scaling_ptr, f_ptr, g_ptr, error_ptr,
    rounds_ptr, history_ptr, N, M, stride_n, scale: tl.float64, num_iters, tol: tl.float64,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CTAS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Programs (item): all rounds of ``matrix_ptr`` [B, N, M], and what ``_finish_kernel`` writes of them.

    Of lines [B, N + M], ``first_ptr`` are the exponents to begin with; exponents and scalings are stored as they are
    after the last round. ``stride_n`` is M, of which the compiler may know what divides it.
    """
    item = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    smallest: tl.constexpr = SMALLEST64 if DTYPE == tl.float64 else SMALLEST32
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    lines = item * (N + M)
    a = load_lines(weights_ptr, lines + rows, rows < N)
    b = load_lines(weights_ptr, lines + N + columns, columns < M)
    apart_ab = spread(a) + spread(b)  # now, not beside the tile: it leaves few registers
    matrix_ptr += item * N * stride_n
    offset_ptr += item * N
    first_u_ptr, first_v_ptr = first_ptr + lines, first_ptr + lines + N
    # A few rows at a time, and then all again: what is looked for here would not fit beside the tile.
    PART: tl.constexpr = part_of(BLOCK_N, CTAS)
    e_v = load_lines(first_v_ptr, columns, columns < M)
    least = tl.zeros((PART,), DTYPE)
    for first in range(0, BLOCK_N, PART):
        part = first + tl.arange(0, PART)
        a_part, e_part = load_lines(weights_ptr + lines, part, part < N), load_lines(first_u_ptr, part, part < N)
        ptr = matrix_ptr + wide(first) * stride_n
        L = load_log(ptr, offset_ptr + first, a_part, b, stride_n, N - first, M, scale, PART, BLOCK_M, CTAS, WARPS)
        L = (L + e_part[:, None]) + e_v[None, :]  # nowhere more than one
        least = tl.minimum(least, tl.min(tl.where(L == float("-inf"), 0.0, L), 1))
    entries = (1.0 - tl.min(least)) * LN2
    one_piece = fits_scalings(entries, entries + apart_ab, DTYPE)
    if HISTORY != HISTORY_NONE:
        history_ptr = history_of(history_ptr, item, num_iters if HISTORY == HISTORY_ALL else LAST_ROWS, lines)
        tl.store(history_ptr - 2, tl.load(items_ptr + item * 4))
        tl.store(history_ptr - 1, tl.where(one_piece, 1.0, 0.0))

    u, v = tl.zeros((BLOCK_N,), DTYPE), tl.where(b == 0, 0.0, 1.0).to(DTYPE)
    error = tl.zeros((), DTYPE)
    t, more = 0, num_iters > 0
    if one_piece:
        e_u, e_v = load_lines(first_u_ptr, rows, rows < N), load_lines(first_v_ptr, columns, columns < M)
        tile = load_log(matrix_ptr, offset_ptr, a, b, stride_n, N, M, scale, BLOCK_N, BLOCK_M, CTAS, WARPS)
        tile = tl.exp2((tile + e_u[:, None]) + e_v[None, :])
        v *= tl.exp2(-e_v)  # what is one before K is scaled
        sums = tl.sum(tile * v[None, :], 1)
        while more:
            u = divide(a, tl.maximum(sums, smallest))
            v = divide(b, tl.maximum(tl.sum(tile * u[:, None], 0), smallest))
            if HISTORY == HISTORY_ALL:
                store_lines(history_ptr + wide(t) * (N + M), u, v, N, M, BLOCK_N, BLOCK_M)
            sums = tl.sum(tile * v[None, :], 1)
            t += 1
            more = t < num_iters
            if STOPS:
                more = more & ~(tl.sum(tl.abs(u * sums - a)) < tol)
        error = tl.sum(tl.abs(u * sums - a))
        again = tl.minimum(t, 0)  # zero, which the compiler cannot know: the exponents are not kept in registers
        e_u = load_lines(first_u_ptr + again, rows, rows < N)
        e_v = load_lines(first_v_ptr + again, columns, columns < M)
    else:
        tile = load_log(matrix_ptr, offset_ptr, a, b, stride_n, N, M, scale, BLOCK_N, BLOCK_M, CTAS, WARPS)
        e_u, e_v = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
        before_u, before_v = load_lines(first_u_ptr, rows, rows < N), load_lines(first_v_ptr, columns, columns < M)
        while more:
            u, e_u = half_round(tile, a, v, e_v, 1, smallest)
            v, e_v = half_round(tile, b, u, e_u, 0, smallest)
            if HISTORY == HISTORY_ALL:
                kept_u, kept_v = u * tl.exp2(e_u - before_u), v * tl.exp2(e_v - before_v)
                store_lines(history_ptr + wide(t) * (N + M), kept_u, kept_v, N, M, BLOCK_N, BLOCK_M)
                before_u, before_v = e_u, e_v
            t += 1
            more = t < num_iters
            if STOPS:
                more = more & ~(lacking(tile, a, u, e_u, v, e_v) < tol)
        error = lacking(tile, a, u, e_u, v, e_v)

    poison, has_mass = tl.load(items_ptr + item * 4), tl.load(items_ptr + item * 4 + 2) != 0
    tl.store(error_ptr + item, error + poison)
    tl.store(rounds_ptr + item, tl.where(has_mass, t, 0))
    if HISTORY == HISTORY_LAST:
        store_lines(history_ptr, u, v, N, M, BLOCK_N, BLOCK_M)
        store_lines(history_ptr + N + M, e_u, e_v, N, M, BLOCK_N, BLOCK_M)
    if STOPS and HISTORY == HISTORY_ALL:  # rounds that were not run are zero, not whatever was there
        for rest in range(t, num_iters):
            at = history_ptr + wide(rest) * (N + M)
            store_lines(at, tl.zeros_like(u), tl.zeros_like(v), N, M, BLOCK_N, BLOCK_M)
    store_lines(exponent_ptr + lines, e_u, e_v, N, M, BLOCK_N, BLOCK_M)
    store_lines(scaling_ptr + lines, u, v, N, M, BLOCK_N, BLOCK_M)
    unit = (1.0 / tl.abs(tl.full((), scale, tl.float64)) * LN2).to(DTYPE)  # f = log2(u) unit; log2(0) is -inf
    offset = load_lines(offset_ptr, rows, rows < N) * sign_of(scale, DTYPE)
    tl.store(f_ptr + item * N + rows, ((tl.log2(u) + e_u) * unit - offset) + poison, mask=rows < N)
    tl.store(g_ptr + item * M + columns, (tl.log2(v) + e_v) * unit + poison, mask=columns < M)
