"""What every kernel that solves shares: weights, similarity, the rounds and their adjoints, on a tile held on chip.

Letters: N rows and M columns of an item, padded to BLOCK_N and BLOCK_M; D features. Logarithms are to base two
(``exp2`` is what the hardware has): the log kernel L is ``scale S log2(e)``, with ``scale = 1 / epsilon`` for a
similarity and ``-1 / epsilon`` for a cost.

An item is solved in one of two forms, chosen from its own range (docs/numerics.md):

- scalings: ``plan = K u v`` with ``K = exp2(L - shift)``, one exponential an entry in all;
- logarithms: ``plan = exp2(L + log_u + log_v)``, where K in one piece would leave the range of the dtype. Scalings are
  folded in at every half round, so nothing under- or overflows after the first, which is done with a maximum.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Natural logarithms: how far the entries of K, and with the weights the scalings, may lie apart for the scaling form.
RANGE32 = tl.constexpr(40.0)
RANGE64 = tl.constexpr(300.0)

# The interpreter (Triton 3.9) multiplies the bit patterns of bfloat16; float32 holds the same numbers.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``, summed in total's dtype."""
    if WIDEN and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def load_weights(ptr, item, size, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Weights [BLOCK] as passed, zero beyond the item, and their sum. None is one each; a mask is one or zero."""
    index = tl.arange(0, BLOCK)
    inside = index < size
    if ptr is None:
        weights = tl.where(inside, 1.0, 0.0).to(DTYPE)
    else:
        # Negative weights have no transport: NaN, as no exception can be raised here.
        weights = tl.load(ptr + item * size + index, mask=inside, other=0).to(DTYPE)
        weights = tl.where(weights < 0, float("nan"), weights)
    return weights, tl.sum(weights)


@triton.jit
def load_marginals(
    a_ptr, b_ptr, item, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Both marginals, summing to one, and what they were divided by; an item without mass is zero on both sides."""
    a, total_a = load_weights(a_ptr, item, N, BLOCK_N, DTYPE)
    b, total_b = load_weights(b_ptr, item, M, BLOCK_M, DTYPE)
    has_mass = (total_a != 0) & (total_b != 0)
    total_a, total_b = tl.where(has_mass, total_a, 1.0), tl.where(has_mass, total_b, 1.0)
    # Beyond the item nothing may become NaN: what is there is taken for padding, and never loaded or stored.
    mass = tl.where(has_mass, 1, 0)
    a = tl.where(tl.where(a != 0, mass, 0) != 0, a / total_a, 0.0)
    b = tl.where(tl.where(b != 0, mass, 0) != 0, b / total_b, 0.0)
    return a, b, total_a, total_b, has_mass


@triton.jit
def log_scale(scale, DTYPE: tl.constexpr):
    """``scale log2(e)`` as a sum of two numbers of DTYPE: rounded to one, it would shift epsilon by a rounding."""
    exact = tl.full((), scale, tl.float64) * LOG2E
    high = exact.to(DTYPE)
    return high, (exact - high.to(tl.float64)).to(DTYPE)


@triton.jit
def token_products(
    x_ptr, y_ptr, live_x, live_y, D, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Similarity [BLOCK_N, BLOCK_M] of tokens from these addresses on, and their inverse norms, in one pass.

    Padding is not read. Without COSINE the norms are one.
    """
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows[:, None] * D + features[None, :]
    y_ptrs = y_ptr + columns[:, None] * D + features[None, :]
    similarity = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    square_x, square_y = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
    for start in range(0, D, BLOCK_D):
        inside = (start + features < D)[None, :]
        x = tl.load(x_ptrs + start, mask=live_x[:, None] & inside, other=0.0)
        y = tl.load(y_ptrs + start, mask=live_y[:, None] & inside, other=0.0)
        similarity = product(x, tl.trans(y), similarity, PRECISION)
        if COSINE:
            square_x += tl.sum(x.to(DTYPE) * x.to(DTYPE), 1)
            square_y += tl.sum(y.to(DTYPE) * y.to(DTYPE), 1)
    if not COSINE:
        return similarity, tl.full((BLOCK_N,), 1.0, DTYPE), tl.full((BLOCK_M,), 1.0, DTYPE)
    inverse_x, inverse_y = inverse_norm(square_x), inverse_norm(square_y)
    return similarity * inverse_x[:, None] * inverse_y[None, :], inverse_x, inverse_y


@triton.jit
def inverse_norm(square):
    """A zero token gets similarity zero with everything, and a zero gradient."""
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)))


@triton.jit
def log_kernel(similarity, live, scale, DTYPE: tl.constexpr):
    """L [BLOCK_N, BLOCK_M], -inf at padding, where the similarity is to be zero; its largest entry; its range, in
    natural logarithms; and zero or, if any entry is not finite, NaN."""
    high, low = log_scale(scale, DTYPE)
    poison = tl.sum(tl.sum(similarity * 0.0, 1))
    L = tl.where(live, similarity * high + similarity * low, float("-inf"))
    largest = tl.max(tl.max(L, 1))
    smallest = tl.min(tl.min(tl.where(L == float("-inf"), float("inf"), L), 1))
    return L, largest, (largest - smallest) * LN2, poison


@triton.jit
def spread(weights):
    """Natural logarithm of the largest over the smallest weight that is not zero."""
    largest = tl.max(weights)
    smallest = tl.min(tl.where(weights == 0, largest, weights))
    return tl.log2(largest / smallest) * LN2


@triton.jit
def fits_one_piece(entries, a, b, DTYPE: tl.constexpr):
    """Whether the scaling form is safe: for a range of the log kernel's ``entries`` and these marginals."""
    limit = RANGE64 if DTYPE == tl.float64 else RANGE32
    return (entries <= limit) & (entries + spread(a) + spread(b) <= 1.5 * limit)


@triton.jit
def store_round(history_ptr, t, u, v, N, M, part, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row t of an item's history [kept, N + M]; part 0 stores it, the others have the same."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    ptr = history_ptr + t * (N + M)
    tl.store(ptr + rows, u, mask=rows < tl.where(part == 0, N, 0))
    tl.store(ptr + N + columns, v, mask=columns < tl.where(part == 0, M, 0))


@triton.jit
def load_round(history_ptr, t, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    ptr = history_ptr + t * (N + M)
    return tl.load(ptr + rows, mask=rows < N, other=0.0), tl.load(ptr + N + columns, mask=columns < M, other=0.0)


@triton.jit
def scaling_rounds(
    K, a, b, num_iters, tol, history_ptr, N, M, part,
    STOPS: tl.constexpr, ALL_ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """u, v, the row sums of the plan, and the rounds run, by scalings; keeps every round's u and v if ALL_ROUNDS."""
    lift_a, lift_b = tl.where(a == 0, 1.0, 0.0).to(K.dtype), tl.where(b == 0, 1.0, 0.0).to(K.dtype)  # 0 / 0 is NaN
    u, v = tl.zeros_like(a), tl.where(b == 0, 0.0, 1.0).to(K.dtype)
    rows = tl.sum(K * v[None, :], 1)
    t, more = 0, num_iters > 0
    while more:
        u = a / (rows + lift_a)
        v = b / (tl.sum(K * u[:, None], 0) + lift_b)
        if ALL_ROUNDS:
            store_round(history_ptr, t, u, v, N, M, part, BLOCK_N, BLOCK_M)
        rows = tl.sum(K * v[None, :], 1)
        t += 1
        more = t < num_iters
        if STOPS:
            more = more & ~(tl.sum(tl.abs(u * rows - a)) < tol)
    return u, v, u * rows, t


@triton.jit
def log_sum(L, shift, AXIS: tl.constexpr):
    """log2 of the sum of exp2(L + shift) over AXIS, with shift along the other axis; where all of it is -inf, zero."""
    along = tl.expand_dims(shift, 1 - AXIS)
    largest = tl.max(L + along, AXIS)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    # In another order than above: a common sum would be kept, which is a tile of registers.
    total = tl.sum(tl.exp2((L - tl.expand_dims(largest, AXIS)) + along), AXIS)
    return largest + log_weights(total)


@triton.jit
def log_weights(weights):
    """log2, zero at padding."""
    return tl.log2(tl.where(weights == 0, 1.0, weights))


@triton.jit
def log_rounds(
    L, a, b, num_iters, tol, history_ptr, N, M, part,
    STOPS: tl.constexpr, ALL_ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same where K in one piece is out of range: the plan, log_u, log_v, its row sums, and the rounds run.

    The scalings so far are folded into the kernel, anew in every round, and a round's own u and v count from one: what
    is summed are entries of a plan, and one plan serves all sums of a round, so that its marginals are exact to a
    rounding although its entries are off by one of the logarithms.
    """
    lift_a, lift_b = tl.where(a == 0, 1.0, 0.0).to(L.dtype), tl.where(b == 0, 1.0, 0.0).to(L.dtype)
    log_u = log_weights(a) - log_sum(L, tl.zeros_like(b), 1)
    log_v = log_weights(b) - log_sum(L, log_u, 0)
    if ALL_ROUNDS:
        store_round(history_ptr, 0, log_u, log_v, N, M, part, BLOCK_N, BLOCK_M)
    u, v = tl.full((BLOCK_N,), 1.0, L.dtype), tl.full((BLOCK_M,), 1.0, L.dtype)
    plan = tl.exp2((L + log_u[:, None]) + log_v[None, :])
    rows = tl.sum(plan, 1)
    t, more = 1, num_iters > 1
    if STOPS:
        more = more & ~(tl.sum(tl.abs(rows - a)) < tol)
    while more:
        log_u += log_weights(u)
        log_v += log_weights(v)
        plan = tl.exp2((L + log_u[:, None]) + log_v[None, :])
        u = a / (tl.sum(plan, 1) + lift_a)
        v = b / (tl.sum(plan * u[:, None], 0) + lift_b)
        rows = u * tl.sum(plan * v[None, :], 1)
        if ALL_ROUNDS:
            store_round(history_ptr, t, log_u + log_weights(u), log_v + log_weights(v), N, M, part, BLOCK_N, BLOCK_M)
        t += 1
        more = t < num_iters
        if STOPS:
            more = more & ~(tl.sum(tl.abs(rows - a)) < tol)
    plan = tl.exp2((L + log_u[:, None]) + log_v[None, :]) * u[:, None] * v[None, :]
    return plan, log_u + log_weights(u), log_v + log_weights(v), rows, t
