"""Backward beyond what stays on chip: the adjoint rounds stream what the rounds of the forward streamed.

Rounds are differentiated in reverse from the history of the scalings, as docs/gradients.md has it (Eq. 4), or the fixed
point is, by conjugate gradients (Eq. 7): in strips, as in ``streaming.py``. What the rounds add to the gradient of the
log kernel is made a tile at a time at the end, from the plans of all rounds.

Letters: B batch, N rows and M columns of an item, D features, T rounds, P strips of an item; *lines* are rows and
columns, one after the other. Logarithms are to base two.
"""

import triton
import triton.language as tl

from .attend import dot_split, split
from .constants import DETACH, END, IMPLICIT, LAST_ROWS, LEAST, ROUND, START, STEP, UNROLL
from .places import block_of, is_idle, line_block, place, row_block, strips, wide
from .rounds import apart, inverse, load_passed, small_enough, token_products
from .streaming import (
    gather,
    history_of,
    largest_weight,
    load_inverse,
    load_lines,
    load_offset,
    log_tile,
    plan_tile,
    similarity_tile,
)


@triton.jit
def scalings_of(history_ptr, exponents_ptr, item, num_iters, lines, size, MODE: tl.constexpr):
    """Where the history of an item of this size begins that has so many lines before it, and its exponents."""
    history_ptr = history_of(history_ptr, item, num_iters if MODE == UNROLL else LAST_ROWS, lines)
    if MODE == UNROLL:
        exponents_ptr += num_iters * lines
    else:
        exponents_ptr = history_ptr + size
    return history_ptr, exponents_ptr


@triton.jit
def last_round(rounds_ptr, item, MODE: tl.constexpr):
    """Which row of the history the plan is made of."""
    if MODE == UNROLL:
        last = tl.maximum(tl.load(rounds_ptr + item) - 1, 0)
    else:
        last = 0
    return wide(last)


@triton.jit
def plan_gradient(
    x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr, inverse_a, inverse_b, live_x, live_y,
    stride_n, stride_m, D, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the plan [BLOCK_N, BLOCK_M] from these addresses on; and of it, in the plan's own
    weights, what came by way of x and of y."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    from_x, from_y = tl.zeros((BLOCK_N, BLOCK_M), DTYPE), tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    if grad_x_out_ptr is not None:
        from_x = token_products(
            grad_x_out_ptr, y_ptr, rows, columns, live_x, live_y, D, False, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE
        )
    if grad_y_out_ptr is not None:
        from_y = token_products(
            x_ptr, grad_y_out_ptr, rows, columns, live_x, live_y, D, False, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE
        )
    if BARYCENTRIC:
        grad = from_x * inverse_a[:, None] + from_y * inverse_b[None, :]
    else:
        grad = from_x + from_y
    if grad_plan_ptr is not None:
        at = rows[:, None] * stride_n + columns[None, :] * stride_m
        grad += tl.load(grad_plan_ptr + at, mask=live_x[:, None] & live_y[None, :], other=0.0).to(DTYPE)
    return grad, from_x, from_y


@triton.jit
def load_scalings(history_ptr, exponents_ptr, at, inside):
    """Of a round, in whose row these are: numbers, and the exponents of two that they are multiplied by."""
    return apart(load_lines(history_ptr, at, inside), load_lines(exponents_ptr, at, inside))


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _start_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr,
    rounds_ptr, history_ptr, exponents_ptr, rows_ptr, part_ptr,
    N, M, D, stride_n, all_rows, scale: tl.float64, num_iters, table_ptr,
    MODE: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and strip): sums over rows [3, B, N] and the strip's over columns [3, B, P, M] of the plan times
    its gradient; of what of that came by way of x (rows), of y (columns); of the plan."""
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    padded, kind = (item * N + start) * stride_n, wide(tl.num_programs(0)) * M
    part_ptr += (strips(table_ptr, item, tl.cdiv(N, BLOCK_N))[0] + start // BLOCK_N) * M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    lines = start_x + start_y
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    in_x, at_x = start + rows < N, lines + start + rows
    offset = load_lines(offset_ptr, start_x + start + rows, in_x)[:, None]
    a, inverse_x = load_lines(weights_ptr, at_x, in_x), load_inverse(inverse_ptr, at_x, in_x, BLOCK_N, DTYPE)
    history_ptr, exponents_ptr = scalings_of(history_ptr, exponents_ptr, item, num_iters, lines, N + M, MODE)
    last = last_round(rounds_ptr, item, MODE) * (N + M)
    u, e_u = load_scalings(history_ptr, exponents_ptr, last + start + rows, in_x)
    matrix_ptr = None if matrix_ptr is None else matrix_ptr + (start_x + start) * stride_n
    grad_plan_ptr = None if grad_plan_ptr is None else grad_plan_ptr + padded
    x_ptr = None if x_ptr is None else x_ptr + (start_x + start) * D
    grad_x_out_ptr = None if grad_x_out_ptr is None else grad_x_out_ptr + (start_x + start) * D
    y_ptr = None if y_ptr is None else y_ptr + start_y * D
    grad_y_out_ptr = None if grad_y_out_ptr is None else grad_y_out_ptr + start_y * D
    sums, sums_x, sums_plan = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE)
    for first in range(0, M, BLOCK_M):
        in_y, at_y = first + columns < M, lines + N + first + columns
        b, inverse_y = load_lines(weights_ptr, at_y, in_y), load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE)
        step = wide(first) * D
        similarity = similarity_tile(
            x_ptr, None if y_ptr is None else y_ptr + step, None if matrix_ptr is None else matrix_ptr + first,
            inverse_x, inverse_y, a != 0, b != 0, stride_n, 1,
            D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
        L = log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE)
        v, e_v = load_scalings(history_ptr, exponents_ptr, last + N + first + columns, in_y)
        plan = plan_tile(L, e_u, u, e_v, v)
        grad, from_x, from_y = plan_gradient(
            x_ptr, None if y_ptr is None else y_ptr + step, grad_x_out_ptr,
            None if grad_y_out_ptr is None else grad_y_out_ptr + step,
            None if grad_plan_ptr is None else grad_plan_ptr + first,
            inverse(a), inverse(b), a != 0, b != 0, stride_n, 1, D, BARYCENTRIC, PRECISION,
            BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
        sums += tl.sum(grad * plan, 1)
        tl.store(part_ptr + first + columns, tl.sum(grad * plan, 0), mask=in_y)
        if BARYCENTRIC:
            sums_x += tl.sum(from_x * plan, 1)
            tl.store(part_ptr + kind + first + columns, tl.sum(from_y * plan, 0), mask=in_y)
        if MODE == IMPLICIT:
            sums_plan += tl.sum(plan, 1)
            tl.store(part_ptr + 2 * kind + first + columns, tl.sum(plan, 0), mask=in_y)
    rows_ptr += start_x + start
    tl.store(rows_ptr + rows, sums, mask=in_x)
    if BARYCENTRIC:
        tl.store(rows_ptr + wide(all_rows) + rows, sums_x, mask=in_x)
    if MODE == IMPLICIT:
        tl.store(rows_ptr + 2 * wide(all_rows) + rows, sums_plan, mask=in_x)


@triton.jit(do_not_specialize=["N", "M", "P", "num_iters"])
def _started_kernel(
    weights_ptr, grad_f_ptr, grad_g_ptr, rounds_ptr, rows_ptr, part_ptr, start_ptr, attended_ptr, sums_ptr, pull_ptr,
    total_ptr, N, M, P, all_rows, all_strips, scale: tl.float64, num_iters, table_ptr,
    MODE: tl.constexpr, BARYCENTRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of lines): the gradients of log_u and log_v [B, N + M] (``start_ptr``), natural
    logarithms; what weights lose by way of what was attended to; the plan's sums; and, of the last round run, what is
    pulled through the columns."""
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, _, is_rows, index, at = line_block(N, M, BLOCK, table_ptr)
    first_strip, P = strips(table_ptr, item, P)
    width = M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    inside, lines = index < tl.where(is_rows, N, M), start_x + start_y
    unit = (1.0 / tl.abs(tl.full((), scale, tl.float64))).to(DTYPE)  # f = log(u) / |scale|
    weights = load_lines(weights_ptr, lines + at, inside)
    for kind in tl.static_range(3):
        if kind == 0 or (kind == 1 and BARYCENTRIC) or (kind == 2 and MODE == IMPLICIT):
            if is_rows:
                found = load_lines(rows_ptr, kind * wide(all_rows) + start_x + index, inside)
            else:
                part = part_ptr + (kind * wide(all_strips) + first_strip) * width
                found = gather(part, index, inside, P, width, False, BLOCK, DTYPE)
            if kind == 0:
                if is_rows:
                    if grad_f_ptr is not None:
                        sent = tl.load(grad_f_ptr + start_x + index, mask=inside & (weights != 0), other=0.0)
                        found += unit * sent.to(DTYPE)
                else:
                    if grad_g_ptr is not None:
                        sent = tl.load(grad_g_ptr + start_y + index, mask=inside & (weights != 0), other=0.0)
                        found += unit * sent.to(DTYPE)
                tl.store(start_ptr + lines + at, found, mask=inside)
                if MODE == UNROLL:
                    rounds = tl.load(rounds_ptr + item)
                    total = tl.where(is_rows | (rounds == 0), 0.0, found)
                    tl.store(total_ptr + lines + at, total, mask=inside)
                    if rounds > 0:
                        if not is_rows:
                            where = pull_ptr + num_iters * lines + wide(rounds - 1) * (N + M) + at
                            tl.store(where, found * inverse(weights), mask=inside)
            elif kind == 1:
                tl.store(attended_ptr + lines + at, found, mask=inside)
            else:
                tl.store(sums_ptr + lines + at, found, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "num_iters", "t"])
def _adjoint_strip_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, rounds_ptr, history_ptr, exponents_ptr, start_ptr,
    sums_ptr, pull_ptr, total_ptr, done_ptr, part_ptr, N, M, D, stride_n, scale: tl.float64, num_iters, t, table_ptr,
    PHASE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and strip): what a strip can do of a product with the plan by rows, then by columns.

    ROUND: the adjoint of round t; pulled through the columns is row t of ``pull_ptr`` [B, T, N + M], which gets what is
    pulled through the rows. The phases of conjugate gradients: ``pull_ptr`` [B, M] is what the plan is multiplied by;
    at the END it is the columns of ``total_ptr`` [B, N + M], the answer, whose rows are made of them.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    part_ptr += (strips(table_ptr, item, tl.cdiv(N, BLOCK_N))[0] + start // BLOCK_N) * M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    lines = start_x + start_y
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    MODE: tl.constexpr = UNROLL if PHASE == ROUND else IMPLICIT
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    in_x, at_x = start + rows < N, lines + start + rows
    history_ptr, exponents_ptr = scalings_of(history_ptr, exponents_ptr, item, num_iters, lines, N + M, MODE)
    rounds = num_iters
    if PHASE == ROUND:
        rounds = tl.load(rounds_ptr + item)
        if t >= rounds:
            return
        row = wide(t) * (N + M)
        history_ptr += row
        exponents_ptr += row
        pull_ptr += num_iters * lines + row + N
    elif PHASE == END:
        pull_ptr = total_ptr + lines + N
    else:
        pull_ptr += start_y
    if PHASE == STEP:
        if tl.load(done_ptr + item) != 0:
            return
    offset = load_lines(offset_ptr, start_x + start + rows, in_x)[:, None]
    a, inverse_x = load_lines(weights_ptr, at_x, in_x), load_inverse(inverse_ptr, at_x, in_x, BLOCK_N, DTYPE)
    u, e_u = load_scalings(history_ptr, exponents_ptr, start + rows, in_x)
    matrix_ptr = None if matrix_ptr is None else matrix_ptr + (start_x + start) * stride_n
    x_ptr = None if x_ptr is None else x_ptr + (start_x + start) * D
    y_ptr = None if y_ptr is None else y_ptr + start_y * D

    sums = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    if PHASE != START:
        for first in range(0, M, BLOCK_M):
            in_y, at_y = first + columns < M, lines + N + first + columns
            b, inverse_y = load_lines(weights_ptr, at_y, in_y), load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE)
            similarity = similarity_tile(
                x_ptr, None if y_ptr is None else y_ptr + wide(first) * D,
                None if matrix_ptr is None else matrix_ptr + first, inverse_x, inverse_y,
                a != 0, b != 0, stride_n, 1, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
            L = log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE)
            v, e_v = load_scalings(history_ptr, exponents_ptr, N + first + columns, in_y)
            # Where the weight is small the plan is, and what is pulled is large.
            v, e_v = apart(v * load_lines(pull_ptr, first + columns, in_y), e_v)
            sums += tl.exp2(L + (e_u[:, None] + e_v[None, :])) * v[None, :]
    product = u * tl.sum(sums, 1)
    if PHASE == ROUND:
        if t == rounds - 1:
            grad = load_lines(start_ptr, at_x, in_x) - product
        else:
            grad = -product
        tl.store(total_ptr + at_x, load_lines(total_ptr, at_x, in_x) + grad, mask=in_x)
        pulled = grad * inverse(a)
        tl.store(pull_ptr - N + start + rows, pulled, mask=in_x)
    else:
        inverse_r = inverse(load_lines(sums_ptr, at_x, in_x))
        if PHASE == STEP:
            pulled = product * inverse_r
        else:
            pulled = (load_lines(start_ptr, at_x, in_x) - product) * inverse_r
        if PHASE == END:
            tl.store(total_ptr + at_x, pulled, mask=in_x)
    if PHASE != END:
        u, e_u = apart(u * pulled, e_u)
        for first in range(0, M, BLOCK_M):
            in_y, at_y = first + columns < M, lines + N + first + columns
            b, inverse_y = load_lines(weights_ptr, at_y, in_y), load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE)
            similarity = similarity_tile(
                x_ptr, None if y_ptr is None else y_ptr + wide(first) * D,
                None if matrix_ptr is None else matrix_ptr + first, inverse_x, inverse_y,
                a != 0, b != 0, stride_n, 1, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
            L = log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE)
            if PHASE == ROUND:  # what the columns had before the round
                v, e_v = load_before(history_ptr, exponents_ptr, t, N + first + columns, in_y, N + M)
            else:
                v, e_v = load_scalings(history_ptr, exponents_ptr, N + first + columns, in_y)
            found = v * tl.sum(tl.exp2(L + (e_u[:, None] + e_v[None, :])) * u[:, None], 0)
            tl.store(part_ptr + first + columns, found, mask=in_y)


@triton.jit
def load_before(history_ptr, exponents_ptr, t, at, inside, lines):
    """The same of the round before round t, in whose row these are; before the first they are one."""
    inside = inside & (at < tl.where(t == 0, 0, lines))
    number = tl.load(history_ptr + at - lines, mask=inside, other=1.0)
    return apart(number, load_lines(exponents_ptr, at - lines, inside))


@triton.jit(do_not_specialize=["N", "M", "P", "num_iters", "t"])
def _adjoint_gather_kernel(
    weights_ptr, rounds_ptr, part_ptr, pull_ptr, total_ptr, N, M, P, num_iters, t, table_ptr, BLOCK: tl.constexpr
):
    """Programs (item and block of columns): what round t leaves to the columns of the round before."""
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, block = block_of(table_ptr, tl.cdiv(M, BLOCK))
    columns = block * BLOCK + tl.arange(0, BLOCK)
    if t >= tl.load(rounds_ptr + item):
        return
    first_strip, P = strips(table_ptr, item, P)
    width = M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    lines = start_x + start_y
    inside, at = columns < M, lines + N + columns
    grad = -gather(part_ptr + first_strip * width, columns, inside, P, width, False, BLOCK, DTYPE)
    tl.store(total_ptr + at, load_lines(total_ptr, at, inside) + grad, mask=inside)
    pulled = grad * inverse(load_lines(weights_ptr, at, inside))
    tl.store(pull_ptr + num_iters * lines + wide(t - 1) * (N + M) + N + columns, pulled, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "P"])
def _gradients_kernel(
    start_ptr, sums_ptr, part_ptr, mapped_ptr, residual_ptr, direction_ptr, total_ptr, numbers_ptr, done_ptr,
    N, M, P, table_ptr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (item): a step of conjugate gradients for the columns, as ``attend_backward.implicit`` takes it.

    Their state: residual and direction [B, M], the answer in the columns of ``total_ptr`` [B, N + M], and of
    ``numbers_ptr`` [B, 4] the residual's square, the one that is small enough, and the lift. FIRST: from the strips'
    part of what the rows leave.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, _ = block_of(table_ptr, 1)
    DTYPE: tl.constexpr = total_ptr.dtype.element_ty
    numbers_ptr += item * 4
    if not FIRST:
        if tl.load(done_ptr + item) != 0:
            return
    first_strip, P = strips(table_ptr, item, P)
    part_ptr, width = part_ptr + first_strip * M, M
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    columns, lines = tl.arange(0, BLOCK), start_x + start_y + N
    residual_ptr, direction_ptr, mapped_ptr = residual_ptr + start_y, direction_ptr + start_y, mapped_ptr + start_y
    rounding: tl.constexpr = 2.2e-16 if DTYPE == tl.float64 else 1.2e-7
    along, new_product, lift = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    if FIRST:
        largest, least = tl.zeros((BLOCK,), DTYPE), tl.full((BLOCK,), float("inf"), DTYPE)
        for first in range(0, M, BLOCK):
            at, inside = first + columns, first + columns < M
            residual = load_lines(start_ptr, lines + at, inside)
            residual -= gather(part_ptr, at, inside, P, width, False, BLOCK, DTYPE)
            sums = load_lines(sums_ptr, lines + at, inside)
            direction = residual * inverse(sums)
            new_product += residual * direction
            lift += sums * direction
            largest = tl.maximum(largest, sums)
            least = tl.where(sums > 0, tl.minimum(least, sums), least)
            tl.store(residual_ptr + at, residual, mask=inside)
            tl.store(direction_ptr + at, direction, mask=inside)
            tl.store(total_ptr + lines + at, tl.zeros((BLOCK,), DTYPE), mask=inside)
        product = tl.sum(new_product)
        most = tl.max(largest)
        enough = small_enough(product, tl.minimum(tl.min(least), most), most)
        tl.store(numbers_ptr + 1, enough)
    else:
        old_product, enough, old_lift = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
        for first in range(0, M, BLOCK):
            at, inside = first + columns, first + columns < M
            sums, direction = load_lines(sums_ptr, lines + at, inside), load_lines(direction_ptr, at, inside)
            mapped = sums * ((1 + 10 * rounding) * direction + old_lift)
            mapped -= gather(part_ptr, at, inside, P, width, False, BLOCK, DTYPE)
            along += direction * mapped
            tl.store(mapped_ptr + at, mapped, mask=inside)
        length = old_product / tl.sum(along)
        tl.debug_barrier()  # what has been stored is read again
        for first in range(0, M, BLOCK):
            at, inside = first + columns, first + columns < M
            residual = load_lines(residual_ptr, at, inside) - length * load_lines(mapped_ptr, at, inside)
            total = load_lines(total_ptr, lines + at, inside) + length * load_lines(direction_ptr, at, inside)
            new_product += residual * (residual * inverse(load_lines(sums_ptr, lines + at, inside)))
            tl.store(residual_ptr + at, residual, mask=inside)
            tl.store(total_ptr + lines + at, total, mask=inside)
        product = tl.sum(new_product)
        tl.debug_barrier()
        for first in range(0, M, BLOCK):
            at, inside = first + columns, first + columns < M
            sums = load_lines(sums_ptr, lines + at, inside)
            direction = load_lines(residual_ptr, at, inside) * inverse(sums)
            direction += product / old_product * load_lines(direction_ptr, at, inside)
            lift += sums * direction
            tl.store(direction_ptr + at, direction, mask=inside)
    tl.store(numbers_ptr, product)
    tl.store(numbers_ptr + 2, tl.sum(lift))
    tl.store(done_ptr + item, tl.where(product > enough, 0, 1))


@triton.jit
def matrix_gradient(
    L, grad_plan, history_ptr, exponents_ptr, pull_ptr, total_ptr, rounds, at_rows, at_columns, in_x, in_y, N, M,
    poison, scale, SWAPPED: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the similarity or cost [BLOCK_N, BLOCK_M], and the tile of the plan.

    ``at_rows`` and ``at_columns`` are where the tile's lines stand among the item's; N + M of them. SWAPPED: the tile's
    rows are columns of the item.
    """
    last = wide(tl.maximum(rounds - 1, 0) if MODE == UNROLL else 0) * (N + M)
    u, e_u = load_scalings(history_ptr, exponents_ptr, last + at_rows, in_x)
    v, e_v = load_scalings(history_ptr, exponents_ptr, last + at_columns, in_y)
    plan = plan_tile(L, e_u, u, e_v, v)
    grad = tl.zeros_like(plan)
    if MODE != DETACH:
        grad = grad_plan * plan
    if MODE == IMPLICIT:
        total_x, total_y = load_lines(total_ptr, at_rows, in_x), load_lines(total_ptr, at_columns, in_y)
        grad -= plan * (total_x[:, None] + total_y[None, :])
    if MODE == UNROLL:
        for back in range(0, rounds):
            t = rounds - 1 - back
            row = wide(t) * (N + M)
            now, moved, pulled = history_ptr + row, exponents_ptr + row, pull_ptr + row
            u, e_u = load_scalings(now, moved, at_rows, in_x)
            v, e_v = load_scalings(now, moved, at_columns, in_y)
            pull_x, pull_y = load_lines(pulled, at_rows, in_x), load_lines(pulled, at_columns, in_y)
            if SWAPPED:  # rows of the tile are what was last updated
                grad -= plan_tile(L, e_u, u * pull_x, e_v, v)
                u, e_u = load_before(now, moved, t, at_rows, in_x, N + M)
                grad -= plan_tile(L, e_u, u, e_v, v * pull_y)
            else:
                grad -= plan_tile(L, e_u, u, e_v, v * pull_y)
                v, e_v = load_before(now, moved, t, at_columns, in_y, N + M)
                grad -= plan_tile(L, e_u, u * pull_x, e_v, v)
    return grad * tl.full((), scale, tl.float64).to(DTYPE) + poison, plan


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _matrix_gradient_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr,
    rounds_ptr, history_ptr, exponents_ptr, pull_ptr, total_ptr, grad_ptr, N, M, D, stride_n, scale: tl.float64,
    num_iters, table_ptr, MODE: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of rows, block of columns): the gradient of the similarity or cost [B, N, M].

    Of packed items it is [T_x, M], and that of the plan, which is read, padded.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    first = tl.program_id(1) * BLOCK_M
    padded = (item * N + start) * stride_n + first
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    lines = start_x + start_y
    if table_ptr is not None:
        if first >= M:
            return
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    in_x, in_y = start + rows < N, first + columns < M
    at_x, at_y = lines + start + rows, lines + N + first + columns
    a, b = load_lines(weights_ptr, at_x, in_x), load_lines(weights_ptr, at_y, in_y)
    offset = load_lines(offset_ptr, start_x + start + rows, in_x)[:, None]
    corner, at = (start_x + start) * stride_n + first, rows[:, None] * stride_n + columns[None, :]
    x_ptr = None if x_ptr is None else x_ptr + (start_x + start) * D
    grad_x_out_ptr = None if grad_x_out_ptr is None else grad_x_out_ptr + (start_x + start) * D
    y_ptr = None if y_ptr is None else y_ptr + (start_y + first) * D
    grad_y_out_ptr = None if grad_y_out_ptr is None else grad_y_out_ptr + (start_y + first) * D
    similarity = similarity_tile(
        x_ptr, y_ptr, None if matrix_ptr is None else matrix_ptr + corner,
        load_inverse(inverse_ptr, at_x, in_x, BLOCK_N, DTYPE),
        load_inverse(inverse_ptr, at_y, in_y, BLOCK_M, DTYPE), a != 0, b != 0, stride_n, 1, D,
        PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    grad_plan, _, _ = plan_gradient(
        x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, None if grad_plan_ptr is None else grad_plan_ptr + padded,
        inverse(a), inverse(b),
        a != 0, b != 0, stride_n, 1, D, BARYCENTRIC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
    )  # fmt: skip
    history_ptr, exponents_ptr = scalings_of(history_ptr, exponents_ptr, item, num_iters, lines, N + M, MODE)
    grad, _ = matrix_gradient(
        log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE), grad_plan, history_ptr, exponents_ptr,
        None if pull_ptr is None else pull_ptr + num_iters * lines, None if total_ptr is None else total_ptr + lines,
        tl.load(rounds_ptr + item),
        start + rows, N + first + columns, in_x, in_y, N, M, tl.load(history_ptr - 2), scale,
        False, MODE, DTYPE,
    )  # fmt: skip
    tl.store(grad_ptr + corner + at, grad.to(grad_ptr.dtype.element_ty), mask=in_x[:, None] & in_y[None, :])


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _pull_kernel(
    x_ptr, y_ptr, matrix_ptr, inverse_ptr, weights_ptr, offset_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_plan_ptr,
    grad_similarity_ptr, rounds_ptr, history_ptr, exponents_ptr, pull_ptr, total_ptr, grad_ptr, grad_x_ptr,
    N, M, D, stride_n, stride_m, scale: tl.float64, num_iters, table_ptr,
    SWAPPED: tl.constexpr, COSINE: tl.constexpr, MODE: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Programs (item and block of rows, block of features): the gradient of x, through the similarity and as what was
    attended to. With ``grad_ptr`` the gradient of the similarity is read, without it made anew.

    SWAPPED: the gradient of y; all that belongs to x and y has changed places.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, start = row_block(N, BLOCK_N, table_ptr)
    padded = (item * M * stride_m if SWAPPED else item * N * stride_n) + start * stride_n
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    feature = tl.program_id(1) * BLOCK_F
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), feature + tl.arange(0, BLOCK_F)
    in_x, in_D, lines = start + rows < N, (features < D)[None, :], start_x + start_y
    line_x = (M if SWAPPED else 0) + start + rows
    a = load_lines(weights_ptr, lines + line_x, in_x)
    inverse_x = load_inverse(inverse_ptr, lines + line_x, in_x, BLOCK_N, DTYPE)
    corner = (start_y * stride_m if SWAPPED else start_x * stride_n) + start * stride_n
    matrix_ptr = None if matrix_ptr is None else matrix_ptr + corner
    grad_ptr = None if grad_ptr is None else grad_ptr + corner
    grad_plan_ptr = None if grad_plan_ptr is None else grad_plan_ptr + padded
    grad_similarity_ptr = None if grad_similarity_ptr is None else grad_similarity_ptr + padded
    x_ptr = x_ptr + (start_x + start) * D
    grad_x_out_ptr = None if grad_x_out_ptr is None else grad_x_out_ptr + (start_x + start) * D
    y_ptr, grad_y_out_ptr = y_ptr + start_y * D, None if grad_y_out_ptr is None else grad_y_out_ptr + start_y * D
    rounds = tl.load(rounds_ptr + item)
    history_ptr, exponents_ptr = scalings_of(history_ptr, exponents_ptr, item, num_iters, lines, N + M, MODE)
    poison = tl.load(history_ptr - 2)
    pull_ptr = None if pull_ptr is None else pull_ptr + num_iters * lines
    total_ptr = None if total_ptr is None else total_ptr + lines
    # Inverse norms come last, as in attend_backward.pull_side: what is not to be multiplied by them is added apart.
    grad_x, attended = tl.zeros((BLOCK_N, BLOCK_F), DTYPE), tl.zeros((BLOCK_N, BLOCK_F), DTYPE)
    weighed = tl.zeros((BLOCK_N,), DTYPE)
    at = rows[:, None] * stride_n + columns[None, :] * stride_m
    for first in range(0, M, BLOCK_M):
        in_y, line_y = first + columns < M, (0 if SWAPPED else N) + first + columns
        b = load_lines(weights_ptr, lines + line_y, in_y)
        inverse_y = load_inverse(inverse_ptr, lines + line_y, in_y, BLOCK_M, DTYPE)
        step, along = wide(first) * D, wide(first) * stride_m
        live = (a != 0)[:, None] & (b != 0)[None, :]
        similarity = similarity_tile(
            x_ptr, y_ptr + step, None if matrix_ptr is None else matrix_ptr + along, inverse_x, inverse_y, a != 0,
            b != 0, stride_n, stride_m,
            D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
        )  # fmt: skip
        offset = load_offset(offset_ptr, start_x + start + rows, start_y + first + columns, in_x, in_y, SWAPPED)
        L = log_tile(similarity, offset, a != 0, b != 0, scale, DTYPE)
        if grad_ptr is None:
            grad_plan = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
            if MODE != DETACH:
                grad_plan, _, _ = plan_gradient(
                    x_ptr, y_ptr + step, grad_x_out_ptr, None if grad_y_out_ptr is None else grad_y_out_ptr + step,
                    None if grad_plan_ptr is None else grad_plan_ptr + along,
                    inverse(a), inverse(b), a != 0, b != 0, stride_n, stride_m, D, BARYCENTRIC, PRECISION,
                    BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
                )  # fmt: skip
            grad, plan = matrix_gradient(
                L, grad_plan, history_ptr, exponents_ptr, pull_ptr, total_ptr, rounds, line_x, line_y, in_x, in_y, N, M,
                poison, scale, SWAPPED, MODE, DTYPE,
            )  # fmt: skip
        else:
            last = wide(tl.maximum(rounds - 1, 0) if MODE == UNROLL else 0) * (N + M)
            u, e_u = load_scalings(history_ptr, exponents_ptr, last + line_x, in_x)
            v, e_v = load_scalings(history_ptr, exponents_ptr, last + line_y, in_y)
            plan = plan_tile(L, e_u, u, e_v, v)
            grad = tl.load(grad_ptr + along + at, mask=live, other=0.0)
        if grad_similarity_ptr is not None:
            grad += tl.load(grad_similarity_ptr + along + at, mask=live, other=0.0).to(DTYPE)
        if COSINE:
            weighed += tl.sum(grad * similarity, 1)
            grad = grad * inverse_y[None, :]
        step, at_y = wide(first) * D, columns[:, None] * D + features[None, :]
        y = tl.load(y_ptr + step + at_y, mask=(b != 0)[:, None] & in_D, other=0.0)
        high, low, unit = split(grad, y.dtype)
        grad_x = dot_split(high, low, unit, y, grad_x, PRECISION)
        if grad_y_out_ptr is not None:
            if BARYCENTRIC:
                plan *= inverse(b)[None, :]
            grad_y_out = tl.load(grad_y_out_ptr + step + at_y, mask=(b != 0)[:, None] & in_D, other=0.0)
            high, low, unit = split(plan, y.dtype)
            attended = dot_split(high, low, unit, grad_y_out, attended, PRECISION)
    at_x = rows[:, None] * D + features[None, :]
    inside = in_x[:, None] & in_D
    if COSINE:
        x = tl.load(x_ptr + at_x, mask=(a != 0)[:, None] & inside, other=0.0).to(DTYPE)
        grad_x = (grad_x - (weighed * inverse_x)[:, None] * x) * inverse_x[:, None]
    grad_x += attended
    # At padding nothing but the residual's own gradient, even if the item is NaN: as attend_backward.pull_side.
    grad_x = tl.where((a != 0)[:, None], grad_x, 0.0)
    if grad_x_out_ptr is not None:
        grad_x += tl.load(grad_x_out_ptr + at_x, mask=inside, other=0.0).to(DTYPE)
    grad_x_ptr += (start_x + start) * D
    tl.store(grad_x_ptr + at_x, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _weight_gradient_kernel(
    passed_ptr, weights_ptr, items_ptr, history_ptr, total_ptr, attended_ptr, grad_ptr, N, M, num_iters, table_ptr,
    SWAPPED: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (item): the gradient of the weights of one side [B, N], as attend_backward.store_weight_gradient.

    SWAPPED: as in ``_pull_kernel``.
    """
    if table_ptr is not None:
        if is_idle(table_ptr):
            return
    item, _ = block_of(table_ptr, 1)
    start_x, start_y, N, M = place(table_ptr, item, N, M)
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty
    lines, index = start_x + start_y, tl.arange(0, BLOCK)
    poison = tl.load(history_of(history_ptr, item, num_iters if MODE == UNROLL else LAST_ROWS, lines) - 2)
    divided_by = tl.load(items_ptr + item * 4 + (3 if SWAPPED else 2))
    if SWAPPED:
        lines += M
    mean = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, N, BLOCK):
        at, inside = lines + start + index, start + index < N
        weights = load_lines(weights_ptr, at, inside)
        mean += weights * of_weights(total_ptr, attended_ptr, at, inside, weights, MODE)
    mean = tl.sum(mean)
    largest = largest_weight(passed_ptr, start_x, N, BLOCK, DTYPE)
    for start in range(0, N, BLOCK):
        at, inside = lines + start + index, start + index < N
        weights = load_lines(weights_ptr, at, inside)
        grad = (of_weights(total_ptr, attended_ptr, at, inside, weights, MODE) - mean) * inverse(divided_by)
        passed = load_passed(passed_ptr, start_x + start + index, inside, DTYPE)
        grad = tl.where(passed / largest < LEAST, 0.0, grad.to(passed.dtype) / largest)
        grad = tl.where(weights == 0, 0.0, grad + poison)
        tl.store(grad_ptr + start_x + start + index, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def of_weights(total_ptr, attended_ptr, at, inside, weights, MODE: tl.constexpr):
    """The gradient of weights that sum to one."""
    grad = tl.zeros_like(weights)
    if MODE != DETACH:
        grad = load_lines(total_ptr, at, inside)
    if MODE == UNROLL:
        grad *= inverse(weights)
    if attended_ptr is not None:
        grad -= load_lines(attended_ptr, at, inside) * inverse(weights) * inverse(weights)
    return grad
