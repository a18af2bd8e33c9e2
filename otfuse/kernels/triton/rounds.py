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
from triton.language.extra import libdevice

from .constants import LEAST, RANGE32, RANGE64
from .places import wide

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The factor by which a scaling of the logarithmic form may grow or shrink before it is folded into K.
GROWN = tl.constexpr(256.0)

# Below every sum of a round but those of padding, whose 0 / 0 would be NaN.
SMALLEST32 = tl.constexpr(1e-37)
SMALLEST64 = tl.constexpr(1e-300)

# The largest size that a token is divided by, and one over the smallest: powers of two.
FARTHEST32 = tl.constexpr(2.0**120)
FARTHEST64 = tl.constexpr(2.0**1000)

LARGEST32 = tl.constexpr(3.4028234663852886e38)  # the largest finite numbers
LARGEST64 = tl.constexpr(1.7976931348623157e308)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``, summed in total's dtype."""
    # The interpreter (Triton 3.9) multiplies the bit patterns of bfloat16; float32 holds the same numbers.
    if INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def tile_product(x, y, total, CROSSED: tl.constexpr, PRECISION: tl.constexpr):
    """``total + x @ yᵀ``; CROSSED: of the transpose, which is then spread over the warps as column_sums wants it."""
    if CROSSED != 0:
        total = product(y, tl.trans(x), total, PRECISION)
    else:
        total = product(x, tl.trans(y), total, PRECISION)
    return total


@triton.jit
def load_passed(ptr, at, inside, DTYPE: tl.constexpr):
    """Weights as passed, in the wider of their own precision and the solve's, zero beyond the item."""
    PASSED: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else DTYPE
    return tl.load(ptr + at, mask=inside, other=0).to(PASSED)


@triton.jit
def over_largest(passed, largest):
    """Weights over the largest of their item, a live one at least LEAST: their sum does not overflow, and no inverse.

    The result does not depend on what all weights are divided by.
    """
    weights = passed / tl.where(largest == 0, 1.0, largest)
    weights = tl.where(weights < LEAST, LEAST, weights)
    # Negative weights have no transport: NaN, as no exception can be raised here.
    return tl.where(passed == 0, 0.0, tl.where(passed < 0, float("nan"), weights))


@triton.jit
def load_weights(ptr, item, index, size, DTYPE: tl.constexpr):
    """Weights [BLOCK] over their largest, zero beyond the item, and their sum. None is one each; a mask one or zero."""
    inside = index < size
    if ptr is None:
        weights = tl.where(inside, 1.0, 0.0).to(DTYPE)
    else:
        passed = load_passed(ptr, item * size + index, inside, DTYPE)
        weights = over_largest(passed, tl.max(passed)).to(DTYPE)
    return weights, tl.sum(weights)


@triton.jit
def load_live(ptr, item, index, size):
    """Which of an item's tokens have a weight that is not zero."""
    live = index < size
    if ptr is not None:
        live = live & (tl.load(ptr + item * size + index, mask=live, other=0) != 0)
    return live


@triton.jit
def load_marginals(a_ptr, b_ptr, item, rows, columns, N, M, DTYPE: tl.constexpr):
    """Both marginals, summing to one, and what they were divided by after their largest; an item without mass is zero
    on both sides."""
    a, total_a = load_weights(a_ptr, item, rows, N, DTYPE)
    b, total_b = load_weights(b_ptr, item, columns, M, DTYPE)
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
def log_entries(values, high, low):
    """``values (high + low)``: the log kernel of a tile of a similarity or a cost, the same bits in every kernel.

    Written as two products and a sum, the compiler would choose in each kernel which of the products it does not round,
    and the plan of one kernel would not be that of the scalings of another.
    """
    return tl.fma(values, tl.broadcast_to(high, values.shape), values * low)


@triton.jit
def tile_at(rows, columns, M, live_x, live_y, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets within an item's matrix, and where it is live, as [BLOCK_M / 16, BLOCK_N, 16].

    In this order of dimensions a thread gets entries of about as many columns as rows. In two dimensions it would get
    a column, and vectors along the rows as long as that.
    """
    columns = tl.expand_dims(tl.reshape(columns, (BLOCK_M // 16, 16)), 1)
    live_y = tl.expand_dims(tl.reshape(live_y, (BLOCK_M // 16, 16)), 1)
    return rows[None, :, None] * M + columns, live_x[None, :, None] & live_y


@triton.jit
def flat(tile, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """What was loaded by ``tile_at``, as [BLOCK_N, BLOCK_M]."""
    return tl.reshape(tl.permute(tile, (1, 0, 2)), (BLOCK_N, BLOCK_M))


@triton.jit
def unflat(tile, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """What is to be stored by ``tile_at``."""
    return tl.permute(tl.reshape(tile, (BLOCK_N, BLOCK_M // 16, 16)), (1, 0, 2))


@triton.jit
def token_products(
    x_ptr, y_ptr, rows, columns, live_x, live_y, D, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Similarity [BLOCK_N, BLOCK_M] of tokens from these addresses on, in one pass. Padding is not read."""
    similarity, square_x, square_y = scaled_products(
        x_ptr, y_ptr, rows, columns, live_x, live_y, None, None, D, COSINE, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE
    )
    if COSINE:
        similarity, _, _ = cosines(
            similarity, square_x, square_y, x_ptr, y_ptr, rows, columns, live_x, live_y, D, PRECISION,
            BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
    return similarity


@triton.jit
def scaled_products(
    x_ptr, y_ptr, rows, columns, live_x, live_y, unit_x, unit_y, D, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Inner products [BLOCK_N, BLOCK_M] of tokens, and of each with itself if SQUARES, in one pass.

    Units, or None, are powers of two that tokens are multiplied by first.
    """
    features = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows[:, None] * D + features[None, :]
    y_ptrs = y_ptr + columns[:, None] * D + features[None, :]
    CROSSED: tl.constexpr = crossed(x_ptr.dtype.element_ty, BLOCK_N, BLOCK_M)
    products = tl.zeros((BLOCK_M, BLOCK_N) if CROSSED != 0 else (BLOCK_N, BLOCK_M), DTYPE)
    square_x, square_y = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_M,), DTYPE)
    for start in range(0, D, BLOCK_D):
        inside = (start + features < D)[None, :]
        x = tl.load(x_ptrs + start, mask=live_x[:, None] & inside, other=0.0)
        y = tl.load(y_ptrs + start, mask=live_y[:, None] & inside, other=0.0)
        if unit_x is not None:
            x, y = (x.to(DTYPE) * unit_x[:, None]).to(x.dtype), (y.to(DTYPE) * unit_y[:, None]).to(y.dtype)
        products = tile_product(x, y, products, CROSSED, PRECISION)
        if SQUARES:
            square_x += tl.sum(x.to(DTYPE) * x.to(DTYPE), 1)
            square_y += tl.sum(y.to(DTYPE) * y.to(DTYPE), 1)
    if CROSSED != 0:
        products = tl.trans(products)
    return products, square_x, square_y


@triton.jit
def cosines(
    products, square_x, square_y, x_ptr, y_ptr, rows, columns, live_x, live_y, D, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_N, BLOCK_M] and inverse norms of tokens with these products and squares.

    They are read again where one is so long or so short, or nothing, that these may have left the range.
    """
    inverse_x, inverse_y = inverse_norm(square_x), inverse_norm(square_y)
    similarity = products * inverse_x[:, None] * inverse_y[None, :]
    if x_ptr.dtype.element_ty != tl.float16:  # whose squares float32 holds
        if are_beyond(inverse_x, live_x) | are_beyond(inverse_y, live_y):
            inverse_x = inverse_norms(x_ptr, rows, live_x, D, BLOCK_N, BLOCK_D, DTYPE)
            inverse_y = inverse_norms(y_ptr, columns, live_y, D, BLOCK_M, BLOCK_D, DTYPE)
            similarity = cosines_of_any_length(
                x_ptr, y_ptr, rows, columns, live_x, live_y, inverse_x, inverse_y, D, PRECISION,
                BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
    return similarity, inverse_x, inverse_y


@triton.jit
def cosines_of_any_length(
    x_ptr, y_ptr, rows, columns, live_x, live_y, inverse_x, inverse_y, D, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Cosines [BLOCK_N, BLOCK_M] of tokens with these inverse norms, each of which is brought near one first."""
    unit_x, size_x = powers_of_two(inverse_x)
    unit_y, size_y = powers_of_two(inverse_y)
    products, _, _ = scaled_products(
        x_ptr, y_ptr, rows, columns, live_x, live_y, unit_x, unit_y, D, False, PRECISION,
        BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    return products * (inverse_x * size_x)[:, None] * (inverse_y * size_y)[None, :]


@triton.jit
def inverse_norms(ptr, rows, live, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Of tokens [BLOCK] of any length: a token is divided by a power of two near its largest entry first.

    One whose inverse norm may be no number counts as zero.
    """
    features = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * D + features[None, :]
    largest, square = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, D, BLOCK_D):
        inside = live[:, None] & (start + features < D)[None, :]
        x = tl.load(ptrs + start, mask=inside, other=0.0).to(DTYPE)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    _, unit = powers_of_two(largest)
    for start in range(0, D, BLOCK_D):
        inside = live[:, None] & (start + features < D)[None, :]
        x = tl.load(ptrs + start, mask=inside, other=0.0).to(DTYPE) * unit[:, None]
        square += tl.sum(x * x, 1)
    farthest: tl.constexpr = FARTHEST64 if DTYPE == tl.float64 else FARTHEST32
    return tl.where(largest < 1 / farthest, 0.0, inverse_norm(square) * unit)


@triton.jit
def powers_of_two(sizes):
    """Near these sizes, but for the farthest, and one over them; one for zero."""
    farthest: tl.constexpr = FARTHEST64 if sizes.dtype == tl.float64 else FARTHEST32
    near = tl.minimum(tl.maximum(tl.where(sizes == 0, 1.0, sizes), 1 / farthest), farthest)
    exponent = tl.floor(tl.log2(near))
    return tl.exp2(exponent), tl.exp2(-exponent)


@triton.jit
def are_beyond(inverse, live):
    """Whether squares or products of any of these tokens may have left the range, by their inverse norms."""
    most: tl.constexpr = 1e140 if inverse.dtype == tl.float64 else 1e12
    return tl.max(tl.where(live & ~((inverse >= 1 / most) & (inverse <= most)), 1, 0)) != 0


@triton.jit
def inverse_norm(square):
    """A zero token gets similarity zero with everything, and a zero gradient."""
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)))


@triton.jit
def sign_of(scale, DTYPE: tl.constexpr):
    """One for a similarity, minus one for a cost."""
    return tl.where(tl.full((), scale, tl.float64) < 0, -1.0, 1.0).to(DTYPE)


@triton.jit
def below(values, offset):
    """``values - offset``, finite: infinity times both parts of the scale would be NaN."""
    most: tl.constexpr = LARGEST64 if values.dtype == tl.float64 else LARGEST32
    rest = values - offset
    return tl.where(rest > most, most, tl.where(rest < -most, -most, rest))


@triton.jit
def offsets(largest):
    """The offset of a row whose largest value is this; of a row of padding, zero."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def log_kernel(similarity, live, scale, DTYPE: tl.constexpr):
    """L [BLOCK_N, BLOCK_M] of what a row's entries are below the largest similarity (above the smallest cost) of
    the row, -inf at padding; that largest similarity or smallest cost; the largest range of a row, in natural
    logarithms; and zero or, if any entry is not finite, NaN.

    The difference is taken before the scale rounds it, by the size of what is left. It belongs to f, and the
    plan does not depend on it.
    """
    high, low = log_scale(scale, DTYPE)
    sign = sign_of(scale, DTYPE)
    similarity = tl.where(live, similarity, 0.0)
    poison = tl.sum(tl.sum(similarity * 0.0, 1))
    offset = offsets(tl.max(tl.where(live, similarity * sign, float("-inf")), 1)) * sign
    L = log_entries(below(similarity, offset[:, None]), high, low)
    smallest = tl.min(tl.min(tl.where(live, L, 0.0), 1))
    return tl.where(live, L, float("-inf")), offset, -smallest * LN2, poison


@triton.jit
def spread(weights):
    """Natural logarithm of the largest over the smallest weight [BLOCK] or [BLOCK, ITEMS] that is not zero."""
    largest = tl.max(weights, 0)
    smallest = tl.min(tl.where(weights == 0, largest, weights), 0)
    return tl.log2(largest / smallest) * LN2


@triton.jit
def fits_scalings(entries, with_weights, DTYPE: tl.constexpr):
    """Whether the scaling form is safe for a range of the log kernel's ``entries``, and with that of the marginals."""
    limit: tl.constexpr = RANGE64 if DTYPE == tl.float64 else RANGE32
    return (entries <= limit) & (with_weights <= 1.5 * limit)


@triton.jit
def store_round(history_ptr, t, u, v, N, M, part, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row t of an item's history [kept, N + M]; part 0 stores it, the others have the same."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    ptr = history_ptr + wide(t) * (N + M)
    tl.store(ptr + rows, u, mask=rows < tl.where(part == 0, N, 0))
    tl.store(ptr + N + columns, v, mask=columns < tl.where(part == 0, M, 0))


@triton.jit
def load_round(history_ptr, t, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    ptr = history_ptr + wide(t) * (N + M)
    return tl.load(ptr + rows, mask=rows < N, other=0.0), tl.load(ptr + N + columns, mask=columns < M, other=0.0)


@triton.jit
def divide(left, right):
    """left / right to two units in the last place, for divisors between 2^-126 and 2^126: what sums of a round are."""
    if INTERPRETED or left.dtype == tl.float64:
        quotient = left / right
    else:
        quotient = libdevice.fast_dividef(left, right)
    return quotient


@triton.constexpr_function
def crossed(tokens, BLOCK_N, BLOCK_M):
    """Over how many warps the rows of a tile of these tokens are spread, where column_sums is to go about them in its
    own way, or zero.

    It is so on thin tiles whose transpose is what tensor cores make (tile_product); the number is that of the
    configurations of this size. Chosen by the compiler's word: tiles of 32 x 32 and 128 x 32 would have a stack.
    """
    if tokens.primitive_bitwidth != 16 or BLOCK_M > 32:
        return 0
    return 4 if BLOCK_N >= 64 and BLOCK_N * BLOCK_M <= 2048 else 8 if BLOCK_N >= 256 else 0


@triton.jit
def column_sums(tile, CROSSED: tl.constexpr):
    """Over the rows of a tile, of which each of CROSSED warps holds eight of each 8 CROSSED.

    Their sums are brought together in the registers of every thread: one turn through shared memory, and one barrier
    before it and after. Triton's own way takes two turns, and more shuffles. With other layouts the answer is the same.
    """
    if CROSSED == 0:
        sums = tl.sum(tile, 0)
    else:
        BLOCK_M: tl.constexpr = tile.shape[1]
        sums = tl.sum(tl.sum(tl.reshape(tile, (tile.shape[0] // (8 * CROSSED), CROSSED, 8, BLOCK_M)), 0), 1)
        if CROSSED == 8:
            even, odd = tl.split(tl.permute(tl.reshape(sums, (2, 2, 2, BLOCK_M)), (3, 2, 1, 0)))
            sums = even + odd
        else:
            sums = tl.permute(tl.reshape(sums, (2, 2, BLOCK_M)), (2, 1, 0))
        even, odd = tl.split(sums)
        even, odd = tl.split(even + odd)
        sums = even + odd
    return sums


@triton.jit
def rounds_while(
    K, a, b, v, log_u, log_v, t, one_piece, num_iters, tol, history_ptr, N, M, part,
    STOPS: tl.constexpr, ALL_ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CROSSED: tl.constexpr = 0,
):  # fmt: skip
    """Rounds in scalings of ``K = exp2(L + log_u + log_v)``, from round t and v on, until all are run, or the item is
    done, or its scalings have grown and are to be folded into K: u, v, the plan's row sums, t, whether more are to run.

    Keeps every round's u and v if ALL_ROUNDS; their logarithms, K's own included, unless the item is in one piece.
    """
    smallest: tl.constexpr = SMALLEST64 if K.dtype == tl.float64 else SMALLEST32
    u = tl.where(a == 0, 0.0, 1.0).to(K.dtype)
    rows = tl.sum(K * v[None, :], 1)
    more = t < num_iters
    if STOPS:  # the first round of the logarithmic form has been run
        more = more & (one_piece | ~(tl.sum(tl.abs(rows - a)) < tol))
    grown = 0
    while more & (grown == 0):
        u = divide(a, tl.maximum(rows, smallest))
        v = divide(b, tl.maximum(column_sums(K * u[:, None], CROSSED), smallest))
        if ALL_ROUNDS:
            if one_piece:
                store_round(history_ptr, t, u, v, N, M, part, BLOCK_N, BLOCK_M)
            else:
                store_round(
                    history_ptr, t, log_u + log_weights(u), log_v + log_weights(v), N, M, part, BLOCK_N, BLOCK_M
                )
        rows = tl.sum(K * v[None, :], 1)
        t += 1
        more = t < num_iters
        if STOPS:
            more = more & ~(tl.sum(tl.abs(u * rows - a)) < tol)
        if not one_piece:
            if CROSSED != 0:  # in one reduction: v would be made a second time, for another layout
                grown = tl.max(has_grown(u)[:, None] | has_grown(v)[None, :])
            else:
                grown = tl.maximum(tl.max(has_grown(u)), tl.max(has_grown(v)))
    return u, v, u * rows, t, more


@triton.jit
def has_grown(scalings):
    """One where a scaling has left 1 / GROWN … GROWN, or else zero, as at padding."""
    return tl.where((scalings > GROWN) | ((scalings != 0) & (scalings < 1 / GROWN)), 1, 0)


@triton.jit
def whole(exponent):
    """A whole number near ``exponent``, zero where that is infinite."""
    return tl.where(tl.abs(exponent) == float("inf"), 0.0, tl.floor(exponent))


@triton.jit
def apart(scaling, exponent):
    """A number whose size is between one and two, or zero, and the exponent of two that it is to be multiplied by.

    Exactly, from the bits of the number: what gives its power of two away again gives nothing. One that is smaller than
    a normal number, as what is pulled may be, stays below one: exp2(-exponent) is infinite.
    """
    if scaling.dtype == tl.float64:
        grown = (scaling.to(tl.int64, bitcast=True) >> 52 & 0x7FF) - 0x3FF
        grown = tl.minimum(tl.maximum(grown, -1022), 1022)
    else:
        grown = (scaling.to(tl.int32, bitcast=True) >> 23 & 0xFF) - 0x7F
        grown = tl.minimum(tl.maximum(grown, -126), 126)
    grown = tl.where(scaling == 0, 0, grown).to(scaling.dtype)
    return scaling * tl.exp2(-grown), exponent + grown


@triton.jit
def exp2_of(L, exponents):
    """exp2(L + exponents) for whole exponents, of entries that are no larger than a plan's: rounded no further than L
    is, where the sum itself would be rounded by the size of the exponents, which is that of a weight's logarithm."""
    low = whole(L)
    return tl.exp2(L - low) * tl.exp2(tl.minimum(low + exponents, 64.0))


@triton.jit
def half_round(L, weights, scaling, exponent, AXIS: tl.constexpr, smallest):
    """Over AXIS: what scales its sums of exp2(L + exponent) scaling to the weights, as ``apart`` has it.

    Whole numbers are added to each other first: an entry that matters is then rounded no further than L is.
    """
    along = tl.expand_dims(exponent, 1 - AXIS)
    largest = whole(tl.max(L + along, AXIS))
    terms = tl.exp2(L + (along - tl.expand_dims(largest, AXIS))) * tl.expand_dims(scaling, 1 - AXIS)
    return apart(divide(weights, tl.maximum(tl.sum(terms, AXIS), smallest)), -largest)


@triton.jit
def lacking(L, a, u, e_u, v, e_v):
    """The L1 error of the row sums."""
    sums = tl.sum(tl.exp2(L + (e_u[:, None] + e_v[None, :])) * v[None, :], 1)
    return tl.sum(tl.abs(u * sums - a))


@triton.jit
def are_tiny(a, b, DTYPE: tl.constexpr):
    """Whether a sum of rounds_while, which may be as small as the product of two weights squared, is below float32."""
    least = tl.min(tl.where(a == 0, 1.0, a)) * 1e18 * tl.min(tl.where(b == 0, 1.0, b))
    return (least < 1.0) & (DTYPE == tl.float32)


@triton.jit
def half_rounds(
    L, a, b, num_iters, tol, history_ptr, N, M, part,
    STOPS: tl.constexpr, ALL_ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All rounds in whole exponents that move at every half round, as cluster.py runs them: no sum of these vanishes,
    whatever the weights. What rounds_while returns, after K; with the exponents that K holds."""
    smallest: tl.constexpr = SMALLEST64 if L.dtype == tl.float64 else SMALLEST32
    u, v = tl.where(a == 0, 0.0, 1.0).to(L.dtype), tl.where(b == 0, 0.0, 1.0).to(L.dtype)
    e_u, e_v = tl.zeros((BLOCK_N,), L.dtype), tl.zeros((BLOCK_M,), L.dtype)
    t, more = 0, num_iters > 0
    while more:
        u, e_u = half_round(L, a, v, e_v, 1, smallest)
        v, e_v = half_round(L, b, u, e_u, 0, smallest)
        if ALL_ROUNDS:
            store_round(history_ptr, t, e_u + log_weights(u), e_v + log_weights(v), N, M, part, BLOCK_N, BLOCK_M)
        t += 1
        more = t < num_iters
        if STOPS:
            more = more & ~(lacking(L, a, u, e_u, v, e_v) < tol)
    K = exp2_of(L, e_u[:, None] + e_v[None, :])
    return K, u, v, u * tl.sum(K * v[None, :], 1), e_u, e_v, t


@triton.jit
def small_enough(product, least, largest):
    """What conjugate gradients reduce ``product`` to, of columns whose sums lie between these: divided by the least, an
    entry is so many times the others, and is not to hide them. Not below what numbers hold: a step divides by it."""
    rounding: tl.constexpr = 2.2e-16 if product.dtype == tl.float64 else 1.2e-7
    smallest: tl.constexpr = SMALLEST64 if product.dtype == tl.float64 else SMALLEST32
    share = tl.where(largest > 0, least / tl.where(largest > 0, largest, 1.0), 1.0)
    return tl.maximum(product * tl.minimum(1e-20, rounding * rounding) * share, smallest)


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
def inverse(values):
    """1 / values, zero where they are zero."""
    return tl.where(values == 0, 0.0, 1.0 / tl.where(values == 0, 1.0, values))


@triton.jit
def load_or_zero(ptr, at, mask, DTYPE: tl.constexpr):
    """A gradient that autograd may not have sent."""
    if ptr is None:
        values = tl.zeros(mask.shape, DTYPE)
    else:
        values = tl.load(ptr + at, mask=mask, other=0.0).to(DTYPE)
    return values


@triton.jit
def log_weights(weights):
    """log2, zero at padding."""
    return tl.log2(tl.where(weights == 0, 1.0, weights))
