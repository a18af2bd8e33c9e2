"""Forward: similarity, Sinkhorn-Knopp and both attends, an item's kernel matrix on chip from first round to last.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

import triton
import triton.language as tl

from .rounds import (
    LN2,
    fits_one_piece,
    load_marginals,
    log_kernel,
    log_rounds,
    product,
    scaling_rounds,
    store_round,
    token_products,
)

HISTORY_NONE = tl.constexpr(0)
HISTORY_LAST = tl.constexpr(1)
HISTORY_ALL = tl.constexpr(2)


@triton.jit
def split(tile, LIKE: tl.constexpr):
    """A float32 tile as high + low, each of which tensor cores multiply with LIKE's numbers without rounding it.

    Two bfloat16 hold 16 bits of the tile. With float16 tokens, whose range is too small for weights, both parts are
    tf32, in which float16 is exact. Other dtypes are not split.
    """
    if LIKE == tl.bfloat16:
        high = tile.to(tl.bfloat16)
        low = (tile - high.to(tl.float32)).to(tl.bfloat16)
    elif LIKE == tl.float16:
        high = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = tile - high
    else:
        high = tile
        low = tile
    return high, low


@triton.jit
def dot_split(high, low, tokens, total, PRECISION: tl.constexpr):
    """``total + (high + low) @ tokens``."""
    if tokens.dtype == tl.bfloat16:
        total = product(low, tokens, product(high, tokens, total, PRECISION), PRECISION)
    elif tokens.dtype == tl.float16:
        wide = tokens.to(tl.float32)
        total = product(low, wide, product(high, wide, total, "tf32"), "tf32")
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
    high, low = split(plan, x_ptr.dtype.element_ty)
    features = tl.arange(0, BLOCK_D)
    at_x = item * N * D + rows[:, None] * D + features[None, :]
    at_y = item * M * D + columns[:, None] * D + features[None, :]
    for start in range(first, last, BLOCK_D):
        in_D = (start + features < D)[None, :]
        y = tl.load(y_ptr + at_y + start, mask=live_y[:, None] & in_D, other=0.0)
        x = tl.load(x_ptr + at_x + start, mask=(rows < N)[:, None] & in_D, other=0.0)
        attended = dot_split(high, low, y, tl.zeros((BLOCK_N, BLOCK_D), plan.dtype), PRECISION)
        out = x.to(plan.dtype) + attended * factor[:, None] + poison
        tl.store(out_ptr + at_x + start, out.to(x.dtype), mask=(rows < N)[:, None] & in_D)


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _attend_fwd_kernel(
    x_ptr, y_ptr, similarity_ptr, a_ptr, b_ptr,
    x_out_ptr, y_out_ptr, plan_ptr, similarity_out_ptr, f_ptr, g_ptr, error_ptr, rounds_ptr, history_ptr, state_ptr,
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
    else:
        DTYPE: tl.constexpr = tl.float64 if similarity_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    entries = item * N * M + rows[:, None] * M + columns[None, :]

    a, b, total_a, total_b, has_mass = load_marginals(a_ptr, b_ptr, item, N, M, BLOCK_N, BLOCK_M, DTYPE)
    live = (a != 0)[:, None] & (b != 0)[None, :]
    if similarity_ptr is None:
        similarity, _, _ = token_products(
            x_ptr + item * N * D, y_ptr + item * M * D, a != 0, b != 0, D,
            COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
    else:
        similarity = tl.load(similarity_ptr + entries, mask=live, other=0.0).to(DTYPE)
    if similarity_out_ptr is not None and part == 0:
        tl.store(similarity_out_ptr + entries, similarity, mask=inside)

    L, shift, range_L, poison = log_kernel(similarity, live, scale, DTYPE)
    poison += total_a * 0 + total_b * 0
    one_piece = fits_one_piece(range_L, a, b, DTYPE)
    if HISTORY != HISTORY_NONE:
        history_ptr += item * (num_iters if HISTORY == HISTORY_ALL else 1) * (N + M)
    if one_piece:
        K = tl.exp2(L - shift)
        u, v, row_sums, t = scaling_rounds(
            K, a, b, num_iters, tol, history_ptr, N, M, part, STOPS, HISTORY == HISTORY_ALL, BLOCK_N, BLOCK_M
        )
        plan = K * u[:, None] * v[None, :]
        log_u, log_v = tl.log2(tl.where(u == 0, 1.0, u)) - shift, tl.log2(tl.where(v == 0, 1.0, v))
    else:
        plan, log_u, log_v, row_sums, t = log_rounds(
            L, a, b, num_iters, tol, history_ptr, N, M, part, STOPS, HISTORY == HISTORY_ALL, BLOCK_N, BLOCK_M
        )
        u, v = log_u, log_v
    # Loaded again: kept through the rounds, they would cost registers that a tile of 128 x 128 does not leave.
    a, b, total_a, total_b, has_mass = load_marginals(a_ptr, b_ptr, item, N, M, BLOCK_N, BLOCK_M, DTYPE)
    if part == 0:
        if HISTORY == HISTORY_LAST:
            store_round(history_ptr, 0, u, v, N, M, part, BLOCK_N, BLOCK_M)
        if STOPS and HISTORY == HISTORY_ALL:  # rounds that were not run are zero, not whatever was there
            for rest in range(t, num_iters):
                store_round(history_ptr, rest, tl.zeros_like(u), tl.zeros_like(v), N, M, part, BLOCK_N, BLOCK_M)
        if HISTORY != HISTORY_NONE:
            tl.store(state_ptr + 2 * item, tl.where(one_piece, 1.0, 0.0))
            tl.store(state_ptr + 2 * item + 1, tl.where(one_piece, shift, 0.0))
        unit = (1.0 / tl.abs(tl.full((), scale, tl.float64)) * LN2).to(DTYPE)  # f = log2(u) unit
        f = tl.where(a == 0, float("-inf"), log_u * unit) + poison
        g = tl.where(b == 0, float("-inf"), log_v * unit) + poison
        tl.store(f_ptr + item * N + rows, f, mask=rows < N)
        tl.store(g_ptr + item * M + columns, g, mask=columns < M)
        tl.store(error_ptr + item, tl.sum(tl.abs(row_sums - a)) + poison)
        tl.store(rounds_ptr + item, tl.where(has_mass, t, 0))
        if plan_ptr is not None:
            tl.store(plan_ptr + entries, plan + poison, mask=inside)

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
    similarity, _, _ = token_products(
        x_ptr + (item * N + row) * D, y_ptr + (item * M + column) * D, live_x, live_y, D,
        COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    entries = item * N * M + rows[:, None] * M + columns[None, :]
    tl.store(similarity_ptr + entries, similarity, mask=(rows < N)[:, None] & (columns < M)[None, :])
