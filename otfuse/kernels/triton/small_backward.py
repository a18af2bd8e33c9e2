"""Many small costs, backward: from the gradients of plan and potentials to those of costs and weights.

What is differentiated stands in docs/gradients.md (Eq. 4, or Eq. 7 for the fixed point). The history holds the column
scalings that a round began with; what else a round made is made again from them. Letters and layout as in ``small.py``.
"""

import triton
import triton.language as tl

from .constants import IMPLICIT, LEAST, UNROLL
from .rounds import divide, inverse, load_or_zero, load_passed, small_enough
from .small import column_sums, entries_at, is_any, load_marginals, log_kernel, row_sums


@triton.jit
def load_kept(history_ptr, place, first_v, first, left, B, M, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr):
    """Of each item the column scalings at its ``place`` [ITEMS] of the history, ``first_v`` at places below zero."""
    columns, lanes = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, ITEMS)[None, :]
    at = (2 + place[None, :] * M + columns).to(tl.int64) * B + first + lanes
    inside = (columns < M) & (lanes < left)
    v = tl.load(history_ptr + at, mask=inside & (place >= 0)[None, :], other=0.0)
    return tl.where((place < 0)[None, :], first_v, v)


@triton.jit
def softmaxes(L, live, log_a, log_v):
    """What a round in logarithms makes of log_v: exp2(L + log_u + log_v) with the log_v before, rows divided by their
    sums; and with the log_v after it, columns divided by theirs. Zero at padding."""
    by_rows = L + log_v[None, :, :]
    largest = tl.max(by_rows, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    by_rows = tl.exp2(by_rows - largest[:, None, :])
    sums = tl.sum(by_rows, 1)
    by_rows *= inverse(sums)[:, None, :]
    by_columns = L + (log_a - largest - tl.log2(tl.where(sums == 0, 1.0, sums)))[:, None, :]
    largest = tl.max(by_columns, 0)
    by_columns = tl.exp2(by_columns - tl.where(largest == float("-inf"), 0.0, largest)[None, :, :])
    by_columns *= inverse(tl.sum(by_columns, 0))[None, :, :]
    return tl.where(live, by_rows, 0.0), tl.where(live, by_columns, 0.0)


@triton.jit
def unroll_scaling(
    K, H, a, b, d_log_u, d_log_v, num_rounds, history_ptr, first, left, B, M,
    STOPS: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Adjoint of ``scaling_rounds``. The gradient of the log kernel is K H; H comes in with what the plan adds."""
    inverse_a, inverse_b = inverse(a), inverse(b)
    grad_a, grad_b = tl.zeros_like(a), tl.zeros_like(b)
    first_v = tl.where(b == 0, 0.0, 1.0).to(K.dtype)
    t = tl.max(num_rounds, 0) - 1
    while t >= 0:
        place = tl.zeros((ITEMS,), tl.int32) + (t - 1)
        v_before = load_kept(history_ptr, place, first_v, first, left, B, M, BLOCK_M, ITEMS)
        u = divide(a, row_sums(K, v_before))
        v = divide(b, column_sums(K, u))
        if STOPS:  # nothing comes of a round that an item did not run
            ran = (t < num_rounds)[None, :]
            u, v, v_before = tl.where(ran, u, 0.0), tl.where(ran, v, 0.0), tl.where(ran, v_before, 0.0)
            grad_b += tl.where(ran, d_log_v, 0.0)
        else:
            grad_b += d_log_v
        pull_v = d_log_v * v * inverse_b
        d_log_u -= u * row_sums(K, pull_v)
        H -= u[:, None, :] * pull_v[None, :, :]
        pull_u = d_log_u * u * inverse_a
        new_d_log_v = -v_before * column_sums(K, pull_u)
        H -= pull_u[:, None, :] * v_before[None, :, :]
        if STOPS:
            grad_a += tl.where(ran, d_log_u, 0.0)
            d_log_u, d_log_v = tl.where(ran, 0.0, d_log_u), tl.where(ran, new_d_log_v, d_log_v)
        else:
            grad_a += d_log_u
            d_log_u, d_log_v = tl.zeros_like(d_log_u), new_d_log_v
        t -= 1
    return K * H, grad_a * inverse_a, grad_b * inverse_b


@triton.jit
def unroll_log(
    L, live, G, a, b, d_log_u, d_log_v, num_rounds, history_ptr, first, left, B, M,
    STOPS: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Adjoint of ``log_rounds``. G, the gradient of the log kernel, comes in with what the plan adds."""
    grad_a, grad_b = tl.zeros_like(a), tl.zeros_like(b)
    log_a = tl.log2(tl.where(a == 0, 1.0, a))
    t = tl.max(num_rounds, 0) - 1
    while t >= 0:
        place = tl.zeros((ITEMS,), tl.int32) + (t - 1)
        log_v_before = load_kept(history_ptr, place, tl.zeros_like(b), first, left, B, M, BLOCK_M, ITEMS)
        by_rows, by_columns = softmaxes(L, live, log_a, log_v_before)
        if STOPS:
            ran = (t < num_rounds)[None, :]
            pull_v = tl.where(ran, d_log_v, 0.0)
        else:
            pull_v = d_log_v
        grad_b += pull_v
        pulled = by_columns * pull_v[None, :, :]
        G -= pulled
        new_d_log_u = d_log_u - tl.sum(pulled, 1)
        if STOPS:
            pull_u = tl.where(ran, new_d_log_u, 0.0)
        else:
            pull_u = new_d_log_u
        grad_a += pull_u
        pulled = by_rows * pull_u[:, None, :]
        G -= pulled
        if STOPS:
            d_log_u, d_log_v = tl.where(ran, 0.0, d_log_u), tl.where(ran, -tl.sum(pulled, 0), d_log_v)
        else:
            d_log_u, d_log_v = tl.zeros_like(d_log_u), -tl.sum(pulled, 0)
        t -= 1
    return G, grad_a * inverse(a), grad_b * inverse(b)


@triton.jit
def implicit(plan, d_log_u, d_log_v, BLOCK_M: tl.constexpr):
    """Adjoint of the fixed point, as in ``attend_backward.py``, of each item until its own residual is small."""
    rows, columns = tl.sum(plan, 1), tl.sum(plan, 0)
    inverse_r, inverse_c = inverse(rows), inverse(columns)
    rounding = 2.2e-16 if plan.dtype == tl.float64 else 1.2e-7
    residual = d_log_v - column_sums(plan, d_log_u * inverse_r)
    mu = tl.zeros_like(d_log_v)
    direction = residual * inverse_c
    product = tl.sum(residual * direction, 0)
    largest = tl.max(columns, 0)
    enough = small_enough(product, tl.min(tl.where(columns > 0, columns, largest[None, :]), 0), largest)
    active = product > enough
    step = 0
    while (step < 4 * BLOCK_M + 50) & is_any(active):
        lift = tl.sum(columns * direction, 0)
        mapped = column_sums(plan, inverse_r * row_sums(plan, direction))
        # A plan that is nearly a permutation leaves nothing but roundings, which the ridge of ten covers.
        mapped = columns * ((1 + 10 * rounding) * direction + lift[None, :]) - mapped
        length = tl.where(active, product / tl.sum(direction * mapped, 0), 0.0)
        mu += tl.where(active[None, :], length[None, :] * direction, 0.0)
        residual -= tl.where(active[None, :], length[None, :] * mapped, 0.0)
        scaled = residual * inverse_c
        new_product = tl.sum(residual * scaled, 0)
        direction = tl.where(active[None, :], scaled + (new_product / product)[None, :] * direction, direction)
        product = tl.where(active, new_product, product)
        active = active & (product > enough)
        step += 1
    return inverse_r * (d_log_u - row_sums(plan, mu)), mu


@triton.jit
def store_weight_gradient(
    grad_ptr, ptr, grad, weights, total, poison, first, left, size, step, BLOCK: tl.constexpr, ITEMS: tl.constexpr
):  # fmt: skip
    """As attend_backward.store_weight_gradient."""
    index, lanes = tl.arange(0, BLOCK)[:, None], tl.arange(0, ITEMS)[None, :]
    at, inside = first * size + (lanes * size + index * step), (index < size) & (lanes < left)
    passed = load_passed(ptr, at, inside, weights.dtype)
    largest = tl.max(passed, 0)[None, :]
    largest = tl.where(largest == 0, 1.0, largest)
    grad = tl.where(weights == 0, 0.0, grad)
    grad = (grad - tl.sum(grad * weights, 0)[None, :]) / total[None, :]
    grad = tl.where(passed / largest < LEAST, 0.0, grad.to(passed.dtype) / largest)
    grad = tl.where(weights == 0, 0.0, grad + poison[None, :])
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "N", "M", "step"])
def _small_bwd_kernel(
    cost_ptr, a_ptr, b_ptr, rounds_ptr, history_ptr, grad_plan_ptr, grad_f_ptr, grad_g_ptr,
    grad_cost_ptr, grad_a_ptr, grad_b_ptr, B, N, M, step, scale: tl.float64, unit: tl.float64,
    STOPS: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Programs as in the forward. A gradient that comes in as None is zero; one that goes out as None is not wanted."""
    DTYPE: tl.constexpr = tl.float64 if cost_ptr.dtype.element_ty == tl.float64 else tl.float32
    if EXACT:
        N, M, step = BLOCK_N, BLOCK_M, 1
    first = tl.program_id(0).to(tl.int64) * ITEMS
    left = tl.minimum(B - first, ITEMS).to(tl.int32)
    lanes = tl.arange(0, ITEMS)
    n, m = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[:, None]
    a, b, total_a, total_b, _has_mass = load_marginals(
        a_ptr, b_ptr, first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS, DTYPE
    )
    live_x, live_y = a != 0, b != 0
    live = live_x[:, None, :] & live_y[None, :, :]
    at, inside = entries_at(first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS)
    L, _offset, poison = log_kernel(cost_ptr, at, inside, live, scale, DTYPE)
    poison += total_a * 0 + total_b * 0
    G = tl.zeros((BLOCK_N, BLOCK_M, ITEMS), DTYPE)
    grad_a, grad_b = tl.zeros_like(a), tl.zeros_like(b)
    if MODE == UNROLL or MODE == IMPLICIT:
        one_piece = tl.load(history_ptr + first + lanes, mask=lanes < left, other=1.0) != 0
        num_rounds = tl.load(rounds_ptr + first + lanes, mask=lanes < left, other=0)
        place = num_rounds - 2 if MODE == UNROLL else tl.where(num_rounds > 1, 0, -1)
        first_v = tl.where(one_piece[None, :] & live_y, 1.0, 0.0).to(DTYPE)
        v = load_kept(history_ptr, place, first_v, first, left, B, M, BLOCK_M, ITEMS)
        unit = tl.full((), unit, tl.float64).to(DTYPE)  # f = log(u) unit
        exists = (lanes < left)[None, :]  # uniform weights are those of items beyond the last as well
        sent_x = unit * load_or_zero(grad_f_ptr, first * N + (lanes[None, :] * N + n * step), live_x & exists, DTYPE)
        sent_y = unit * load_or_zero(grad_g_ptr, first * M + (lanes[None, :] * M + m * step), live_y & exists, DTYPE)
        grad_plan = load_or_zero(grad_plan_ptr, at, live & inside, DTYPE)

        # The last round again, then back from it: in scalings, and where the program has such items in logarithms.
        K = tl.where(live, tl.exp2(L + poison[None, None, :]), 1.0)
        u = divide(a, row_sums(K, v))
        outer = u[:, None, :] * divide(b, column_sums(K, u))[None, :, :]
        plan = tl.where(live, K * outer, 0.0)
        has_others = is_any(~one_piece)
        if MODE == UNROLL:
            weighed, run = grad_plan * plan, tl.where(one_piece, num_rounds, 0)
            G, grad_a, grad_b = unroll_scaling(
                K, grad_plan * outer, a, b, tl.sum(weighed, 1) + sent_x, tl.sum(weighed, 0) + sent_y, run, history_ptr,
                first, left, B, M, STOPS, BLOCK_M, ITEMS,
            )  # fmt: skip
        if has_others:
            log_a = tl.log2(tl.where(live_x, a, 1.0))
            _by_rows, by_columns = softmaxes(L, live, log_a, v)
            other_plan = by_columns * b[None, :, :]
            plan = tl.where(one_piece[None, None, :], plan, other_plan)
            if MODE == UNROLL:
                weighed = grad_plan * other_plan
                other_G, other_a, other_b = unroll_log(
                    L, live, weighed, a, b, tl.sum(weighed, 1) + sent_x, tl.sum(weighed, 0) + sent_y,
                    tl.where(one_piece, 0, num_rounds), history_ptr, first, left, B, M, STOPS, BLOCK_M, ITEMS,
                )  # fmt: skip
                G = tl.where(one_piece[None, None, :], G, other_G)
                grad_a = tl.where(one_piece[None, :], grad_a, other_a)
                grad_b = tl.where(one_piece[None, :], grad_b, other_b)
        if MODE == IMPLICIT:
            G = grad_plan * plan
            grad_a, grad_b = implicit(plan, tl.sum(G, 1) + sent_x, tl.sum(G, 0) + sent_y, BLOCK_M)
            G -= plan * (grad_a[:, None, :] + grad_b[None, :, :])
    if grad_a_ptr is not None:
        store_weight_gradient(grad_a_ptr, a_ptr, grad_a, a, total_a, poison, first, left, N, step, BLOCK_N, ITEMS)
    if grad_b_ptr is not None:
        store_weight_gradient(grad_b_ptr, b_ptr, grad_b, b, total_b, poison, first, left, M, step, BLOCK_M, ITEMS)
    grad = tl.where(live, G, 0.0) * tl.full((), scale, tl.float64).to(DTYPE) + poison[None, None, :]
    tl.store(grad_cost_ptr + at, grad.to(cost_ptr.dtype.element_ty), mask=inside)
