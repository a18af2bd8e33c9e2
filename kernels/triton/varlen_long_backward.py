"""Packed items that fit no tile on chip, backward: what ``attend_backward.py`` does, over matrices in memory.

Three launches: the products of tokens and gradients, a program for every block of rows (``varlen_long.py``); the rounds
in reverse, or the fixed point, one program an item; and the gradients of tokens, a program for every block of them.

Letters: B batch, N and M tokens of an item, T_x and T_y of all items, D features; a line is a row or a column.
"""

import triton
import triton.language as tl

from .attend import dot_split, split
from .attend_backward import DETACH, UNROLL, inverse, load_or_zero
from .rounds import LN2, load_live
from .varlen import span, suits
from .varlen_long import (
    finite,
    line_sums,
    load_log,
    load_tile,
    log2_or_infinity,
    marginal_at,
    store_tile,
    totals,
)


@triton.jit
def line_products(
    matrix_ptr, other_ptr, lines, line_stride, other_stride, num_lines, num_others,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Of a matrix, these lines, with a vector."""
    total = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
    for start in range(0, num_others, BLOCK_OTHER):
        others = start + tl.arange(0, BLOCK_OTHER)
        tile = load_tile(matrix_ptr, lines, others, line_stride, other_stride, num_lines, num_others, 0.0)
        total += tile * tl.load(other_ptr + others, mask=others < num_others, other=0.0)[None, :]
    return tl.sum(total, 1)


@triton.jit
def pull_lines(
    L_ptr, G_ptr, log_ptr, other_ptr, pull_ptr, lines, line_stride, other_stride, num_lines, num_others,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Takes ``exp2(L + log + log_other) pull_other`` from G, at these lines; and the sums of it."""
    total = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
    log_line = load_log(log_ptr, lines, num_lines)
    for start in range(0, num_others, BLOCK_OTHER):
        others = start + tl.arange(0, BLOCK_OTHER)
        L = load_tile(L_ptr, lines, others, line_stride, other_stride, num_lines, num_others, float("-inf"))
        G = load_tile(G_ptr, lines, others, line_stride, other_stride, num_lines, num_others, 0.0)
        plan = tl.exp2((L + log_line[:, None]) + load_log(other_ptr, others, num_others)[None, :])
        pulled = plan * tl.load(pull_ptr + others, mask=others < num_others, other=0.0)[None, :]
        store_tile(G_ptr, G - pulled, lines, others, line_stride, other_stride, num_lines, num_others)
        total += pulled
    return tl.sum(total, 1)


@triton.jit
def unroll_long(
    L_ptr, G_ptr, history_ptr, start_v_ptr, num_rounds, d_u_ptr, d_v_ptr, pull_x_ptr, pull_y_ptr,
    grad_a_ptr, grad_b_ptr, N, M, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """As ``unroll_log``; ``start_v_ptr`` has the log scalings before the first round, ``grad_*`` sums to add to."""
    places = tl.arange(0, BLOCK)
    t = num_rounds - 1
    while t >= 0:
        u_ptr = history_ptr + t * (N + M)
        v_ptr = u_ptr + N
        for start in range(0, M, BLOCK):
            columns = start + places
            inside = columns < M
            log_v = load_log(v_ptr, columns, M)
            sums = line_sums(L_ptr, u_ptr, columns, finite(log_v), 1, M, M, N, DTYPE, BLOCK, BLOCK_OTHER)
            d_v = tl.load(d_v_ptr + columns, mask=inside, other=0.0)
            grad_b = tl.load(grad_b_ptr + columns, mask=inside, other=0.0)
            tl.store(pull_y_ptr + columns, d_v * inverse(sums), mask=inside)
            tl.store(grad_b_ptr + columns, grad_b + d_v, mask=inside)
        tl.debug_barrier()
        before_ptr = v_ptr - (N + M)
        if t == 0:
            before_ptr = start_v_ptr
        for start in range(0, N, BLOCK):
            rows = start + places
            inside = rows < N
            d_u = tl.load(d_u_ptr + rows, mask=inside, other=0.0) - pull_lines(
                L_ptr, G_ptr, u_ptr, v_ptr, pull_y_ptr, rows, M, 1, N, M, DTYPE, BLOCK, BLOCK_OTHER
            )
            log_u = finite(load_log(u_ptr, rows, N))
            sums = line_sums(L_ptr, before_ptr, rows, log_u, M, 1, N, M, DTYPE, BLOCK, BLOCK_OTHER)
            grad_a = tl.load(grad_a_ptr + rows, mask=inside, other=0.0)
            tl.store(pull_x_ptr + rows, d_u * inverse(sums), mask=inside)
            tl.store(grad_a_ptr + rows, grad_a + d_u, mask=inside)
            tl.store(d_u_ptr + rows, tl.zeros_like(d_u), mask=inside)
        tl.debug_barrier()
        for start in range(0, M, BLOCK):
            columns = start + places
            d_v = -pull_lines(
                L_ptr, G_ptr, before_ptr, u_ptr, pull_x_ptr, columns, 1, M, M, N, DTYPE, BLOCK, BLOCK_OTHER
            )
            tl.store(d_v_ptr + columns, d_v, mask=columns < M)
        tl.debug_barrier()
        t -= 1


@triton.jit
def implicit_long(
    plan_ptr, d_u_ptr, d_v_ptr, map_x_ptr, residual_ptr, direction_ptr, sum_x_ptr, sum_y_ptr, grad_a_ptr, grad_b_ptr,
    N, M, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """As ``implicit``: conjugate gradients for the columns, in vectors that stand in memory. ``grad_b_ptr`` comes in
    as zeros."""
    places = tl.arange(0, BLOCK)
    rounding = 2.2e-16 if DTYPE == tl.float64 else 1.2e-7
    ones = tl.full((BLOCK, BLOCK_OTHER), 1.0, DTYPE)
    for start in range(0, N, BLOCK):
        rows = start + places
        total = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
        for first in range(0, M, BLOCK_OTHER):
            total += load_tile(plan_ptr, rows, first + tl.arange(0, BLOCK_OTHER), M, 1, N, M, 0.0) * ones
        inverse_r = inverse(tl.sum(total, 1))
        d_u = tl.load(d_u_ptr + rows, mask=rows < N, other=0.0)
        tl.store(sum_x_ptr + rows, inverse_r, mask=rows < N)
        tl.store(map_x_ptr + rows, d_u * inverse_r, mask=rows < N)
    tl.debug_barrier()
    residual_square = tl.zeros((), DTYPE)
    for start in range(0, M, BLOCK):
        columns = start + places
        total = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
        for first in range(0, N, BLOCK_OTHER):
            total += load_tile(plan_ptr, columns, first + tl.arange(0, BLOCK_OTHER), 1, M, M, N, 0.0) * ones
        c = tl.sum(total, 1)
        residual = tl.load(d_v_ptr + columns, mask=columns < M, other=0.0) - line_products(
            plan_ptr, map_x_ptr, columns, 1, M, M, N, DTYPE, BLOCK, BLOCK_OTHER
        )
        tl.store(sum_y_ptr + columns, c, mask=columns < M)
        tl.store(residual_ptr + columns, residual, mask=columns < M)
        tl.store(direction_ptr + columns, residual * inverse(c), mask=columns < M)
        residual_square += tl.sum(residual * residual * inverse(c))
    tl.debug_barrier()
    enough = residual_square * tl.minimum(1e-20, rounding * rounding)
    step = 0
    while (step < 4 * M + 50) & (residual_square > enough):
        lift = tl.zeros((), DTYPE)
        for start in range(0, M, BLOCK):
            columns = start + places
            c = tl.load(sum_y_ptr + columns, mask=columns < M, other=0.0)
            lift += tl.sum(c * tl.load(direction_ptr + columns, mask=columns < M, other=0.0))
        for start in range(0, N, BLOCK):
            rows = start + places
            mapped = line_products(plan_ptr, direction_ptr, rows, M, 1, N, M, DTYPE, BLOCK, BLOCK_OTHER)
            mapped *= tl.load(sum_x_ptr + rows, mask=rows < N, other=0.0)
            tl.store(map_x_ptr + rows, mapped, mask=rows < N)
        tl.debug_barrier()
        curvature = tl.zeros((), DTYPE)
        for start in range(0, M, BLOCK):
            columns = start + places
            c = tl.load(sum_y_ptr + columns, mask=columns < M, other=0.0)
            direction = tl.load(direction_ptr + columns, mask=columns < M, other=0.0)
            mapped = c * ((1 + 10 * rounding) * direction + lift) - line_products(
                plan_ptr, map_x_ptr, columns, 1, M, M, N, DTYPE, BLOCK, BLOCK_OTHER
            )
            tl.store(d_v_ptr + columns, mapped, mask=columns < M)  # free again, once it is in the residual
            curvature += tl.sum(direction * mapped)
        tl.debug_barrier()
        length = residual_square / curvature
        new_square = tl.zeros((), DTYPE)
        for start in range(0, M, BLOCK):
            columns = start + places
            inside = columns < M
            c = tl.load(sum_y_ptr + columns, mask=inside, other=0.0)
            direction = tl.load(direction_ptr + columns, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + columns, mask=inside, other=0.0)
            residual -= length * tl.load(d_v_ptr + columns, mask=inside, other=0.0)
            mu = tl.load(grad_b_ptr + columns, mask=inside, other=0.0) + length * direction
            tl.store(residual_ptr + columns, residual, mask=inside)
            tl.store(grad_b_ptr + columns, mu, mask=inside)
            new_square += tl.sum(residual * residual * inverse(c))
        tl.debug_barrier()
        for start in range(0, M, BLOCK):
            columns = start + places
            inside = columns < M
            c = tl.load(sum_y_ptr + columns, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + columns, mask=inside, other=0.0)
            direction = tl.load(direction_ptr + columns, mask=inside, other=0.0)
            direction = residual * inverse(c) + new_square / residual_square * direction
            tl.store(direction_ptr + columns, direction, mask=inside)
        tl.debug_barrier()
        residual_square = new_square
        step += 1
    for start in range(0, N, BLOCK):
        rows = start + places
        grad = tl.load(d_u_ptr + rows, mask=rows < N, other=0.0) - line_products(
            plan_ptr, grad_b_ptr, rows, M, 1, N, M, DTYPE, BLOCK, BLOCK_OTHER
        )
        grad *= tl.load(sum_x_ptr + rows, mask=rows < N, other=0.0)
        tl.store(grad_a_ptr + rows, grad, mask=rows < N)
    tl.debug_barrier()


@triton.jit
def weight_gradient(
    grad_ptr, sums_ptr, bary_ptr, ptr, start, size, total, has_mass, poison,
    BARYCENTRIC: tl.constexpr, UNROLLED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the weights of a side, from the gradients ``sums_ptr`` of the marginal's logarithms (if UNROLLED), or of the
    marginal; through the division by the sum. Zero weights get none."""
    along = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        weights = marginal_at(ptr, start, index, size, total, has_mass, DTYPE)
        grad = tl.load(sums_ptr + index, mask=index < size, other=0.0)
        if UNROLLED:
            grad *= inverse(weights)
        if BARYCENTRIC:
            bary = tl.load(bary_ptr + index, mask=index < size, other=0.0)
            grad -= bary * inverse(weights) * inverse(weights)
        along += tl.where(weights == 0, 0.0, grad * weights)
    centre = tl.sum(along)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        weights = marginal_at(ptr, start, index, size, total, has_mass, DTYPE)
        grad = tl.load(sums_ptr + index, mask=index < size, other=0.0)
        if UNROLLED:
            grad *= inverse(weights)
        if BARYCENTRIC:
            bary = tl.load(bary_ptr + index, mask=index < size, other=0.0)
            grad -= bary * inverse(weights) * inverse(weights)
        grad = tl.where(weights == 0, 0.0, (grad - centre) / total + poison)
        tl.store(grad_ptr + start + index, grad.to(grad_ptr.dtype.element_ty), mask=index < size)


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y", "num_iters"])
def _varlen_rounds_bwd_kernel(
    L_ptr, from_x_ptr, from_y_ptr, grad_plan_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr,
    rounds_ptr, history_ptr, grad_f_ptr, grad_g_ptr, grad_a_ptr, grad_b_ptr, vector_x_ptr, vector_y_ptr,
    tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, scale: tl.float64, num_iters,
    BARYCENTRIC: tl.constexpr, MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program an item: the gradient of the log kernel in place of ``from_x_ptr``, the plan in place of
    ``from_y_ptr``, and the gradients of the weights. ``vector_*_ptr``, [5, T_x] and [6, T_y], are room for vectors.
    """
    item = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = L_ptr.dtype.element_ty
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    if suits(N, M, longest_x, longest_y, less_x, less_y):
        room = start_x * longest_y
        L_ptr, from_x_ptr, from_y_ptr = L_ptr + room, from_x_ptr + room, from_y_ptr + room
        vector_x_ptr += start_x
        vector_y_ptr += start_y
        wide_x, wide_y = tokens_x.to(tl.int64), tokens_y.to(tl.int64)
        d_u_ptr, pull_x_ptr, sum_x_ptr = vector_x_ptr, vector_x_ptr + wide_x, vector_x_ptr + 2 * wide_x
        bary_x_ptr, inner_x_ptr = vector_x_ptr + 3 * wide_x, vector_x_ptr + 4 * wide_x
        d_v_ptr, pull_y_ptr, sum_y_ptr = vector_y_ptr, vector_y_ptr + wide_y, vector_y_ptr + 2 * wide_y
        bary_y_ptr, inner_y_ptr = vector_y_ptr + 3 * wide_y, vector_y_ptr + 4 * wide_y
        direction_ptr = vector_y_ptr + 5 * wide_y
        total_a, total_b, has_mass = totals(a_ptr, b_ptr, start_x, start_y, N, M, DTYPE, BLOCK_N * 8)
        poison = total_a * 0.0 + total_b * 0.0
        kept = num_iters if MODE == UNROLL else 1
        history_ptr += 2 * (item + 1) + kept * (start_x + start_y)
        num_rounds = tl.load(rounds_ptr + item)
        last = tl.maximum(num_rounds - 1, 0) if MODE == UNROLL else 0
        u_ptr = history_ptr + last * (N + M)
        v_ptr = u_ptr + N
        places, other_places = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        N_mass, M_mass = tl.where(has_mass, N, 0), tl.where(has_mass, M, 0)  # without mass there is no history
        # The history is rounded, but the columns came last: they sum to b, once this has been put right.
        for start in range(0, M, BLOCK_N):
            columns = start + places
            b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
            log_v = load_log(v_ptr, columns, M_mass)
            sums = line_sums(L_ptr, u_ptr, columns, finite(log_v), 1, M, M, N_mass, DTYPE, BLOCK_N, BLOCK_M)
            exact = tl.where(b == 0, float("-inf"), log_v + log2_or_infinity(b) - log2_or_infinity(sums))
            tl.store(inner_y_ptr + columns, exact, mask=columns < M)
        tl.debug_barrier()
        for start in range(0, N, BLOCK_N):
            rows = start + places
            a = marginal_at(a_ptr, start_x, rows, N, total_a, has_mass, DTYPE)
            log_u = load_log(u_ptr, rows, N_mass)
            d_u, bary = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE)
            for first in range(0, M, BLOCK_M):
                columns = first + other_places
                L = load_tile(L_ptr, rows, columns, M, 1, N, M, float("-inf"))
                plan = tl.exp2((L + log_u[:, None]) + load_log(inner_y_ptr, columns, M)[None, :])
                from_x = load_tile(from_x_ptr, rows, columns, M, 1, N, M, 0.0)
                from_y = load_tile(from_y_ptr, rows, columns, M, 1, N, M, 0.0)
                grad = from_x + from_y
                if BARYCENTRIC:
                    b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
                    grad = from_x * inverse(a)[:, None] + from_y * inverse(b)[None, :]
                    bary += tl.sum(from_x * plan, 1)
                if MODE == DETACH:
                    grad = tl.zeros_like(grad)
                elif grad_plan_ptr is not None:
                    sent = load_tile(grad_plan_ptr + room, rows, columns, M, 1, N, M, 0.0)
                    grad += tl.where(L == float("-inf"), 0.0, sent)
                store_tile(from_x_ptr, grad * plan, rows, columns, M, 1, N, M)
                d_u += tl.sum(grad * plan, 1)
            unit = (1.0 / tl.abs(tl.full((), scale, tl.float64))).to(DTYPE)  # f = log(u) / |scale|
            d_u += unit * load_or_zero(grad_f_ptr, start_x + rows, (rows < N) & (a != 0), BLOCK_N, DTYPE)
            tl.store(d_u_ptr + rows, d_u, mask=rows < N)
            tl.store(bary_x_ptr + rows, bary, mask=rows < N)
            tl.store(inner_x_ptr + rows, tl.zeros_like(d_u), mask=rows < N)
        tl.debug_barrier()
        for start in range(0, M, BLOCK_N):
            columns = start + places
            b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
            log_v = load_log(inner_y_ptr, columns, M)
            d_v, bary = tl.zeros((BLOCK_N,), DTYPE), tl.zeros((BLOCK_N,), DTYPE)
            for first in range(0, N, BLOCK_M):
                rows = first + other_places
                L = load_tile(L_ptr, columns, rows, 1, M, M, N, float("-inf"))
                plan = tl.exp2((L + log_v[:, None]) + load_log(u_ptr, rows, N_mass)[None, :])
                if BARYCENTRIC:
                    bary += tl.sum(load_tile(from_y_ptr, columns, rows, 1, M, M, N, 0.0) * plan, 1)
                d_v += tl.sum(load_tile(from_x_ptr, columns, rows, 1, M, M, N, 0.0), 1)
                store_tile(from_y_ptr, plan, columns, rows, 1, M, M, N)
            unit = (1.0 / tl.abs(tl.full((), scale, tl.float64))).to(DTYPE)
            d_v += unit * load_or_zero(grad_g_ptr, start_y + columns, (columns < M) & (b != 0), BLOCK_N, DTYPE)
            tl.store(d_v_ptr + columns, d_v, mask=columns < M)
            tl.store(bary_y_ptr + columns, bary, mask=columns < M)
            tl.store(inner_y_ptr + columns, tl.zeros_like(d_v), mask=columns < M)
            tl.store(sum_y_ptr + columns, tl.where(b == 0, float("-inf"), b * 0), mask=columns < M)
        tl.debug_barrier()
        if MODE == UNROLL:
            unroll_long(
                L_ptr, from_x_ptr, history_ptr, sum_y_ptr, num_rounds, d_u_ptr, d_v_ptr, pull_x_ptr, pull_y_ptr,
                inner_x_ptr, inner_y_ptr, N, M, DTYPE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
        elif MODE != DETACH:
            implicit_long(
                from_y_ptr, d_u_ptr, d_v_ptr, pull_x_ptr, pull_y_ptr, direction_ptr, sum_x_ptr, sum_y_ptr,
                inner_x_ptr, inner_y_ptr, N, M, DTYPE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            for start in range(0, N, BLOCK_N):
                rows = start + places
                grad_a = tl.load(inner_x_ptr + rows, mask=rows < N, other=0.0)
                for first in range(0, M, BLOCK_M):
                    columns = first + other_places
                    grad_b = tl.load(inner_y_ptr + columns, mask=columns < M, other=0.0)
                    plan = load_tile(from_y_ptr, rows, columns, M, 1, N, M, 0.0)
                    G = load_tile(from_x_ptr, rows, columns, M, 1, N, M, 0.0)
                    G -= plan * (grad_a[:, None] + grad_b[None, :])
                    store_tile(from_x_ptr, G, rows, columns, M, 1, N, M)
        if grad_a_ptr is not None:
            weight_gradient(
                grad_a_ptr, inner_x_ptr, bary_x_ptr, a_ptr, start_x, N, total_a, has_mass, poison,
                BARYCENTRIC, MODE == UNROLL, DTYPE, BLOCK_N * 8,
            )  # fmt: skip
        if grad_b_ptr is not None:
            weight_gradient(
                grad_b_ptr, inner_y_ptr, bary_y_ptr, b_ptr, start_y, M, total_b, has_mass, poison,
                BARYCENTRIC, MODE == UNROLL, DTYPE, BLOCK_N * 8,
            )  # fmt: skip


@triton.jit
def pull_tokens(
    L_ptr, G_ptr, plan_ptr, x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_x_ptr, a_ptr, b_ptr,
    inverse_x_ptr, inverse_y_ptr, start_x, start_y, first, line_stride, other_stride, N, M, D, scale,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As ``pull_side``, for the tokens from ``first`` on."""
    rows, features = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    total_b, has_mass = tl.full((), 1.0, DTYPE), True
    if BARYCENTRIC:
        _, total_b, has_mass = totals(a_ptr, b_ptr, start_x, start_y, N, M, DTYPE, 512)
    b_live_ptr, a_live_ptr = b_ptr, a_ptr
    if a_ptr is not None:
        a_live_ptr += start_x
    if b_ptr is not None:
        b_live_ptr += start_y
    live_x = load_live(a_live_ptr, 0, rows, N)
    exact = tl.full((), scale, tl.float64)
    to_similarity, to_gradient = (1.0 / exact * LN2).to(DTYPE), exact.to(DTYPE)
    # Norms were left by the products: there are none with nothing.
    inverse_x = tl.load(inverse_x_ptr + start_x + rows, mask=rows < tl.where(M == 0, 0, N), other=0.0)
    pull = tl.zeros((BLOCK_N,), DTYPE)
    if COSINE:
        for column in range(0, M, BLOCK_M):
            columns = column + tl.arange(0, BLOCK_M)
            L = load_tile(L_ptr, rows, columns, line_stride, other_stride, N, M, float("-inf"))
            G = load_tile(G_ptr, rows, columns, line_stride, other_stride, N, M, 0.0)
            pull += tl.sum(G * tl.where(L == float("-inf"), 0.0, L), 1)
        pull *= to_similarity * to_gradient * inverse_x * inverse_x
    at_x = (start_x + rows)[:, None] * D + features[None, :]
    for start in range(0, D, BLOCK_D):
        in_D = (start + features < D)[None, :]
        x = tl.load(x_ptr + at_x + start, mask=live_x[:, None] & in_D, other=0.0)
        grad = -pull[:, None] * x.to(DTYPE)
        for column in range(0, M, BLOCK_M):
            columns = column + tl.arange(0, BLOCK_M)
            mask = load_live(b_live_ptr, 0, columns, M)[:, None] & in_D
            at_y = (start_y + columns)[:, None] * D + start + features[None, :]
            C = load_tile(G_ptr, rows, columns, line_stride, other_stride, N, M, 0.0) * to_gradient
            if COSINE:
                inverse_y = tl.load(inverse_y_ptr + start_y + columns, mask=columns < M, other=0.0)
                C = C * inverse_x[:, None] * inverse_y[None, :]
            y = tl.load(y_ptr + at_y, mask=mask, other=0.0)
            high, low, unit = split(C, x_ptr.dtype.element_ty)
            grad = dot_split(high, low, unit, y, grad, PRECISION)
            if grad_y_out_ptr is not None:
                plan = load_tile(plan_ptr, rows, columns, line_stride, other_stride, N, M, 0.0)
                if BARYCENTRIC:
                    b = marginal_at(b_ptr, start_y, columns, M, total_b, has_mass, DTYPE)
                    plan = plan * inverse(b)[None, :]
                high, low, unit = split(plan, x_ptr.dtype.element_ty)
                grad_y_out = tl.load(grad_y_out_ptr + at_y, mask=mask, other=0.0)
                grad = dot_split(high, low, unit, grad_y_out, grad, PRECISION)
        grad = tl.where(live_x[:, None], grad, 0.0)
        if grad_x_out_ptr is not None:
            grad += tl.load(grad_x_out_ptr + at_x + start, mask=(rows < N)[:, None] & in_D, other=0.0).to(DTYPE)
        tl.store(grad_x_ptr + at_x + start, grad.to(x.dtype), mask=(rows < N)[:, None] & in_D)


@triton.jit(do_not_specialize=["tokens_x", "tokens_y", "longest_x", "longest_y", "less_x", "less_y", "blocks_x"])
def _varlen_tokens_bwd_kernel(
    L_ptr, G_ptr, plan_ptr, x_ptr, y_ptr, cu_seqlens_x_ptr, cu_seqlens_y_ptr, a_ptr, b_ptr,
    inverse_x_ptr, inverse_y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_x_ptr, grad_y_ptr,
    tokens_x, tokens_y, longest_x, longest_y, less_x, less_y, blocks_x, D, scale: tl.float64,
    COSINE: tl.constexpr, BARYCENTRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of its tokens), as in ``_varlen_attend_kernel``."""
    item, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = L_ptr.dtype.element_ty
    start_x, N = span(cu_seqlens_x_ptr, item, tokens_x)
    start_y, M = span(cu_seqlens_y_ptr, item, tokens_y)
    first_x, first_y = block * BLOCK_N, (block - blocks_x) * BLOCK_N
    if suits(N, M, longest_x, longest_y, less_x, less_y):
        room = start_x * longest_y
        L_ptr, G_ptr, plan_ptr = L_ptr + room, G_ptr + room, plan_ptr + room
        if (block < blocks_x) & (first_x < N):
            pull_tokens(
                L_ptr, G_ptr, plan_ptr, x_ptr, y_ptr, grad_x_out_ptr, grad_y_out_ptr, grad_x_ptr, a_ptr, b_ptr,
                inverse_x_ptr, inverse_y_ptr, start_x, start_y, first_x, M, 1, N, M, D, scale,
                COSINE, BARYCENTRIC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
        if (block >= blocks_x) & (first_y < M):
            pull_tokens(
                L_ptr, G_ptr, plan_ptr, y_ptr, x_ptr, grad_y_out_ptr, grad_x_out_ptr, grad_y_ptr, b_ptr, a_ptr,
                inverse_y_ptr, inverse_x_ptr, start_y, start_x, first_y, 1, M, M, N, D, scale,
                COSINE, BARYCENTRIC, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D, DTYPE,
            )  # fmt: skip
