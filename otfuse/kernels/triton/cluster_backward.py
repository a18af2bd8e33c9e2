"""The adjoint rounds of an item in one launch, its kernel matrix on chip over a cluster, as ``cluster.py`` runs them.

It takes the place of the launches of ``streaming_backward.py`` that go over the matrix round by round, in reverse; what
comes before and after is the same (docs/gradients.md, Eq. 4).

Letters: B batch, N rows and M columns of an item, T rounds; *lines* are rows and columns, one after the other.
"""

import triton
import triton.language as tl

from .cluster import load_log
from .rounds import apart, inverse
from .streaming import history_of, load_lines, wide


@triton.jit
def load_side(ptr, exponents_ptr, at, inside, one_piece):
    """Scalings of a round, from its row of the history: numbers, and the exponents that the tile does not hold."""
    scaling = load_lines(ptr, at, inside)
    number, exponent = apart(scaling, load_lines(exponents_ptr, at, inside))
    return tl.where(one_piece, scaling, number), tl.where(one_piece, 0.0, exponent)


@triton.jit
def product(tile, e_u, e_v, factor, one_piece, AXIS: tl.constexpr):
    """Over AXIS, along which ``factor`` lies: the sums of K times it. The tile is K itself, or L."""
    if one_piece:
        sums = tl.sum(tile * tl.expand_dims(factor, 1 - AXIS), AXIS)
    else:  # where a weight is small the plan is, and what is pulled is large
        factor, grown = apart(factor, tl.zeros_like(factor))
        if AXIS == 1:
            e_v += grown
        else:
            e_u += grown
        sums = tl.sum(tl.exp2(tile + (e_u[:, None] + e_v[None, :])) * tl.expand_dims(factor, 1 - AXIS), AXIS)
    return sums


@triton.jit(do_not_specialize=["N", "M", "num_iters"])
def _adjoint_rounds_kernel(
    matrix_ptr, weights_ptr, offset_ptr, rounds_ptr, history_ptr, exponents_ptr, start_ptr, pull_ptr, total_ptr,
    N, M, stride_n, scale: tl.float64, num_iters,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CTAS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Programs (item): what is pulled through the lines in every round (``pull_ptr`` [B, T, N + M]), and the sum of
    their gradients (``total_ptr`` [B, N + M]). Both begin as ``_started_kernel`` leaves them; ``start_ptr`` is its too.
    """
    item = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    in_x, in_y, lines = rows < N, columns < M, item * (N + M)
    history_ptr = history_of(history_ptr, item, num_iters, lines)
    exponents_ptr += num_iters * lines  # of rounds, as the history; the first of all are those that K begins with
    pull_ptr += num_iters * lines
    rounds, one_piece = tl.load(rounds_ptr + item), tl.load(history_ptr - 1) != 0
    a, b = load_lines(weights_ptr + lines, rows, in_x), load_lines(weights_ptr + lines + N, columns, in_y)
    tile = load_log(
        matrix_ptr + item * N * stride_n, offset_ptr + item * N, a, b, stride_n, N, M, scale,
        BLOCK_N, BLOCK_M, CTAS, WARPS,
    )  # fmt: skip
    if one_piece:
        first_u, first_v = load_lines(exponents_ptr, rows, in_x), load_lines(exponents_ptr + N, columns, in_y)
        tile = tl.exp2((tile + first_u[:, None]) + first_v[None, :])
    grad_u = load_lines(start_ptr + lines, rows, in_x)  # of the last round; of those before it, zero
    total_u, total_v = tl.zeros_like(a), load_lines(total_ptr + lines + N, columns, in_y)
    last = wide(tl.maximum(rounds - 1, 0)) * (N + M)
    pulled_v = load_lines(pull_ptr + last + N, columns, in_y)
    v, e_v = load_side(history_ptr, exponents_ptr, last + N + columns, in_y, one_piece)
    for back in range(0, rounds):
        at = wide(rounds - 1 - back) * (N + M)
        u, e_u = load_side(history_ptr, exponents_ptr, at + rows, in_x, one_piece)
        grad_u -= u * product(tile, e_u, e_v, v * pulled_v, one_piece, 1)
        total_u += grad_u
        pulled_u = grad_u * inverse(a)
        tl.store(pull_ptr + at + rows, pulled_u, mask=in_x)
        grad_u = tl.zeros_like(grad_u)
        if back < rounds - 1:
            at -= N + M
            v, e_v = load_side(history_ptr, exponents_ptr, at + N + columns, in_y, one_piece)
            grad_v = -v * product(tile, e_u, e_v, u * pulled_u, one_piece, 0)
            total_v += grad_v
            pulled_v = grad_v * inverse(b)
            tl.store(pull_ptr + at + N + columns, pulled_v, mask=in_y)
    tl.store(total_ptr + lines + rows, total_u, mask=in_x)
    tl.store(total_ptr + lines + N + columns, total_v, mask=in_y)
