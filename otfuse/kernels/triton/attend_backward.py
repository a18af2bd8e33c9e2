"""Backward: from the gradients of all outputs to those of tokens (or costs) and weights, an item on chip.

The rounds are differentiated in reverse from the history of the scalings, as docs/gradients.md has it (Eq. 4), or the
fixed point is, by conjugate gradients (Eq. 7). The N x M history is never formed: what a round adds to the gradient
of the log kernel is of rank two, and is added to a tile that stays in registers.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

import triton
import triton.language as tl

from .attend import dot_split, split
from .constants import DETACH, LAST_ROWS, LEAST, UNROLL
from .places import wide
from .rounds import (
    column_sums,
    cosines,
    crossed,
    inverse,
    load_marginals,
    load_or_zero,
    load_passed,
    load_round,
    log_kernel,
    log_weights,
    small_enough,
    tile_product,
)


@triton.jit
def unroll_scaling(
    K, H, d_log_u, d_log_v, inverse_a, inverse_b, num_rounds, history_ptr, N, M,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CROSSED: tl.constexpr,
):  # fmt: skip
    """Adjoint of ``rounds_while``, in one piece. The log kernel's gradient is K H; H holds what the plan adds."""
    grad_a, grad_b = tl.zeros_like(inverse_a), tl.zeros_like(inverse_b)
    t = num_rounds - 1
    u, v = load_round(history_ptr, tl.maximum(t, 0), N, M, BLOCK_N, BLOCK_M)
    while t >= 0:
        u_before, v_before = load_round(history_ptr, tl.maximum(t - 1, 0), N, M, BLOCK_N, BLOCK_M)
        if t == 0:
            v_before = tl.where(inverse_b == 0, 0.0, 1.0).to(K.dtype)
        pull_v = d_log_v * v * inverse_b
        grad_b += d_log_v
        d_log_u -= u * tl.sum(K * pull_v[None, :], 1)
        H -= u[:, None] * pull_v[None, :]
        pull_u = d_log_u * u * inverse_a
        grad_a += d_log_u
        d_log_v = -v_before * column_sums(K * pull_u[:, None], CROSSED)
        H -= pull_u[:, None] * v_before[None, :]
        d_log_u = tl.zeros_like(d_log_u)
        u, v = u_before, v_before
        t -= 1
    return K * H, grad_a * inverse_a, grad_b * inverse_b


@triton.jit
def unroll_log(
    L, G, d_log_u, d_log_v, inverse_a, inverse_b, num_rounds, history_ptr, N, M,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adjoint of the rounds in logarithms. G, the gradient of the log kernel, comes in with what the plan adds.

    The history is rounded where logarithms are large. Entries of a plan made from it are therefore divided by their
    own sums, not by the marginals that those would be.
    """
    grad_a, grad_b = tl.zeros_like(inverse_a), tl.zeros_like(inverse_b)
    log_a, log_b = -log_weights(inverse_a), -log_weights(inverse_b)  # sums near one, however small the weights
    t = num_rounds - 1
    log_u, log_v = load_round(history_ptr, tl.maximum(t, 0), N, M, BLOCK_N, BLOCK_M)
    while t >= 0:
        log_u_before, log_v_before = load_round(history_ptr, tl.maximum(t - 1, 0), N, M, BLOCK_N, BLOCK_M)
        if t == 0:
            log_v_before = tl.zeros_like(log_v)
        plan = tl.exp2((L + log_u[:, None]) + (log_v - log_b)[None, :])
        pulled = plan * (d_log_v * inverse(tl.sum(plan, 0)))[None, :]
        grad_b += d_log_v
        d_log_u -= tl.sum(pulled, 1)
        G -= pulled
        plan = tl.exp2((L + (log_u - log_a)[:, None]) + log_v_before[None, :])
        pulled = plan * (d_log_u * inverse(tl.sum(plan, 1)))[:, None]
        grad_a += d_log_u
        d_log_v = -tl.sum(pulled, 0)
        G -= pulled
        d_log_u = tl.zeros_like(d_log_u)
        log_u, log_v = log_u_before, log_v_before
        t -= 1
    return G, grad_a * inverse_a, grad_b * inverse_b


@triton.jit
def implicit(plan, d_log_u, d_log_v, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr):
    """Adjoint of the fixed point: the gradients lambda, mu of the log weights' sums (docs/gradients.md, Eqs. 5, 7).

    Conjugate gradients for the columns, rows eliminated, preconditioned by the column sums c; ``c cᵀ`` lifts the
    direction of constants, along which the system is singular, and centres the answer.
    """
    row_sums, column_sums = tl.sum(plan, 1), tl.sum(plan, 0)
    inverse_r, inverse_c = inverse(row_sums), inverse(column_sums)
    rounding = 2.2e-16 if DTYPE == tl.float64 else 1.2e-7
    residual = d_log_v - tl.sum(plan * (d_log_u * inverse_r)[:, None], 0)
    mu = tl.zeros((BLOCK_M,), DTYPE)
    direction = residual * inverse_c
    product = tl.sum(residual * direction)
    largest = tl.max(column_sums)
    enough = small_enough(product, tl.min(tl.where(column_sums > 0, column_sums, largest)), largest)
    step = 0
    while (step < 4 * BLOCK_M + 50) & (product > enough):
        lift = tl.sum(column_sums * direction)
        mapped = tl.sum(plan * (inverse_r * tl.sum(plan * direction[None, :], 1))[:, None], 0)
        # A plan that is nearly a permutation leaves nothing but roundings, which the ridge of ten covers.
        mapped = column_sums * ((1 + 10 * rounding) * direction + lift) - mapped
        length = product / tl.sum(direction * mapped)
        mu += length * direction
        residual -= length * mapped
        scaled = residual * inverse_c
        new_product = tl.sum(residual * scaled)
        direction = scaled + new_product / product * direction
        product = new_product
        step += 1
    return inverse_r * (d_log_u - tl.sum(plan * mu[None, :], 1)), mu


@triton.jit
def store_weight_gradient(grad_ptr, ptr, grad, weights, total, poison, item, size, BLOCK: tl.constexpr):
    """Through the divisions by the sum and by the largest, which is a constant; weights that are zero (padding) or were
    raised to LEAST get no gradient."""
    index = tl.arange(0, BLOCK)
    passed = load_passed(ptr, item * size + index, index < size, weights.dtype)
    largest = tl.max(passed)
    grad = (grad - tl.sum(grad * weights)) / total
    grad = grad.to(passed.dtype) / tl.where(largest == 0, 1.0, largest)
    grad = tl.where(passed / tl.where(largest == 0, 1.0, largest) < LEAST, 0.0, grad)
    grad = tl.where(weights == 0, 0.0, grad + poison)
    tl.store(grad_ptr + item * size + index, grad.to(grad_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def pull_side(
    plan, C, pull, inverse_x, x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_x_ptr, live_x, live_y, item, N, M, D,
    first, last, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``grad_x = grad_x_out + plan grad_y_out + inverse_x (C y - pull x)``, features first … last - 1.

    Inverse norms, or None, come last: two of them multiplied may be no number.

    At padding there is nothing but the residual's own gradient, even if the item is NaN: packed tokens stand there that
    belong to another item.
    """
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at_x = item * N * D + rows[:, None] * D + features[None, :]
    at_y = item * M * D + columns[:, None] * D + features[None, :]
    plan_high, plan_low, plan_unit = split(plan, x_ptr.dtype.element_ty)
    C_high, C_low, C_unit = split(C, x_ptr.dtype.element_ty)
    for start in range(first, last, BLOCK_D):
        in_D = (start + features < D)[None, :]
        x = tl.load(x_ptr + at_x + start, mask=live_x[:, None] & in_D, other=0.0)
        y = tl.load(y_ptr + at_y + start, mask=live_y[:, None] & in_D, other=0.0)
        grad = dot_split(C_high, C_low, C_unit, y, -pull[:, None] * x.to(plan.dtype), PRECISION)
        if inverse_x is not None:
            grad *= inverse_x[:, None]
        if grad_y_out_ptr is not None:
            grad_y_out = tl.load(grad_y_out_ptr + at_y + start, mask=live_y[:, None] & in_D, other=0.0)
            grad = dot_split(plan_high, plan_low, plan_unit, grad_y_out, grad, PRECISION)
        grad = tl.where(live_x[:, None], grad, 0.0)
        if grad_x_out_ptr is not None:
            grad += tl.load(grad_x_out_ptr + at_x + start, mask=(rows < N)[:, None] & in_D, other=0.0).to(plan.dtype)
        tl.store(grad_x_ptr + at_x + start, grad.to(x.dtype), mask=(rows < N)[:, None] & in_D)


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _attend_bwd_kernel(
    x_ptr, y_ptr, cost_ptr, a_ptr, b_ptr, rounds_ptr, history_ptr,
    grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr, grad_similarity_ptr, grad_f_ptr, grad_g_ptr,
    grad_x_ptr, grad_y_ptr, grad_cost_ptr, grad_a_ptr, grad_b_ptr,
    N, M, D, part_features, scale: tl.float64, num_iters,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, part), as in the forward: part p writes its own features of grad_x and grad_y.

    With ``cost_ptr`` there are no tokens. A gradient that comes in as None is zero; one that goes out as None is not
    wanted.
    """
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if cost_ptr is None:
        DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        CROSSED: tl.constexpr = crossed(x_ptr.dtype.element_ty, BLOCK_N, BLOCK_M)
    else:
        CROSSED: tl.constexpr = 0
        DTYPE: tl.constexpr = tl.float64 if cost_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    entries = item * N * M + rows[:, None] * M + columns[None, :]
    a, b, total_a, total_b, _ = load_marginals(a_ptr, b_ptr, item, rows, columns, N, M, DTYPE)
    live_x, live_y = a != 0, b != 0
    live = live_x[:, None] & live_y[None, :]
    inverse_a, inverse_b = inverse(a), inverse(b)

    # One pass over the tokens: their products, and those with the gradients of what was attended to.
    TILE: tl.constexpr = (BLOCK_M, BLOCK_N) if CROSSED != 0 else (BLOCK_N, BLOCK_M)  # as in token_products
    from_x, from_y = tl.zeros(TILE, DTYPE), tl.zeros(TILE, DTYPE)
    inverse_x, inverse_y = tl.full((BLOCK_N,), 1.0, DTYPE), tl.full((BLOCK_M,), 1.0, DTYPE)
    if cost_ptr is None:
        similarity = tl.zeros(TILE, DTYPE)
        square_x, square_y = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
        at_x = item * N * D + rows[:, None] * D + features[None, :]
        at_y = item * M * D + columns[:, None] * D + features[None, :]
        for start in range(0, D, BLOCK_D):
            mask_x = live_x[:, None] & (start + features < D)[None, :]
            mask_y = live_y[:, None] & (start + features < D)[None, :]
            x = tl.load(x_ptr + at_x + start, mask=mask_x, other=0.0)
            y = tl.load(y_ptr + at_y + start, mask=mask_y, other=0.0)
            similarity = tile_product(x, y, similarity, CROSSED, PRECISION)
            if COSINE:
                square_x += tl.sum(x.to(DTYPE) * x.to(DTYPE), 1)
                square_y += tl.sum(y.to(DTYPE) * y.to(DTYPE), 1)
            if grad_x_out_ptr is not None:
                grad_x_out = tl.load(grad_x_out_ptr + at_x + start, mask=mask_x, other=0.0)
                from_x = tile_product(grad_x_out, y, from_x, CROSSED, PRECISION)
            if grad_y_out_ptr is not None:
                grad_y_out = tl.load(grad_y_out_ptr + at_y + start, mask=mask_y, other=0.0)
                from_y = tile_product(x, grad_y_out, from_y, CROSSED, PRECISION)
        if CROSSED != 0:
            similarity, from_x, from_y = tl.trans(similarity), tl.trans(from_x), tl.trans(from_y)
        if COSINE:
            similarity, inverse_x, inverse_y = cosines(
                similarity, square_x, square_y, x_ptr + item * N * D, y_ptr + item * M * D, rows, columns,
                live_x, live_y, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
    else:
        similarity = tl.load(cost_ptr + entries, mask=live, other=0.0).to(DTYPE)

    L, _, _, poison = log_kernel(similarity, live, scale, DTYPE)
    poison += total_a * 0 + total_b * 0
    history_ptr += item * (2 + wide(num_iters if MODE == UNROLL else LAST_ROWS) * (N + M)) + 2
    one_piece = tl.load(history_ptr - 2) != 0
    num_rounds = tl.load(rounds_ptr + item)
    last = tl.maximum(num_rounds - 1, 0) if MODE == UNROLL else 0
    u, v = load_round(history_ptr, last, N, M, BLOCK_N, BLOCK_M)
    if one_piece:
        plan = tl.exp2(L) * u[:, None] * v[None, :]
    else:
        plan = tl.exp2((L + u[:, None]) + v[None, :])
        plan *= (b * inverse(tl.sum(plan, 0)))[None, :]  # the history is rounded, but the columns came last

    grad_a, grad_b = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
    grad_plan = from_x + from_y
    if BARYCENTRIC:
        grad_plan = from_x * inverse_a[:, None] + from_y * inverse_b[None, :]
    G = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    if MODE != DETACH:
        if grad_plan_ptr is not None:
            grad_plan += tl.load(grad_plan_ptr + entries, mask=live, other=0.0).to(DTYPE)
        unit = (1.0 / tl.abs(tl.full((), scale, tl.float64))).to(DTYPE)  # f = log(u) / |scale|
        G = grad_plan * plan
        d_log_u = tl.sum(G, 1) + unit * load_or_zero(grad_f_ptr, item * N + rows, live_x, DTYPE)
        d_log_v = tl.sum(G, 0) + unit * load_or_zero(grad_g_ptr, item * M + columns, live_y, DTYPE)
        if MODE == UNROLL:
            if one_piece:
                H = grad_plan * u[:, None] * v[None, :]
                G, grad_a, grad_b = unroll_scaling(
                    tl.exp2(L), H, d_log_u, d_log_v, inverse_a, inverse_b, num_rounds, history_ptr, N, M,
                    BLOCK_N, BLOCK_M, CROSSED,
                )  # fmt: skip
            else:
                G, grad_a, grad_b = unroll_log(
                    L, G, d_log_u, d_log_v, inverse_a, inverse_b, num_rounds, history_ptr, N, M, BLOCK_N, BLOCK_M
                )
        else:
            grad_a, grad_b = implicit(plan, d_log_u, d_log_v, BLOCK_N, BLOCK_M, DTYPE)
            G -= plan * (grad_a[:, None] + grad_b[None, :])
    if BARYCENTRIC:
        grad_a -= tl.sum(from_x * plan, 1) * inverse_a * inverse_a
        grad_b -= tl.sum(from_y * plan, 0) * inverse_b * inverse_b
    if part == 0:
        if grad_a_ptr is not None:
            store_weight_gradient(grad_a_ptr, a_ptr, grad_a, a, total_a, poison, item, N, BLOCK_N)
        if grad_b_ptr is not None:
            store_weight_gradient(grad_b_ptr, b_ptr, grad_b, b, total_b, poison, item, M, BLOCK_M)

    grad = G * tl.full((), scale, tl.float64).to(DTYPE) + poison
    if cost_ptr is not None:
        inside = (rows < N)[:, None] & (columns < M)[None, :]
        tl.store(grad_cost_ptr + entries, grad.to(cost_ptr.dtype.element_ty), mask=inside)
    else:
        if grad_similarity_ptr is not None:
            grad += tl.load(grad_similarity_ptr + entries, mask=live, other=0.0).to(DTYPE)
        pull_x, pull_y = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
        if COSINE:
            weighed = grad * similarity
            pull_x, pull_y = tl.sum(weighed, 1) * inverse_x, tl.sum(weighed, 0) * inverse_y
        plan_x, plan_y = plan, plan
        if BARYCENTRIC:
            plan_x, plan_y = plan * inverse_b[None, :], plan * inverse_a[:, None]
        first, end = part * part_features, tl.minimum(D, (part + 1) * part_features)
        pull_side(
            plan_x, grad * inverse_y[None, :] if COSINE else grad, pull_x, inverse_x if COSINE else None,
            x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_x_ptr,
            live_x, live_y, item, N, M, D, first, end, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        pull_side(
            tl.trans(plan_y), tl.trans(grad * inverse_x[:, None] if COSINE else grad), pull_y,
            inverse_y if COSINE else None, y_ptr, x_ptr, grad_y_out_ptr, grad_x_out_ptr, grad_y_ptr,
            live_y, live_x, item, M, N, D, first, end, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
