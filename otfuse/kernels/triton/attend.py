"""Forward: similarity, Sinkhorn-Knopp and both attends, an item's kernel matrix on chip from first round to last.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

import triton
import triton.language as tl

from .constants import HISTORY_ALL, HISTORY_LAST, HISTORY_NONE, LAST_ROWS
from .places import wide
from .rounds import (
    LN2,
    SMALLEST32,
    are_tiny,
    crossed,
    divide,
    fits_scalings,
    flat,
    half_rounds,
    load_live,
    load_marginals,
    log_kernel,
    log_sum,
    log_weights,
    product,
    rounds_while,
    sign_of,
    spread,
    store_round,
    tile_at,
    token_products,
    unflat,
)

EXPONENT = tl.constexpr(0x7F800000)  # the bits of a float32 that hold it


@triton.jit
def split(tile, LIKE: tl.constexpr):
    """A float32 tile as (high + low) unit, which tensor cores multiply with LIKE's numbers.

    Two bfloat16 hold 16 bits. Two float16 hold 22 of a row's largest entry, once the row has been brought into their
    range by a power of two, which is ``unit``. Other dtypes are not split.
    """
    unit = tl.full((tile.shape[0],), 1.0, tile.dtype)
    high, low = tile, tile
    if LIKE == tl.bfloat16:
        high = tile.to(tl.bfloat16)
        low = (tile - high.to(tl.float32)).to(tl.bfloat16)
    elif LIKE == tl.float16:
        exponent = tl.max(tl.abs(tile), 1).to(tl.int32, bitcast=True) & EXPONENT
        exponent = tl.maximum(exponent, 27 << 23)  # 2^-100: the inverse is not to overflow
        tile *= ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None] * 16384.0
        unit = exponent.to(tl.float32, bitcast=True) / 16384.0
        high = tile.to(tl.float16)
        low = (tile - high.to(tl.float32)).to(tl.float16)
    return high, low, unit


@triton.jit
def dot_split(high, low, unit, tokens, total, PRECISION: tl.constexpr):
    """``total + unit (high + low) @ tokens``."""
    if tokens.dtype == tl.bfloat16:
        total = product(low, tokens, product(high, tokens, total, PRECISION), PRECISION)
    elif tokens.dtype == tl.float16:
        scaled = product(low, tokens, product(high, tokens, tl.zeros_like(total), PRECISION), PRECISION)
        total += scaled * unit[:, None]
    else:
        total = product(high, tokens, total, PRECISION)
    return total


@triton.jit
def attend_side(
    plan, factor, poison, x_ptr, y_ptr, out_ptr, live_x, live_y, item, N, M, D, first, last, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out = x + factor (plan y)`` for features first … last - 1; x unchanged at padding, whatever it holds."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    high, low, unit = split(plan, x_ptr.dtype.element_ty)
    features = tl.arange(0, BLOCK_D)
    x_ptr, y_ptr, out_ptr = x_ptr + item * N * D, y_ptr + item * M * D, out_ptr + item * N * D
    at_x, at_y = rows[:, None] * D + features[None, :], columns[:, None] * D + features[None, :]
    for start in range(first, last, BLOCK_D):
        in_D = (start + features < D)[None, :]
        y = tl.load(y_ptr + at_y + start, mask=live_y[:, None] & in_D, other=0.0)
        x = tl.load(x_ptr + at_x + start, mask=(rows < N)[:, None] & in_D, other=0.0)
        attended = dot_split(high, low, unit, y, tl.zeros((BLOCK_N, BLOCK_D), plan.dtype), PRECISION)
        out = x.to(plan.dtype) + attended * factor[:, None] + poison
        tl.store(out_ptr + at_x + start, out.to(x.dtype), mask=(rows < N)[:, None] & in_D)


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _attend_fwd_kernel(
    x_ptr, y_ptr, similarity_ptr, a_ptr, b_ptr,
    x_out_ptr, y_out_ptr, plan_ptr, similarity_out_ptr, f_ptr, g_ptr, error_ptr, rounds_ptr, history_ptr,
    N, M, D, part_features, scale: tl.float64, num_iters, tol: tl.float64,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, STOPS: tl.constexpr, HISTORY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, part): every one solves its item; part p attends to features
    p part_features … (p + 1) part_features - 1.

    Without ``similarity_ptr`` the similarity is made of the tokens, without ``x_out_ptr`` nothing is attended to:
    then this is the solver alone. Outputs whose pointer is None are not wanted.
    """
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if similarity_ptr is None:
        DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        CROSSED: tl.constexpr = crossed(x_ptr.dtype.element_ty, BLOCK_N, BLOCK_M)
    else:
        CROSSED: tl.constexpr = 0
        DTYPE: tl.constexpr = tl.float64 if similarity_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if HISTORY != HISTORY_NONE:
        kept = num_iters if HISTORY == HISTORY_ALL else LAST_ROWS
        history_ptr += item * (2 + wide(kept) * (N + M)) + 2  # two say which form

    # Once for an item in one piece. In the logarithmic form, again whenever scalings are folded into K: the similarity
    # is made or read anew, since to keep it beside K would cost registers that a tile of 128 x 128 does not leave.
    K, poison, one_piece = tl.zeros((BLOCK_N, BLOCK_M), DTYPE), tl.zeros((), DTYPE), True
    # Without weights there is one form fewer, and the compiler is not to look for registers for it.
    HAS_WEIGHTS: tl.constexpr = a_ptr is not None or b_ptr is not None
    tiny = N < 0
    u, row_sums, log_u = tl.full((BLOCK_N,), 1.0, DTYPE), tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE)
    v, log_v = tl.zeros((BLOCK_M,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
    t, more = 0, True
    while more:
        # Plus zero, which the compiler cannot know: addresses are then not kept in registers through the rounds.
        again_rows, again_columns = rows + tl.minimum(t, 0), columns + tl.minimum(t, 0)
        live_x, live_y = load_live(a_ptr, item, again_rows, N), load_live(b_ptr, item, again_columns, M)
        if similarity_ptr is None:
            similarity = token_products(
                x_ptr + item * N * D, y_ptr + item * M * D, again_rows, again_columns, live_x, live_y, D,
                COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
        else:
            at, live = tile_at(again_rows, again_columns, M, live_x, live_y, BLOCK_N, BLOCK_M)
            similarity = flat(tl.load(similarity_ptr + item * N * M + at, mask=live, other=0.0), BLOCK_N, BLOCK_M)
            similarity = similarity.to(DTYPE)
        if similarity_out_ptr is not None:
            if part == 0 and t == 0:
                at, inside = tile_at(again_rows, again_columns, M, rows < N, columns < M, BLOCK_N, BLOCK_M)
                tl.store(similarity_out_ptr + item * N * M + at, unflat(similarity, BLOCK_N, BLOCK_M), mask=inside)
        again_rows, again_columns = rows + tl.maximum(-t, 0), columns + tl.maximum(-t, 0)
        a, b, _, _, _ = load_marginals(a_ptr, b_ptr, item, again_rows, again_columns, N, M, DTYPE)
        L, offset, range_L, poison = log_kernel(similarity, (a != 0)[:, None] & (b != 0)[None, :], scale, DTYPE)
        if t == 0:
            one_piece = fits_scalings(range_L, range_L + spread(a) + spread(b), DTYPE)
            if part == 0:  # in memory until f is stored: no register is kept through the rounds
                tl.store(f_ptr + item * N + rows, offset, mask=rows < N)
            if HAS_WEIGHTS:
                tiny = are_tiny(a, b, DTYPE) & ~one_piece
        if HAS_WEIGHTS and tiny:
            K, u, v, row_sums, log_u, log_v, t = half_rounds(
                L, a, b, num_iters, tol, history_ptr, N, M, part, STOPS, HISTORY == HISTORY_ALL, BLOCK_N, BLOCK_M
            )
            more = t < 0
        else:
            if t == 0:
                if not one_piece:
                    log_u = log_weights(a) - log_sum(L, log_v, 1)
            if not one_piece:
                log_v = log_weights(b) - log_sum(L, log_u, 0)
                if t == 0:
                    if HISTORY == HISTORY_ALL:
                        store_round(history_ptr, 0, log_u, log_v, N, M, part, BLOCK_N, BLOCK_M)
                    t += 1
            K = tl.exp2((L + log_u[:, None]) + log_v[None, :])
            v = tl.where(b == 0, 0.0, 1.0).to(DTYPE)
            if DTYPE == tl.float32:  # float64 has digits to spare, and no registers
                if not one_piece:  # what rounding took from both logarithms: it would add up from fold to fold
                    v = divide(b, tl.maximum(tl.sum(K * u[:, None], 0), SMALLEST32))
            u, v, row_sums, t, more = rounds_while(
                K, a, b, v, log_u, log_v, t, one_piece, num_iters, tol, history_ptr, N, M, part,
                STOPS, HISTORY == HISTORY_ALL, BLOCK_N, BLOCK_M, CROSSED,
            )  # fmt: skip
            if more:
                grown = log_u + log_weights(u)
                u = tl.exp2(log_weights(u) - (grown - log_u))
                log_u = grown
    plan = K * u[:, None] * v[None, :]
    # Loaded again: kept through the rounds, they would cost registers that a tile of 128 x 128 does not leave.
    a, b, total_a, total_b, has_mass = load_marginals(a_ptr, b_ptr, item, rows, columns, N, M, DTYPE)
    poison += total_a * 0 + total_b * 0
    if part == 0:
        log_u += log_weights(u)
        log_v += log_weights(v)
        if HISTORY == HISTORY_LAST:
            kept_u, kept_v = tl.where(one_piece, u, log_u), tl.where(one_piece, v, log_v)
            store_round(history_ptr, 0, kept_u, kept_v, N, M, part, BLOCK_N, BLOCK_M)
            none_u, none_v = tl.zeros_like(u), tl.zeros_like(v)  # exponents, of which there are none here
            store_round(history_ptr, 1, none_u, none_v, N, M, part, BLOCK_N, BLOCK_M)
        if STOPS and HISTORY == HISTORY_ALL:  # rounds that were not run are zero, not whatever was there
            for rest in range(t, num_iters):
                store_round(history_ptr, rest, tl.zeros_like(u), tl.zeros_like(v), N, M, part, BLOCK_N, BLOCK_M)
        if HISTORY != HISTORY_NONE:
            tl.store(history_ptr - 2, tl.where(one_piece, 1.0, 0.0))
            tl.store(history_ptr - 1, 0.0)
        unit = (1.0 / tl.abs(tl.full((), scale, tl.float64)) * LN2).to(DTYPE)  # f = log2(u) unit
        tl.debug_barrier()
        offset = tl.load(f_ptr + item * N + rows, mask=rows < N, other=0.0) * sign_of(scale, DTYPE)
        f = tl.where(a == 0, float("-inf"), log_u * unit - offset) + poison
        g = tl.where(b == 0, float("-inf"), log_v * unit) + poison
        tl.store(f_ptr + item * N + rows, f, mask=rows < N)
        tl.store(g_ptr + item * M + columns, g, mask=columns < M)
        tl.store(error_ptr + item, tl.sum(tl.abs(row_sums - a)) + poison)
        tl.store(rounds_ptr + item, tl.where(has_mass, t, 0))
        if plan_ptr is not None:
            at, inside = tile_at(rows, columns, M, rows < N, columns < M, BLOCK_N, BLOCK_M)
            tl.store(plan_ptr + item * N * M + at, unflat(plan + poison, BLOCK_N, BLOCK_M), mask=inside)

    if x_out_ptr is not None:
        # The maps are the plan times a factor for each row, for each column: it multiplies what was attended to.
        factor_x, factor_y = tl.full((BLOCK_N,), 1.0, DTYPE), tl.full((BLOCK_M,), 1.0, DTYPE)
        if BARYCENTRIC:
            factor_x, factor_y = 1.0 / tl.where(a == 0, 1.0, a), 1.0 / tl.where(b == 0, 1.0, b)
        first, last = part * part_features, tl.minimum(D, (part + 1) * part_features)
        attend_side(
            plan, factor_x, poison, x_ptr, y_ptr, x_out_ptr, a != 0, b != 0, item, N, M, D, first, last,
            PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        attend_side(
            tl.trans(plan), factor_y, poison, y_ptr, x_ptr, y_out_ptr, b != 0, a != 0, item, M, N, D, first, last,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M"])
def _similarity_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, similarity_ptr, N, M, D, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of rows, block of columns): the similarity [B, N, M], zero at padding."""
    item, row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N, tl.program_id(2) * BLOCK_M
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, columns = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_M)
    live_x, live_y = rows < N, columns < M
    if a_ptr is not None:
        live_x = live_x & (tl.load(a_ptr + item * N + rows, mask=live_x, other=0) != 0)
    if b_ptr is not None:
        live_y = live_y & (tl.load(b_ptr + item * M + columns, mask=live_y, other=0) != 0)
    similarity = token_products(
        x_ptr + (item * N + row) * D, y_ptr + (item * M + column) * D, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M),
        live_x, live_y, D,
        COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    entries = item * N * M + rows[:, None] * M + columns[None, :]
    tl.store(similarity_ptr + entries, similarity, mask=(rows < N)[:, None] & (columns < M)[None, :])
