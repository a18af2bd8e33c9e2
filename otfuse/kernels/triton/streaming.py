"""Forward beyond what stays on chip: rounds that stream the similarity, from memory or made anew from the tokens.

A program owns a strip: BLOCK_N rows of an item, all its columns, in steps of BLOCK_M. In a round it sums its rows, has
its scalings u, and then, over the same strip, adds its part to the sums over columns; what the strips of an item have
found is gathered by a launch between two rounds (docs/performance.md#beyond-the-chip counts bytes and launches).

Items are padded, or packed: then a table says what a program does (``places.py``), and N and M are those of the longest
item until the item's own are read there.

There is one form for every range. A scaling is a number times a power of two that is kept apart,
``K = exp2(L + e_u + e_v)`` with whole numbers e: to move a factor between u and e_u rounds nothing. The first exponents
bring the largest entry of every row, then of every column, near one (docs/numerics.md).

Letters: B batch, N rows and M columns of an item, D features, P strips of an item; *lines* are rows and columns, one
after the other. Logarithms are to base two.
"""

import triton
import triton.language as tl

from .attend import dot_split, split
from .constants import HISTORY_ALL, HISTORY_LAST, HISTORY_NONE, LAST_ROWS
from .places import block_of, is_idle, line_block, place, row_block, strips, wide
from .rounds import (
    LN2,
    SMALLEST32,
    SMALLEST64,
    apart,
    are_beyond,
    cosines_of_any_length,
    divide,
    exp2_of,
    inverse_norm,
    inverse_norms,
    load_passed,
    log_entries,
    log_scale,
    log_weights,
    offsets,
    over_largest,
    sign_of,
    token_products,
    whole,
)


@triton.jit
def largest_weight(ptr, begin, size, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Of an item, in the precision of load_passed; one of all zero, which is not to be divided by."""
    if ptr is None:
        largest = tl.full((), 1.0, DTYPE)
    else:
        index = tl.arange(0, BLOCK)
        found = load_passed(ptr, begin + index, index < 0, DTYPE)
        for start in range(0, size, BLOCK):
            found = tl.maximum(found, load_passed(ptr, begin + start + index, start + index < size, DTYPE))
        largest = tl.max(found)
        largest = tl.where(largest == 0, 1.0, largest)
    return largest


@triton.jit
def sum_weights(ptr, begin, size, largest, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of an item's weights over the largest; a negative one makes it NaN."""
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, size, BLOCK):
        total += load_raw(ptr, begin, start + tl.arange(0, BLOCK), size, largest, DTYPE)
    return tl.sum(total)


@triton.jit
def load_raw(ptr, begin, index, size, largest, DTYPE: tl.constexpr):
    """Weights [BLOCK] over the largest, zero beyond the item. None is one each; a mask is one or zero."""
    inside = index < size
    if ptr is None:
        weights = tl.where(inside, 1.0, 0.0).to(DTYPE)
    else:
        weights = over_largest(load_passed(ptr, begin + index, inside, DTYPE), largest).to(DTYPE)
    return weights


@triton.jit
def store_weights(ptr, weights_ptr, begin, size, largest, total, has_mass, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Weights that sum to one; all zero in an item without mass on either side."""
    total = tl.where(has_mass, total, 1.0)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        weights = load_raw(ptr, begin, index, size, largest, DTYPE)
        kept = tl.where(weights != 0, tl.where(has_mass, 1, 0), 0) != 0
        tl.store(weights_ptr + index, tl.where(kept, weights / total, 0.0), mask=index < size)


@triton.jit(do_not_specialize=["N", "M"])
def _weights_kernel(a_ptr, b_ptr, weights_ptr, items_ptr, N, M, table_ptr, BLOCK: tl.constexpr):
    """Programs (item): its marginals, lines of [B, N + M], and of [B, 4] what they were divided by after their
    largest, zero without mass (numbers 2 and 3; 0 is for what poisons the item)."""
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, _ = block_of(table_ptr, 1)
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    largest_a = largest_weight(a_ptr, start_x, N, BLOCK, DTYPE)
    largest_b = largest_weight(b_ptr, start_y, M, BLOCK, DTYPE)
    total_a = sum_weights(a_ptr, start_x, N, largest_a, BLOCK, DTYPE)
    total_b = sum_weights(b_ptr, start_y, M, largest_b, BLOCK, DTYPE)
    has_mass = (total_a != 0) & (total_b != 0)
    weights_ptr += start_x + start_y
    store_weights(a_ptr, weights_ptr, start_x, N, largest_a, total_a, has_mass, BLOCK, DTYPE)
    store_weights(b_ptr, weights_ptr + N, start_y, M, largest_b, total_b, has_mass, BLOCK, DTYPE)
    tl.store(items_ptr + item * 4 + 2, tl.where(has_mass, total_a, 0.0))
    tl.store(items_ptr + item * 4 + 3, tl.where(has_mass, total_b, 0.0))


@triton.jit(do_not_specialize=["N", "M"])
def _norms_kernel(
    x_ptr, weights_ptr, inverse_ptr, N, M, D, table_ptr,
    SWAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of N tokens): their inverse norms; padding is not read. SWAPPED: they are columns."""
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = inverse_ptr.dtype.element_ty
    rows, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    lines = start_x + start_y + start + rows
    if SWAPPED:
        lines += M
    live = load_lines(weights_ptr, lines, start + rows < N) != 0
    x_ptr += (start_x + start) * D
    square = tl.zeros((BLOCK_N,), DTYPE)
    for offset in range(0, D, BLOCK_D):
        inside = live[:, None] & (offset + features < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + offset + features[None, :], mask=inside, other=0.0).to(DTYPE)
        square += tl.sum(x * x, 1)
    inverse = inverse_norm(square)
    if x_ptr.dtype.element_ty != tl.float16:  # whose squares float32 holds
        if are_beyond(inverse, live):
            inverse = inverse_norms(x_ptr, rows, live, D, BLOCK_N, BLOCK_D, DTYPE)
    tl.store(inverse_ptr + lines, inverse, mask=start + rows < N)


@triton.jit
def load_lines(ptr, lines, inside):
    return tl.load(ptr + lines, mask=inside, other=0.0)


@triton.jit
def load_inverse(ptr, lines, inside, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Inverse norms; ones where there are none."""
    if ptr is None:
        inverse = tl.full((BLOCK,), 1.0, DTYPE)
    else:
        inverse = tl.load(ptr + lines, mask=inside, other=0.0)
    return inverse


@triton.jit
def similarity_tile(
    x_ptr, y_ptr, matrix_ptr, inverse_x, inverse_y, live_x, live_y, stride_n, stride_m, D, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Similarity [BLOCK_N, BLOCK_M] from these addresses on, zero at padding, which is not read."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if matrix_ptr is None:
        if are_beyond(inverse_x, inverse_x != 0) | are_beyond(inverse_y, inverse_y != 0):
            tile = cosines_of_any_length(
                x_ptr, y_ptr, rows, columns, live_x, live_y, inverse_x, inverse_y, D, PRECISION,
                BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
        else:
            tile = token_products(
                x_ptr, y_ptr, rows, columns, live_x, live_y, D, False, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE
            )
            tile = tile * inverse_x[:, None] * inverse_y[None, :]
    else:
        at = rows[:, None] * stride_n + columns[None, :] * stride_m
        tile = tl.load(matrix_ptr + at, mask=live_x[:, None] & live_y[None, :], other=0.0).to(DTYPE)
    return tile


@triton.jit(do_not_specialize=["N", "M", "t"])
def _strip_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, exponent_ptr, scaling_ptr, new_u_ptr, part_ptr,
    found_ptr, stopped_ptr, N, M, D, stride_n, scale: tl.float64, t, table_ptr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and strip): a round t as far as a strip can do it by itself.

    What the rows lacked before the round [B, P] (``found_ptr``), their new scalings [B, N], and the strip's part of the
    sums over columns [B, P, M]. FIRST: the offsets of its rows [B, N] (rounds.log_kernel), which bring their
    largest entries to one, whether it holds what is not finite, and the largest entries by column.
    LAST: no more than what the rows lack. Without ``matrix_ptr`` tiles are made of tokens.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    if not FIRST:
        if tl.load(stopped_ptr + item) != 0:
            return
    strip = strips(table_ptr, item, tl.cdiv(N, BLOCK_N))[0] + start // BLOCK_N
    part_ptr += strip * M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    smallest: tl.constexpr = SMALLEST64 if DTYPE == tl.float64 else SMALLEST32
    high, low = log_scale(scale, DTYPE)
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    lines = start_x + start_y
    in_x = start + rows < N
    a = load_lines(weights_ptr, lines + start + rows, in_x)
    inverse_x = load_inverse(inverse_ptr, lines + start + rows, in_x, BLOCK_N, DTYPE)
    if matrix_ptr is not None:
        matrix_ptr += (start_x + start) * stride_n
    else:
        x_ptr, y_ptr = x_ptr + (start_x + start) * D, y_ptr + start_y * D

    e_u, rest = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    sign = sign_of(scale, DTYPE)
    if FIRST:
        largest = tl.full((BLOCK_N, BLOCK_M), float("-inf"), DTYPE)
    else:
        e_u = load_lines(exponent_ptr, lines + start + rows, in_x)
        offset = load_lines(offset_ptr, start_x + start + rows, in_x)
        size_a = whole(log_weights(a))  # sums are those of the plan over the weights: numbers, however small these are
        e_u -= size_a
    for first in range(0, M, BLOCK_M):
        at = lines + N + first + columns
        in_y = first + columns < M
        b = load_lines(weights_ptr, at, in_y)
        inverse_y = load_inverse(inverse_ptr, at, in_y, BLOCK_M, DTYPE)
        similarity = similarity_tile(
            x_ptr if matrix_ptr is None else None, y_ptr + wide(first) * D if matrix_ptr is None else None,
            None if matrix_ptr is None else matrix_ptr + first, inverse_x, inverse_y, a != 0, b != 0, stride_n, 1, D,
            PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
        live = (a != 0)[:, None] & (b != 0)[None, :]
        if FIRST:
            largest = tl.maximum(largest, tl.where(live, similarity * sign, float("-inf")))
            rest += similarity * 0.0
        else:
            L = tl.where(live, log_entries(similarity - offset[:, None], high, low), float("-inf"))
            e_v, v = load_lines(exponent_ptr, at, in_y), load_lines(scaling_ptr, at, in_y)
            rest += tl.exp2(L + (e_u[:, None] + e_v[None, :])) * v[None, :]
    if FIRST:
        offset = offsets(tl.max(largest, 1)) * sign
        tl.store(offset_ptr + start_x + start + rows, offset, mask=in_x)
        tl.store(exponent_ptr + lines + start + rows, e_u, mask=in_x)
        tl.store(found_ptr + strip, tl.sum(tl.sum(rest, 1)))
        u = tl.zeros((BLOCK_N,), DTYPE)
    else:
        sums = tl.sum(rest, 1)
        u = load_lines(scaling_ptr, lines + start + rows, in_x)
        a_near_one = a * tl.exp2(-size_a)
        tl.store(found_ptr + strip, tl.sum(tl.abs(u * sums - a_near_one) * tl.exp2(size_a)))
        u = divide(a_near_one, tl.maximum(sums, smallest))
        if not LAST:
            tl.store(new_u_ptr + start_x + start + rows, u, mask=in_x)
            u, e_u = apart(u, e_u + size_a)
    if not LAST:
        for first in range(0, M, BLOCK_M):
            at = lines + N + first + columns
            in_y = first + columns < M
            b = load_lines(weights_ptr, at, in_y)
            inverse_y = load_inverse(inverse_ptr, at, in_y, BLOCK_M, DTYPE)
            similarity = similarity_tile(
                x_ptr if matrix_ptr is None else None, y_ptr + wide(first) * D if matrix_ptr is None else None,
                None if matrix_ptr is None else matrix_ptr + first, inverse_x, inverse_y, a != 0, b != 0, stride_n, 1,
                D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
            live = (a != 0)[:, None] & (b != 0)[None, :]
            L = tl.where(live, log_entries(similarity - offset[:, None], high, low), float("-inf"))
            if FIRST:
                found = tl.max(L, 0)
            else:
                e_v = load_lines(exponent_ptr, at, in_y) - whole(log_weights(b))
                found = tl.sum(tl.exp2(L + (e_u[:, None] + e_v[None, :])) * u[:, None], 0)
            tl.store(part_ptr + first + columns, found, mask=in_y)


@triton.jit
def gather(part_ptr, at, inside, P, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Over the strips of an item, in their order: the sum or the largest of what they have at these columns, of rows as
    wide as this."""
    parts = tl.arange(0, 16)
    found = tl.full((16, BLOCK), float("-inf") if LARGEST else 0.0, DTYPE)
    for first in range(0, P, 16):
        mask = (first + parts < P)[:, None] & inside[None, :]
        part = tl.load(
            part_ptr + (first + parts)[:, None].to(tl.int64) * width + at[None, :],
            mask=mask, other=float("-inf") if LARGEST else 0.0,
        )  # fmt: skip
        found = tl.maximum(found, part) if LARGEST else found + part
    return tl.max(found, 0) if LARGEST else tl.sum(found, 0)


@triton.jit
def sum_found(found_ptr, P, DTYPE: tl.constexpr):
    """Of what the strips of an item have found, in their order."""
    parts = tl.arange(0, 128)
    found = tl.zeros((128,), DTYPE)
    for first in range(0, P, 128):
        found += tl.load(found_ptr + first + parts, mask=first + parts < P, other=0.0)
    return tl.sum(found)


@triton.jit
def history_of(history_ptr, item, kept, lines):
    """Where the rows of an item's history begin, ``kept`` of them, that has so many lines before it. Two numbers are
    before them: what poisons the item, and whether its exponents never move."""
    return history_ptr + 2 * (item + 1) + kept * lines


@triton.jit
def store_exponents(exponents_ptr, history_ptr, exponent, at, inside, lines, num_iters):
    """The exponents [T, N + M] that the scalings of a history are relative to, from the first of them on."""
    stay = tl.load(history_ptr - 1) != 0
    for t in range(0, num_iters):
        tl.store(exponents_ptr + wide(t) * lines + at, exponent, mask=inside)
        _, moved = apart(load_lines(history_ptr, wide(t) * lines + at, inside), exponent)
        exponent = tl.where(stay, exponent, moved)


@triton.jit(do_not_specialize=["N", "M", "P", "t", "num_iters"])
def _gather_kernel(
    weights_ptr, exponent_ptr, first_ptr, scaling_ptr, new_u_ptr, part_ptr, found_ptr, items_ptr, stopped_ptr,
    rounds_ptr, history_ptr, N, M, P, t, num_iters, tol: tl.float64, table_ptr,
    FIRST: tl.constexpr, STOPS: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of lines): makes round t part of the state, unless the item is done.

    The state: exponents and scalings of all lines [B, N + M], whether an item has stopped and its rounds [B]. FIRST
    sets it up. With HISTORY_ALL the scalings of the round are kept, relative to the exponents before it; and FIRST, in
    the backward, finds those exponents again (``first_ptr`` [B, T, N + M]).
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, block, is_rows, index, at = line_block(N, M, BLOCK, table_ptr)
    first_strip, P = strips(table_ptr, item, P)
    part_ptr, found_ptr, width = part_ptr + first_strip * M, found_ptr + first_strip, M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    if FIRST:
        if block == 0:
            tl.store(stopped_ptr + item, 0)
            tl.store(rounds_ptr + item, 0)
            poison = sum_found(found_ptr, P, DTYPE)
            total_a, total_b = tl.load(items_ptr + item * 4 + 2), tl.load(items_ptr + item * 4 + 3)
            tl.store(items_ptr + item * 4, poison + total_a * 0 + total_b * 0)
            tl.store(items_ptr + item * 4 + 1, 0.0)
    else:
        # Not what another program of this launch has found out meanwhile: the warps of this one would see it or not.
        stopped = tl.load(stopped_ptr + item)
        if (stopped != 0) & (stopped <= t):
            return
        if STOPS:
            error = sum_found(found_ptr, P, DTYPE) + tl.load(items_ptr + item * 4)
            if (t > 0) & (error < tol):
                tl.store(stopped_ptr + item, t + 1)
                return
        if block == 0:
            has_mass = tl.load(items_ptr + item * 4 + 2) != 0
            tl.store(rounds_ptr + item, tl.where(has_mass, t + 1, 0))
    smallest: tl.constexpr = SMALLEST64 if DTYPE == tl.float64 else SMALLEST32
    lines, inside = start_x + start_y, index < tl.where(is_rows, N, M)
    weights = load_lines(weights_ptr, lines + at, inside)
    exponent, scaling = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    if is_rows:
        exponent = load_lines(exponent_ptr, lines + at, inside)
        if not FIRST:
            scaling = load_lines(new_u_ptr, start_x + index, inside)
    else:
        found = gather(part_ptr, index, inside, P, width, FIRST, BLOCK, DTYPE)
        if FIRST:
            exponent = -whole(found)
            scaling = tl.where(weights == 0, 0.0, tl.exp2(-exponent))  # what is one before K was scaled
        else:
            exponent = load_lines(exponent_ptr, lines + at, inside)
            near_one = weights * tl.exp2(-whole(log_weights(weights)))  # as the sums are
            scaling = divide(near_one, tl.maximum(found, smallest))
    if HISTORY == HISTORY_ALL:
        history_ptr = history_of(history_ptr, item, num_iters, lines)
        if FIRST:
            exponents_ptr = first_ptr + num_iters * lines
            store_exponents(exponents_ptr, history_ptr, exponent, at, inside, N + M, num_iters)
        else:
            tl.store(history_ptr + wide(t) * (N + M) + at, scaling, mask=inside)
    elif FIRST:
        tl.store(first_ptr + lines + at, exponent, mask=inside)
    if not FIRST:
        scaling, exponent = apart(scaling, exponent)
    tl.store(exponent_ptr + lines + at, exponent, mask=inside)
    tl.store(scaling_ptr + lines + at, scaling, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "P", "num_iters"])
def _finish_kernel(
    weights_ptr, offset_ptr, exponent_ptr, scaling_ptr, found_ptr, items_ptr, f_ptr, g_ptr, error_ptr,
    rounds_ptr, history_ptr, N, M, P, num_iters, scale: tl.float64, table_ptr,
    HISTORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of lines): potentials, what the rows lack, rounds, and the rest of the history.

    A history, 2 + kept (N + M) numbers an item, begins with what poisons the item; then the scalings of every round,
    each relative to the exponents before it; or those of the last, and its exponents.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, block, is_rows, index, at = line_block(N, M, BLOCK, table_ptr)
    first_strip, P = strips(table_ptr, item, P)
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    lines, inside = start_x + start_y, index < tl.where(is_rows, N, M)
    poison = tl.load(items_ptr + item * 4)
    weights = load_lines(weights_ptr, lines + at, inside)
    exponent, scaling = load_lines(exponent_ptr, lines + at, inside), load_lines(scaling_ptr, lines + at, inside)
    logarithm = log_weights(scaling)
    unit = (1.0 / tl.abs(tl.full((), scale, tl.float64)) * LN2).to(DTYPE)
    potential = tl.where(weights == 0, float("-inf"), (logarithm + exponent) * unit) + poison
    if is_rows:
        potential -= load_lines(offset_ptr, start_x + index, inside) * sign_of(scale, DTYPE)
        tl.store(f_ptr + start_x + index, potential, mask=inside)
    else:
        tl.store(g_ptr + start_y + index, potential, mask=inside)
    rounds = tl.load(rounds_ptr + item)
    if block == 0:
        tl.store(error_ptr + item, sum_found(found_ptr + first_strip, P, DTYPE) + poison)
    if HISTORY != HISTORY_NONE:
        history_ptr = history_of(history_ptr, item, num_iters if HISTORY == HISTORY_ALL else LAST_ROWS, lines)
        if block == 0:
            tl.store(history_ptr - 2, poison)
            tl.store(history_ptr - 1, 0.0)
        if HISTORY == HISTORY_LAST:
            tl.store(history_ptr + at, scaling, mask=inside)
            tl.store(history_ptr + N + M + at, exponent, mask=inside)
        else:
            for rest in range(rounds, num_iters):  # of rounds that were not run: zero, not whatever was there
                tl.store(history_ptr + wide(rest) * (N + M) + at, tl.zeros((BLOCK,), DTYPE), mask=inside)


@triton.jit
def log_tile(similarity, offset, live_x, live_y, scale, DTYPE: tl.constexpr):
    """L of a tile, of what is below the offsets of the item's rows, which lie along these; -inf at padding."""
    high, low = log_scale(scale, DTYPE)
    L = log_entries(similarity - offset, high, low)
    return tl.where(live_x[:, None] & live_y[None, :], L, float("-inf"))


@triton.jit
def load_offset(ptr, at_rows, at_columns, in_x, in_y, SWAPPED: tl.constexpr):
    """Offsets of the item's rows, which are the tile's columns if SWAPPED, along these."""
    if SWAPPED:
        offset = tl.load(ptr + at_columns, mask=in_y, other=0.0)[None, :]
    else:
        offset = tl.load(ptr + at_rows, mask=in_x, other=0.0)[:, None]
    return offset


@triton.jit
def plan_tile(L, e_u, u, e_v, v):
    return exp2_of(L, e_u[:, None] + e_v[None, :]) * u[:, None] * v[None, :]


@triton.jit(do_not_specialize=["N", "M"])
def _matrix_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, exponent_ptr, scaling_ptr, items_ptr,
    plan_ptr, similarity_ptr, N, M, D, stride_n, scale: tl.float64, table_ptr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of rows, block of columns): the plan [B, N, M], or the similarity, as is wanted.

    Of packed items the plan is padded, and written as far as the item goes; the similarity is [T_x, M].
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    first = tl.program_id(1) * BLOCK_M
    padded = (item * N + start) * stride_n + first
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    if table_ptr is not None:
        if first >= M:
            return
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    in_x, in_y = start + rows < N, first + columns < M
    at_x, at_y = start_x + start_y + start + rows, start_x + start_y + N + first + columns
    live_x, live_y = load_lines(weights_ptr, at_x, in_x) != 0, load_lines(weights_ptr, at_y, in_y) != 0
    inverse_x = load_inverse(inverse_ptr, at_x, in_x, BLOCK_N, DTYPE)
    inverse_y = load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE)
    corner = (start_x + start) * stride_n + first
    similarity = similarity_tile(
        x_ptr + (start_x + start) * D if matrix_ptr is None else None,
        y_ptr + (start_y + first) * D if matrix_ptr is None else None,
        None if matrix_ptr is None else matrix_ptr + corner, inverse_x, inverse_y, live_x, live_y, stride_n, 1, D,
        PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    entries = rows[:, None] * stride_n + columns[None, :]
    inside = in_x[:, None] & in_y[None, :]
    if similarity_ptr is not None:
        tl.store(similarity_ptr + corner + entries, similarity, mask=inside)
    if plan_ptr is not None:
        L = log_tile(
            similarity, load_lines(offset_ptr, start_x + start + rows, in_x)[:, None], live_x, live_y, scale, DTYPE
        )
        plan = plan_tile(
            L, load_lines(exponent_ptr, at_x, in_x), load_lines(scaling_ptr, at_x, in_x),
            load_lines(exponent_ptr, at_y, in_y), load_lines(scaling_ptr, at_y, in_y),
        )  # fmt: skip
        plan += tl.load(items_ptr + item * 4)
        tl.store(plan_ptr + padded + entries, plan.to(plan_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def _attend_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, exponent_ptr, scaling_ptr, items_ptr, out_ptr,
    N, M, D, stride_n, stride_m, scale: tl.float64, table_ptr,
    SWAPPED: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of rows, block of features): ``out = x + factor (plan y)``, the plan a tile at a time.

    SWAPPED: for the other side all that belongs to x and y has changed places, the strides of the matrix too.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    feature = tl.program_id(1) * BLOCK_F
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), feature + tl.arange(0, BLOCK_F)
    in_x, in_D = start + rows < N, (features < D)[None, :]
    lines = start_x + start_y
    at_x = lines + (M if SWAPPED else 0) + start + rows
    a = load_lines(weights_ptr, at_x, in_x)
    inverse_x = load_inverse(inverse_ptr, at_x, in_x, BLOCK_N, DTYPE)
    e_u, u = load_lines(exponent_ptr, at_x, in_x), load_lines(scaling_ptr, at_x, in_x)
    x_ptr, y_ptr, out_ptr = x_ptr + (start_x + start) * D, y_ptr + start_y * D, out_ptr + (start_x + start) * D
    if matrix_ptr is not None:
        matrix_ptr += (start_y * stride_m if SWAPPED else start_x * stride_n) + start * stride_n
    attended = tl.zeros((BLOCK_N, BLOCK_F), DTYPE)
    for first in range(0, M, BLOCK_M):
        in_y = first + columns < M
        at_y = lines + (0 if SWAPPED else N) + first + columns
        b = load_lines(weights_ptr, at_y, in_y)
        inverse_y = load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE)
        similarity = similarity_tile(
            x_ptr, y_ptr + wide(first) * D, None if matrix_ptr is None else matrix_ptr + wide(first) * stride_m,
            inverse_x, inverse_y, a != 0, b != 0, stride_n, stride_m, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
        offset = load_offset(offset_ptr, start_x + start + rows, start_y + first + columns, in_x, in_y, SWAPPED)
        L = log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE)
        plan = plan_tile(L, e_u, u, load_lines(exponent_ptr, at_y, in_y), load_lines(scaling_ptr, at_y, in_y))
        y = tl.load(
            y_ptr + wide(first) * D + columns[:, None] * D + features[None, :], mask=(b != 0)[:, None] & in_D, other=0.0
        )
        plan_high, plan_low, unit = split(plan, y.dtype)
        attended = dot_split(plan_high, plan_low, unit, y, attended, PRECISION)
    if BARYCENTRIC:
        attended *= (1.0 / tl.where(a == 0, 1.0, a))[:, None]
    at = rows[:, None] * D + features[None, :]
    x = tl.load(x_ptr + at, mask=in_x[:, None] & in_D, other=0.0)
    out = x.to(DTYPE) + attended + tl.load(items_ptr + item * 4)
    tl.store(out_ptr + at, out.to(x.dtype), mask=in_x[:, None] & in_D)
