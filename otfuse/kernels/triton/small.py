"""Many small costs: several items a program, each in the registers of one thread or a few, forward.

Letters: B batch, N rows and M columns of an item, padded to BLOCK_N and BLOCK_M; ITEMS of them in a program. Tiles are
[BLOCK_N, BLOCK_M, ITEMS], items last: Triton deals the lanes of a warp to the last dimension first, so with 32 items
to a warp a thread holds an item whole, and no sum of a round crosses threads.

The forms are those of ``rounds.py``, chosen for each item: scalings of one kernel, or logarithms, which here are folded
into the kernel in every round. A program runs its second form only if an item of its needs it; an item's result comes
from its own form alone, whatever its neighbours take.

At padding K is one and a scaling zero: no sum is zero but in an item without mass, which is cleared at the end.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .constants import HISTORY_ALL, HISTORY_LAST, HISTORY_NONE
from .rounds import (
    INTERPRETED,
    LN2,
    SMALLEST32,
    below,
    divide,
    exp2_of,
    fits_scalings,
    half_round,
    load_passed,
    log_entries,
    log_scale,
    log_weights,
    offsets,
    over_largest,
    sign_of,
    spread,
)

# The items of a program whose threads hold one each, and the most entries that these have (HELD of the launcher).
WARP = tl.constexpr(32)
WHOLE = tl.constexpr(32)


@triton.jit
def load_weights(ptr, at, inside, DTYPE: tl.constexpr):
    """Weights [BLOCK, ITEMS] over their largest, zero beyond the item, and their sums. None is one each, a mask one or
    zero."""
    if ptr is None:
        weights = tl.where(inside, 1.0, 0.0).to(DTYPE)
    else:
        passed = load_passed(ptr, at, inside, DTYPE)
        weights = over_largest(passed, tl.max(passed, 0)[None, :]).to(DTYPE)
    return weights, tl.sum(weights, 0)


@triton.jit
def load_marginals(
    a_ptr, b_ptr, first, left, N, M, step,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Both marginals, summing to one; what they were divided by after their largest; which items have mass: others are
    zero on both sides.

    Of uniform ones what they were divided by is one.
    """
    lanes = tl.arange(0, ITEMS)[None, :]
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[:, None]
    if a_ptr is None and b_ptr is None:
        # Every item's alike, so that the conditions on them are, and where EXACT known to the compiler.
        one = tl.full((ITEMS,), 1.0, DTYPE)
        a = tl.where(rows < N, 1 / tl.full((1, ITEMS), N, DTYPE), 0.0)
        b = tl.where(columns < M, 1 / tl.full((1, ITEMS), M, DTYPE), 0.0)
        return a, b, one, one, one != 0
    a, total_a = load_weights(a_ptr, first * N + (lanes * N + rows * step), (rows < N) & (lanes < left), DTYPE)
    b, total_b = load_weights(b_ptr, first * M + (lanes * M + columns * step), (columns < M) & (lanes < left), DTYPE)
    has_mass = (total_a != 0) & (total_b != 0)
    total_a, total_b = tl.where(has_mass, total_a, 1.0), tl.where(has_mass, total_b, 1.0)
    a = tl.where((a != 0) & has_mass[None, :], a / total_a[None, :], 0.0)
    b = tl.where((b != 0) & has_mass[None, :], b / total_b[None, :], 0.0)
    return a, b, total_a, total_b, has_mass


@triton.jit
def entries_at(first, left, N, M, step, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr):
    """Offsets of the items' entries [BLOCK_N, BLOCK_M, ITEMS], and which of them exist.

    ``step`` is one. Where the compiler does not know that, it sees no neighbours among the entries of an item, and
    leaves the item to its thread; where it does, N and M are known too, and a thread reads several entries at once.
    """
    rows, columns = tl.arange(0, BLOCK_N)[:, None, None], tl.arange(0, BLOCK_M)[None, :, None]
    lanes = tl.arange(0, ITEMS)[None, None, :]
    inside = (rows < N) & (columns < M) & (lanes < left)
    return first * (N * M) + (lanes * (N * M) + (rows * M + columns * step)), inside


@triton.jit
def log_kernel(cost_ptr, at, inside, live, scale, DTYPE: tl.constexpr):
    """L as rounds.log_kernel has it; the smallest cost of each row; and per item zero or, if any entry is not finite,
    NaN.

    All entries ``inside`` are read: with a mask made of weights a thread would read them one by one.
    """
    high, low = log_scale(scale, DTYPE)
    cost = tl.load(cost_ptr + at, mask=inside, other=0.0).to(DTYPE)
    cost = tl.where(live, cost, 0.0)
    poison = tl.sum(row_sums(cost, tl.zeros((cost.shape[1], cost.shape[2]), DTYPE)), 0)
    sign = sign_of(scale, DTYPE)
    offset = offsets(tl.max(tl.where(live, cost * sign, float("-inf")), 1)) * sign
    L = log_entries(below(cost, offset[:, None, :]), high, low)
    return tl.where(live, L, float("-inf")), offset, poison


@triton.jit
def in_scalings(L, live, a, b, a_ptr, b_ptr, has_mass, DTYPE: tl.constexpr):
    """Which items may be solved in scalings; those without mass may."""
    entries = -tl.min(tl.min(tl.where(live, L, 0.0), 1), 0) * LN2
    with_weights = entries
    if a_ptr is not None:
        with_weights += spread(a)
    if b_ptr is not None:
        with_weights += spread(b)
    return fits_scalings(entries, with_weights, DTYPE) | ~has_mass


@triton.jit
def add_products(sums, K, v):
    """``sums`` [R, ITEMS], or None, and the products over S of K [R, ITEMS, S] and v [1, ITEMS, S], added one by one.

    So every addition but one is half a multiply-add. ``tl.sum`` adds in a tree, where half of them are not.
    """
    R: tl.constexpr = K.shape[0]
    ITEMS: tl.constexpr = K.shape[1]
    HALF: tl.constexpr = K.shape[2] // 2
    if HALF == 0:
        products = tl.reshape(K * v, (R, ITEMS))
        sums = products if sums is None else sums + products
    else:
        K_even, K_odd = tl.split(tl.reshape(K, (R, ITEMS, HALF, 2)))
        v_even, v_odd = tl.split(tl.reshape(v, (1, ITEMS, HALF, 2)))
        sums = add_products(add_products(sums, K_even, v_even), K_odd, v_odd)
    return sums


@triton.constexpr_function
def is_whole(shape):
    """Whether a thread holds an item of a tile whole: where a sum crosses threads, ``tl.sum`` is the way."""
    return shape[2] == WARP.value and shape[0] * shape[1] <= WHOLE.value


@triton.jit
def row_sums(K, v):
    if is_whole(K.shape):
        sums = add_products(None, tl.permute(K, (0, 2, 1)), tl.permute(v, (1, 0))[None, :, :])
    else:
        sums = tl.sum(K * v[None, :, :], 1)
    return sums


@triton.jit
def column_sums(K, u):
    if is_whole(K.shape):
        sums = add_products(None, tl.permute(K, (1, 2, 0)), tl.permute(u, (1, 0))[None, :, :])
    else:
        sums = tl.sum(K * u[:, None, :], 0)
    return sums


@triton.jit
def power(exponents):
    """exp2, zero where that would be a subnormal number: one instruction instead of four."""
    if INTERPRETED or exponents.dtype == tl.float64:
        powers = tl.exp2(exponents)
    else:
        powers = libdevice.exp2(exponents)
    return powers


@triton.jit
def is_any(items):
    """Whether a boolean [ITEMS] holds anywhere."""
    return tl.max(tl.where(items, 1, 0), 0) != 0


@triton.jit
def log_sum(L, AXIS: tl.constexpr):
    """log2 of the sum of exp2(L) over AXIS; zero where all of it is -inf."""
    largest = tl.max(L, AXIS)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest + log_weights(tl.sum(tl.exp2(L - tl.expand_dims(largest, AXIS)), AXIS))


@triton.jit
def error_of(u, rows, a):
    return tl.sum(tl.abs(u * rows - a), 0)


@triton.jit
def store_kept(
    history_ptr, place, values, items, first, left, B, M, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr
):  # fmt: skip
    """Column scalings [BLOCK_M, ITEMS] of these ``items`` into place 0, 1, … of the history [2 + kept M, B]."""
    columns, lanes = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, ITEMS)[None, :]
    at = (2 + place * M + columns).to(tl.int64) * B + first + lanes
    tl.store(history_ptr + at, values, mask=(columns < M) & (lanes < left) & items[None, :])


@triton.jit
def scaling_rounds(
    K, a, b, kept, has_mass, num_iters, tol, history_ptr, first, left, B, M,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Rounds in scalings of K: u, v, K v, and the rounds that were run of each item. Keeps v as it is before a round
    (but the first), of every round or the last, of items that are ``kept``; without mass, zero. The others come to
    nothing."""
    active = kept & has_mass
    v = tl.where(b == 0, 0.0, 1.0).to(K.dtype)
    # Made anew: a loop that began with two names for one value would not carry the second, and keep the first v in it.
    v_before, u = tl.where(b == 0, 0.0, 1.0).to(K.dtype), tl.zeros_like(a)
    rows = row_sums(K, v)
    rounds = tl.zeros((ITEMS,), tl.int32)
    t, more = 0, num_iters > 0
    if STOPS:
        more = more & is_any(active)
    while more:
        if HISTORY == HISTORY_ALL:
            if t > 0:
                kept_v = tl.where(has_mass[None, :], v, 0.0)
                store_kept(history_ptr, t - 1, kept_v, kept, first, left, B, M, BLOCK_M, ITEMS)
        new_u = divide(a, rows)
        new_v = divide(b, column_sums(K, new_u))
        if STOPS:
            if HISTORY == HISTORY_LAST:
                v_before = tl.where(active[None, :], v, v_before)
            u, v = tl.where(active[None, :], new_u, u), tl.where(active[None, :], new_v, v)
            rounds += tl.where(active, 1, 0)
        else:
            if HISTORY == HISTORY_LAST:
                v_before = v
            u, v = new_u, new_v
            rounds += 1
        rows = row_sums(K, v)
        t += 1
        more = t < num_iters
        if STOPS:
            active = active & ~(error_of(u, rows, a) < tol)
            more = more & is_any(active)
    if HISTORY == HISTORY_LAST:
        kept_v = tl.where(has_mass[None, :], v_before, 0.0)
        store_kept(history_ptr, 0, kept_v, kept, first, left, B, M, BLOCK_M, ITEMS)
    if STOPS and HISTORY == HISTORY_ALL:  # rounds that were not run are zero, not whatever was there
        for rest in range(tl.maximum(t, 1), num_iters):
            store_kept(history_ptr, rest - 1, tl.zeros_like(v), kept, first, left, B, M, BLOCK_M, ITEMS)
    return u, v, rows, rounds


@triton.jit
def folded(L, live, log_u, log_v, u, b):
    """K with scalings folded in; v, which makes its columns exact for u; and K v."""
    K = tl.where(live, tl.exp2((L + log_u[:, None, :]) + log_v[None, :, :]), 1.0)
    v = divide(b, column_sums(K, u))
    return K, v, row_sums(K, v)


@triton.jit
def log_rounds(
    L, live, a, b, active, num_iters, tol, history_ptr, first, left, B, M,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Rounds in logarithms: plan, log_u, log_v, row sums, and the rounds of each item. Keeps log_v as
    ``scaling_rounds`` keeps v.

    Every round runs on K with all that went before folded in. What rounding takes from log_u is left in u, and v is
    made anew of the new K, so that a round's marginals are exact.
    """
    kept = active
    log_u = log_weights(a) - log_sum(L, 1)
    log_v = log_weights(b) - log_sum(L + log_u[:, None, :], 0)
    u = tl.where(a == 0, 0.0, 1.0).to(L.dtype)
    K, v, rows = folded(L, live, log_u, log_v, u, b)
    log_v_before = tl.zeros_like(log_v)
    rounds = tl.full((ITEMS,), 1, tl.int32)
    t, more = 1, num_iters > 1
    if STOPS:
        active = active & ~(error_of(u, rows, a) < tol)
        more = more & is_any(active)
    while more:
        whole = log_v + log_weights(v)
        if HISTORY == HISTORY_ALL:
            store_kept(history_ptr, t - 1, whole, kept, first, left, B, M, BLOCK_M, ITEMS)
        log_change = log_weights(divide(a, rows))
        grown = log_u + log_change
        new_u = tl.where(a == 0, 0.0, tl.exp2(log_change - (grown - log_u)))
        new_v = divide(b, column_sums(K, divide(a, rows)))
        new_log_v = log_v + log_weights(new_v)
        if HISTORY == HISTORY_LAST:
            log_v_before = tl.where(active[None, :], whole, log_v_before)
        if STOPS:
            log_u, u = tl.where(active[None, :], grown, log_u), tl.where(active[None, :], new_u, u)
            log_v = tl.where(active[None, :], new_log_v, log_v)
            rounds += tl.where(active, 1, 0)
        else:
            log_u, u, log_v = grown, new_u, new_log_v
            rounds += 1
        K, v, rows = folded(L, live, log_u, log_v, u, b)
        t += 1
        more = t < num_iters
        if STOPS:
            active = active & ~(error_of(u, rows, a) < tol)
            more = more & is_any(active)
    if HISTORY == HISTORY_LAST:
        store_kept(history_ptr, 0, log_v_before, kept, first, left, B, M, BLOCK_M, ITEMS)
    if STOPS and HISTORY == HISTORY_ALL:
        for rest in range(t, num_iters):
            store_kept(history_ptr, rest - 1, tl.zeros_like(v), kept, first, left, B, M, BLOCK_M, ITEMS)
    return K * u[:, None, :] * v[None, :, :], log_u + log_weights(u), log_v + log_weights(v), u * rows, rounds


@triton.jit
def are_tiny(a, b, DTYPE: tl.constexpr):
    """Of each item, as rounds.are_tiny."""
    least = tl.min(tl.where(a == 0, 1.0, a), 0) * 1e18 * tl.min(tl.where(b == 0, 1.0, b), 0)
    return (least < 1.0) & (DTYPE == tl.float32)


@triton.jit
def half_rounds(
    L, live, a, b, active, num_iters, tol, history_ptr, first, left, B, M,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """``log_rounds`` of items with tiny weights: in whole exponents, as rounds.half_rounds."""
    kept = active
    u, v = tl.where(a == 0, 0.0, 1.0).to(L.dtype), tl.where(b == 0, 0.0, 1.0).to(L.dtype)
    e_u, e_v, log_v_before = tl.zeros_like(a), tl.zeros_like(b), tl.zeros_like(b)
    rounds = tl.zeros((ITEMS,), tl.int32)
    t, more = 0, num_iters > 0
    while more:
        log_v = e_v + log_weights(v)
        if HISTORY == HISTORY_ALL:
            if t > 0:
                store_kept(history_ptr, t - 1, log_v, kept, first, left, B, M, BLOCK_M, ITEMS)
        if HISTORY == HISTORY_LAST:
            log_v_before = tl.where(active[None, :], log_v, log_v_before)
        new_u, new_e_u = half_round(L, a, v, e_v, 1, SMALLEST32)
        new_v, new_e_v = half_round(L, b, new_u, new_e_u, 0, SMALLEST32)
        u, e_u = tl.where(active[None, :], new_u, u), tl.where(active[None, :], new_e_u, e_u)
        v, e_v = tl.where(active[None, :], new_v, v), tl.where(active[None, :], new_e_v, e_v)
        rounds += tl.where(active, 1, 0)
        t += 1
        more = t < num_iters
        if STOPS:
            plan = exp2_of(L, e_u[:, None, :] + e_v[None, :, :]) * v[None, :, :]
            active = active & ~(error_of(u, tl.sum(plan, 1), a) < tol)
            more = more & is_any(active)
    if HISTORY == HISTORY_LAST:
        store_kept(history_ptr, 0, log_v_before, kept, first, left, B, M, BLOCK_M, ITEMS)
    if STOPS and HISTORY == HISTORY_ALL:
        for rest in range(tl.maximum(t, 1), num_iters):
            store_kept(history_ptr, rest - 1, tl.zeros_like(v), kept, first, left, B, M, BLOCK_M, ITEMS)
    plan = tl.where(live, exp2_of(L, e_u[:, None, :] + e_v[None, :, :]) * u[:, None, :] * v[None, :, :], 0.0)
    return plan, e_u + log_weights(u), e_v + log_weights(v), tl.sum(plan, 1), rounds


@triton.jit(do_not_specialize=["B", "N", "M", "step", "num_iters"])
def _small_fwd_kernel(
    cost_ptr, a_ptr, b_ptr, plan_ptr, f_ptr, g_ptr, error_ptr, rounds_ptr, history_ptr,
    B, N, M, step, scale: tl.float64, unit: tl.float64, num_iters, tol: tl.float64,
    STOPS: tl.constexpr, HISTORY: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Programs (items p ITEMS … (p + 1) ITEMS - 1). EXACT: N and M are BLOCK_N and BLOCK_M; ``entries_at`` says why."""
    DTYPE: tl.constexpr = tl.float64 if cost_ptr.dtype.element_ty == tl.float64 else tl.float32
    if EXACT:
        N, M, step = BLOCK_N, BLOCK_M, 1
    first = tl.program_id(0).to(tl.int64) * ITEMS
    left = tl.minimum(B - first, ITEMS).to(tl.int32)
    lanes = tl.arange(0, ITEMS)
    a, b, total_a, total_b, has_mass = load_marginals(
        a_ptr, b_ptr, first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS, DTYPE
    )
    at, inside = entries_at(first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS)
    live = (a != 0)[:, None, :] & (b != 0)[None, :, :]
    L, offset, poison = log_kernel(cost_ptr, at, inside, live, scale, DTYPE)
    poison += total_a * 0 + total_b * 0
    one_piece = in_scalings(L, live, a, b, a_ptr, b_ptr, has_mass, DTYPE)
    if HISTORY != HISTORY_NONE:
        tl.store(history_ptr + first + lanes, tl.where(one_piece, 1.0, 0.0), mask=lanes < left)
        tl.store(history_ptr + B + first + lanes, poison, mask=lanes < left)

    K = tl.where(live, power(L + poison[None, None, :]), 1.0)
    u, v, rows, rounds = scaling_rounds(
        K, a, b, one_piece, has_mass, num_iters, tol, history_ptr, first, left, B, M, STOPS, HISTORY, BLOCK_M, ITEMS
    )
    plan = K * u[:, None, :] * v[None, :, :]
    log_u, log_v = tl.log2(tl.where(a == 0, 1.0, u)) + poison[None, :], tl.log2(tl.where(b == 0, 1.0, v))
    rows *= u
    tiny = one_piece & ~one_piece
    if a_ptr is not None or b_ptr is not None:
        tiny = are_tiny(a, b, DTYPE) & ~one_piece
        if is_any(tiny):
            at, inside = entries_at(first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS)
            L, _offset, again = log_kernel(cost_ptr, at, inside, live, scale, DTYPE)
            L += again[None, None, :]
            other_plan, other_u, other_v, other_rows, other_rounds = half_rounds(
                L, live, a, b, tiny, num_iters, tol, history_ptr, first, left, B, M, STOPS, HISTORY, BLOCK_M, ITEMS
            )
            plan = tl.where(tiny[None, None, :], other_plan, plan)
            log_u, log_v = tl.where(tiny[None, :], other_u, log_u), tl.where(tiny[None, :], other_v, log_v)
            rows, rounds = tl.where(tiny[None, :], other_rows, rows), tl.where(tiny, other_rounds, rounds)
    folds = ~(one_piece | tiny)
    if is_any(folds):
        # Read again: kept through the rounds, it would cost as many registers as K.
        at, inside = entries_at(first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS)
        L, _offset, again = log_kernel(cost_ptr, at, inside, live, scale, DTYPE)
        L += again[None, None, :]
        other_plan, other_u, other_v, other_rows, other_rounds = log_rounds(
            L, live, a, b, folds, num_iters, tol, history_ptr, first, left, B, M, STOPS, HISTORY, BLOCK_M, ITEMS
        )
        plan = tl.where(folds[None, None, :], other_plan, plan)
        log_u, log_v = tl.where(folds[None, :], other_u, log_u), tl.where(folds[None, :], other_v, log_v)
        rows, rounds = tl.where(folds[None, :], other_rows, rows), tl.where(folds, other_rounds, rounds)

    unit = (tl.full((), unit, tl.float64) * LN2).to(DTYPE)  # f = log2(u) unit
    f = tl.where(a == 0, poison[None, :] - float("inf"), log_u * unit - offset * sign_of(scale, DTYPE))
    g = tl.where(b == 0, poison[None, :] - float("inf"), log_v * unit)
    n, m = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[:, None]
    tl.store(f_ptr + first * N + (lanes[None, :] * N + n * step), f, mask=(n < N) & (lanes < left)[None, :])
    tl.store(g_ptr + first * M + (lanes[None, :] * M + m * step), g, mask=(m < M) & (lanes < left)[None, :])
    error = tl.where(has_mass, tl.sum(tl.abs(rows - a), 0), poison)
    tl.store(error_ptr + first + lanes, error, mask=lanes < left)
    tl.store(rounds_ptr + first + lanes, tl.where(has_mass, rounds, 0), mask=lanes < left)
    plan = tl.where(live, plan, poison[None, None, :])
    if EXACT:
        # As it lies in memory: a thread that stores a row of its own item writes half a sector at a time.
        plan = tl.reshape(tl.permute(plan, (2, 0, 1)), (ITEMS * BLOCK_N * BLOCK_M,))
        place = tl.arange(0, ITEMS * BLOCK_N * BLOCK_M)
        tl.store(plan_ptr + first * (N * M) + place, plan, mask=place < left * (N * M))
    else:
        at, inside = entries_at(first, left, N, M, step, BLOCK_N, BLOCK_M, ITEMS)
        tl.store(plan_ptr + at, plan, mask=inside)
