"""Packed items that fit no tile on chip, forward: their log kernel stands in memory, and is read twice a round.

Three launches. The products of tokens are made by a program for every block of rows, and attended to by one for every
block of tokens; the rounds of an item are run by one program from first to last, so that it stops by itself. They are
those of the logarithmic form (``rounds.py``), folded in at every half round: sums are taken of a plan whose other side
has just been scaled, so nothing under- or overflows after the first round, which is done with a maximum.

A zero weight is a potential of -inf here, inside as outside. How matrices [N, M] of packed items stand in memory:
``varlen.py``.

Letters: B batch, N and M tokens of an item, T_x and T_y of all items, D features; a line is a row or a column.
"""

import triton
import triton.language as tl

from .attend import HISTORY_ALL, HISTORY_NONE, dot_split, split
from .rounds import LN2, load_live, log_kernel, token_products
from .varlen import span, suits


@triton.jit
def total_weight(ptr, start, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of an item's weights, as ``load_weights`` has them."""
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, size, BLOCK):
        total += weights_at(ptr, start, first + tl.arange(0, BLOCK), size, DTYPE)
    return tl.sum(total)


@triton.jit
def weights_at(ptr, start, index, size, DTYPE: tl.constexpr):
    """Weights as passed, zero beyond the item; negative ones are NaN."""
    if ptr is None:
        weights = tl.where(index < size, 1.0, 0.0).to(DTYPE)
    else:
        weights = tl.load(ptr + start + index, mask=index < size, other=0).to(DTYPE)
        weights = tl.where(weights < 0, float("nan"), weights)
    return weights


@triton.jit
def totals(a_ptr, b_ptr, start_x, start_y, N, M, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """What the weights of either side are divided by, and whether there are any on both."""
    total_a = total_weight(a_ptr, start_x, N, DTYPE, BLOCK)
    total_b = total_weight(b_ptr, start_y, M, DTYPE, BLOCK)
    has_mass = (total_a != 0) & (total_b != 0)
    return tl.where(has_mass, total_a, 1.0), tl.where(has_mass, total_b, 1.0), has_mass


@triton.jit
def marginal_at(ptr, start, index, size, total, has_mass, DTYPE: tl.constexpr):
    weights = weights_at(ptr, start, index, tl.where(has_mass, size, 0), DTYPE)
    return weights / total


@triton.jit
def log2_or_infinity(values):
    """-inf at zero, without a warning of it."""
    return tl.where(values == 0, float("-inf"), tl.log2(tl.where(values == 0, 1.0, values)))


@triton.jit
def load_tile(ptr, lines, others, line_stride, other_stride, num_lines, num_others, other_value):
    at = lines.to(tl.int64)[:, None] * line_stride + others.to(tl.int64)[None, :] * other_stride
    return tl.load(ptr + at, mask=(lines < num_lines)[:, None] & (others < num_others)[None, :], other=other_value)


@triton.jit
def store_tile(ptr, tile, lines, others, line_stride, other_stride, num_lines, num_others):
    at = lines.to(tl.int64)[:, None] * line_stride + others.to(tl.int64)[None, :] * other_stride
    tl.store(ptr + at, tile, mask=(lines < num_lines)[:, None] & (others < num_others)[None, :])


@triton.jit
def load_log(ptr, index, size):
    """A potential, -inf beyond the item."""
    return tl.load(ptr + index, mask=index < size, other=float("-inf"))


@triton.jit
def finite(potential):
    return tl.where(potential == float("-inf"), 0.0, potential)


@triton.jit
def line_maximum(
    L_ptr, other_ptr, lines, line_stride, other_stride, num_lines, num_others,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Of ``L + log_other`` along these lines; zero where all of it is -inf."""
    largest = tl.full((BLOCK, BLOCK_OTHER), float("-inf"), DTYPE)
    for start in range(0, num_others, BLOCK_OTHER):
        others = start + tl.arange(0, BLOCK_OTHER)
        L = load_tile(L_ptr, lines, others, line_stride, other_stride, num_lines, num_others, float("-inf"))
        largest = tl.maximum(largest, L + load_log(other_ptr, others, num_others)[None, :])
    return finite(tl.max(largest, 1))


@triton.jit
def line_sums(
    L_ptr, other_ptr, lines, shift, line_stride, other_stride, num_lines, num_others,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Sums of ``exp2(L + shift + log_other)`` along these lines."""
    total = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
    for start in range(0, num_others, BLOCK_OTHER):
        others = start + tl.arange(0, BLOCK_OTHER)
        L = load_tile(L_ptr, lines, others, line_stride, other_stride, num_lines, num_others, float("-inf"))
        total += tl.exp2((L + shift[:, None]) + load_log(other_ptr, others, num_others)[None, :])
    return tl.sum(total, 1)


@triton.jit
def rescaled(
    L_ptr, other_ptr, old, marginal, lines, first, line_stride, other_stride, num_lines, num_others,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Log scalings with which these lines of the plan sum to ``marginal``, and what they summed to with ``old``."""
    shift = finite(old)
    if first:
        shift = -line_maximum(
            L_ptr, other_ptr, lines, line_stride, other_stride, num_lines, num_others, DTYPE, BLOCK, BLOCK_OTHER
        )
    total = line_sums(
        L_ptr, other_ptr, lines, shift, line_stride, other_stride, num_lines, num_others, DTYPE, BLOCK, BLOCK_OTHER
    )
    new = tl.where(marginal == 0, float("-inf"), shift + log2_or_infinity(marginal) - log2_or_infinity(total))
    return new, total


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y"])
def _varlen_products_kernel(
    x_ptr, y_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr, grad_x_out_ptr, grad_y_out_ptr,
    L_ptr, from_x_ptr, from_y_ptr, inverse_x_ptr, inverse_y_ptr,
    tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, D, scale: tl.float64,
    COSINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of rows): the log kernel, -inf at padding, and NaN where an entry of the tile is.

    For the backward also inverse norms, and the products of gradients of one side's outputs with the other's tokens.
    """
    item, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    if (row < N) & suits(N, M, longest_x, longest_y, less_x, less_y):
        if a_ptr is not None:
            a_ptr += start_x
        if b_ptr is not None:
            b_ptr += start_y
        L_ptr += start_x * longest_y
        rows = row + tl.arange(0, BLOCK_N)
        live_x = load_live(a_ptr, 0, rows, N)
        for column in range(0, M, BLOCK_M):
            columns = column + tl.arange(0, BLOCK_M)
            live_y = load_live(b_ptr, 0, columns, M)
            similarity, inverse_x, inverse_y = token_products(
                x_ptr + start_x * D, y_ptr + start_y * D, rows, columns, live_x, live_y, D,
                COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
            L, _, _, poison = log_kernel(similarity, live_x[:, None] & live_y[None, :], scale, DTYPE)
            store_tile(L_ptr, L + poison, rows, columns, M, 1, N, M)
            if inverse_x_ptr is not None:
                tl.store(inverse_x_ptr + start_x + rows, inverse_x, mask=rows < N)
                tl.store(inverse_y_ptr + start_y + columns, inverse_y, mask=columns < M)
            if from_x_ptr is not None:
                made = gradient_products(
                    grad_x_out_ptr, y_ptr, start_x, start_y, rows, columns, live_x, live_y, D,
                    PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
                )  # fmt: skip
                store_tile(from_x_ptr + start_x * longest_y, made, rows, columns, M, 1, N, M)
                made = gradient_products(
                    x_ptr, grad_y_out_ptr, start_x, start_y, rows, columns, live_x, live_y, D,
                    PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
                )  # fmt: skip
                store_tile(from_y_ptr + start_x * longest_y, made, rows, columns, M, 1, N, M)


@triton.jit
def gradient_products(
    x_ptr, y_ptr, start_x, start_y, rows, columns, live_x, live_y, D,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Products of tokens or gradients; zero where there is no gradient."""
    made = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    if x_ptr is not None:
        if y_ptr is not None:
            made, _, _ = token_products(
                x_ptr + start_x * D, y_ptr + start_y * D, rows, columns, live_x, live_y, D,
                False, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y", "num_iters"])
def _varlen_rounds_kernel(
    L_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr,
    next_ptr, f_ptr, g_ptr, error_ptr, rounds_ptr, history_ptr,
    tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, scale: tl.float64, num_iters, tol: tl.float64,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program an item: its rounds, and then its plan in place of the log kernel.

    ``f_ptr`` and ``g_ptr`` hold the log scalings, ``next_ptr`` those of the rows before it is known whether another
    round is run: the sums that they come of are the last round's error.
    """
    item = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = L_ptr.dtype.element_ty
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    if suits(N, M, longest_x, longest_y, less_x, less_y):
        L_ptr += start_x * longest_y
        f_ptr, g_ptr, next_ptr = f_ptr + start_x, g_ptr + start_y, next_ptr + start_x
        total_a, total_b, has_mass = totals(a_ptr, b_ptr, start_x, start_y, N, M, DTYPE, BLOCK_N * 8)
        if HISTORY != HISTORY_NONE:
            kept = num_iters if HISTORY == HISTORY_ALL else 1
            history_ptr += 2 * item + kept * (start_x + start_y)
            tl.store(history_ptr, 0.0)
            tl.store(history_ptr + 1, 0.0)
            history_ptr += 2
        row_places, column_places = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N)
        for start in range(0, N, BLOCK_N):
            rows = start + row_places
            tl.store(f_ptr + rows, tl.full((BLOCK_N,), float("-inf"), DTYPE), mask=rows < N)
        for start in range(0, M, BLOCK_N):
            columns = start + column_places
            b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
            tl.store(g_ptr + columns, tl.where(b == 0, float("-inf"), b * 0), mask=columns < M)
        tl.debug_barrier()
        t, error, more = 0, tl.zeros((), DTYPE), has_mass
        while more:
            error = tl.zeros((), DTYPE)
            for start in range(0, N, BLOCK_N):
                rows = start + row_places
                a = marginal_at(a_ptr, start_x, rows, N, total_a, has_mass, DTYPE)
                new, sums = rescaled(
                    L_ptr, g_ptr, load_log(f_ptr, rows, N), a, rows, t == 0, M, 1, N, M, DTYPE, BLOCK_N, BLOCK_M
                )
                error += tl.sum(tl.abs(sums - a))
                tl.store(next_ptr + rows, new, mask=rows < N)
            tl.debug_barrier()
            more = t < num_iters
            if STOPS:
                more = more & ((t == 0) | ~(error < tol))
            if more:
                for start in range(0, N, BLOCK_N):
                    rows = start + row_places
                    log_u = load_log(next_ptr, rows, N)
                    tl.store(f_ptr + rows, log_u, mask=rows < N)
                    if HISTORY == HISTORY_ALL:
                        tl.store(history_ptr + t * (N + M) + rows, log_u, mask=rows < N)
                tl.debug_barrier()
                for start in range(0, M, BLOCK_N):
                    columns = start + column_places
                    b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
                    log_v, _ = rescaled(
                        L_ptr, f_ptr, load_log(g_ptr, columns, M), b, columns, t == 0, 1, M, M, N,
                        DTYPE, BLOCK_N, BLOCK_M,
                    )  # fmt: skip
                    tl.store(g_ptr + columns, log_v, mask=columns < M)
                    if HISTORY == HISTORY_ALL:
                        tl.store(history_ptr + t * (N + M) + N + columns, log_v, mask=columns < M)
                tl.debug_barrier()
                t += 1
        poison = error * 0.0 + total_a * 0.0 + total_b * 0.0
        for start in range(0, N, BLOCK_N):
            rows = start + row_places
            log_u = load_log(f_ptr, rows, N)
            for first in range(0, M, BLOCK_M):
                columns = first + tl.arange(0, BLOCK_M)
                L = load_tile(L_ptr, rows, columns, M, 1, N, M, float("-inf"))
                plan = tl.exp2((L + log_u[:, None]) + load_log(g_ptr, columns, M)[None, :]) + poison
                store_tile(L_ptr, plan, rows, columns, M, 1, N, M)
        tl.debug_barrier()
        unit = (1.0 / tl.abs(tl.full((), scale, tl.float64)) * LN2).to(DTYPE)
        for start in range(0, N, BLOCK_N):
            rows = start + row_places
            log_u = load_log(f_ptr, rows, N)
            if HISTORY != HISTORY_NONE and HISTORY != HISTORY_ALL:
                tl.store(history_ptr + rows, log_u, mask=rows < N)
            tl.store(f_ptr + rows, log_u * unit + poison, mask=rows < N)
        for start in range(0, M, BLOCK_N):
            columns = start + column_places
            log_v = load_log(g_ptr, columns, M)
            if HISTORY != HISTORY_NONE and HISTORY != HISTORY_ALL:
                tl.store(history_ptr + N + columns, log_v, mask=columns < M)
            tl.store(g_ptr + columns, log_v * unit + poison, mask=columns < M)
        if HISTORY == HISTORY_ALL:  # rounds that were not run are zero, not whatever was there
            for start in range(t * (N + M), num_iters * (N + M), BLOCK_N):
                rest = start + row_places
                tl.store(history_ptr + rest, tl.zeros((BLOCK_N,), DTYPE), mask=rest < num_iters * (N + M))
        tl.store(error_ptr + item, error + poison)
        tl.store(rounds_ptr + item, t)


@triton.jit
def attend_lines(
    plan_ptr, x_ptr, y_ptr, out_ptr, a_ptr, b_ptr, start_x, start_y, first, line_stride, other_stride, N, M, D, poison,
    BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``out = x + W y`` for the tokens from ``first`` on; x unchanged at padding."""
    rows, features = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    factor = tl.full((BLOCK_N,), 1.0, DTYPE)
    if BARYCENTRIC:
        total_a, _, has_mass = totals(a_ptr, b_ptr, start_x, start_y, N, M, DTYPE, 512)
        a = marginal_at(a_ptr, start_x, rows, N, total_a, has_mass, DTYPE)
        factor = 1.0 / tl.where(a == 0, 1.0, a)
    if b_ptr is not None:
        b_ptr += start_y
    at_x = (start_x + rows)[:, None] * D + features[None, :]
    for start in range(0, D, BLOCK_D):
        in_D = (start + features < D)[None, :]
        attended = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
        for column in range(0, M, BLOCK_M):
            columns = column + tl.arange(0, BLOCK_M)
            plan = load_tile(plan_ptr, rows, columns, line_stride, other_stride, N, M, 0.0)
            high, low, unit = split(plan, x_ptr.dtype.element_ty)
            at_y = (start_y + columns)[:, None] * D + start + features[None, :]
            y = tl.load(y_ptr + at_y, mask=load_live(b_ptr, 0, columns, M)[:, None] & in_D, other=0.0)
            attended = dot_split(high, low, unit, y, attended, PRECISION)
        x = tl.load(x_ptr + at_x + start, mask=(rows < N)[:, None] & in_D, other=0.0)
        out = x.to(DTYPE) + attended * factor[:, None] + poison
        tl.store(out_ptr + at_x + start, out.to(x.dtype), mask=(rows < N)[:, None] & in_D)


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y", "blocks_x"])
def _varlen_attend_kernel(
    plan_ptr, x_ptr, y_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr, x_out_ptr, y_out_ptr, error_ptr,
    tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, blocks_x, D,
    BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of its tokens): those of x come first, in ``blocks_x``."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = plan_ptr.dtype.element_ty
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    first_x, first_y = block * BLOCK_N, (block - blocks_x) * BLOCK_N
    if suits(N, M, longest_x, longest_y, less_x, less_y):
        plan_ptr += start_x * longest_y
        poison = tl.load(error_ptr + item) * 0.0
        if (block < blocks_x) & (first_x < N):
            attend_lines(
                plan_ptr, x_ptr, y_ptr, x_out_ptr, a_ptr, b_ptr, start_x, start_y, first_x, M, 1, N, M, D, poison,
                BARYCENTRIC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
        if (block >= blocks_x) & (first_y < M):
            attend_lines(
                plan_ptr, y_ptr, x_ptr, y_out_ptr, b_ptr, a_ptr, start_y, start_x, first_y, 1, M, M, N, D, poison,
                BARYCENTRIC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
