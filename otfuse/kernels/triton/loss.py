"""The alignment loss of LAVCap (Eq. 4) and its gradient: logits a tile at a time, never in memory.

Either sequence of an item is a side: its tokens are told from each other by what they have to do with the tokens of
the other sequence, the others. Logits are ``<q_i, s_j> / temperature`` for tokens i, j of the side, where q is what the
plan assigns them and s their similarities. Inner products are scaled by ``1 / temperature`` (or ``log2(e)`` times that:
``exp2`` is what the hardware has) only as differences, so that the rounding of the scale is not one of large numbers.

A program owns a block of tokens, or in the backward a tile of both gradients, and goes through the tokens of a side
block by block: no two programs add to one number, and a result depends on its own item alone. LAVCap's items of
64 x 20 take three programs forward and two backward, and read plan and similarity from memory once (10 kB an item);
what is read again is in cache.

Letters: B batch, N tokens of ``x``, M tokens of ``y``.
"""

import triton
import triton.language as tl

from .places import wide
from .rounds import LN2, LOG2E, product

# What q is, and over what the softmax runs: the places in otfuse.loss.ASSIGNMENTS and CONTRASTS.
PLAN = tl.constexpr(0)
LOG_PLAN = tl.constexpr(1)
BARYCENTRIC = tl.constexpr(2)
OVER_SIMILARITY = tl.constexpr(0)
OVER_ASSIGNMENT = tl.constexpr(1)

TINY32 = tl.constexpr(1.1754943508222875e-38)  # the smallest normal numbers
TINY64 = tl.constexpr(2.2250738585072014e-308)


@triton.jit
def kept(weights_ptr, tokens, size):
    """Which tokens count: those of the item whose weight is not zero; None keeps all."""
    keep = tokens < size
    if weights_ptr is not None:
        keep = keep & (tl.load(weights_ptr + tokens, mask=keep, other=0) != 0)
    return keep


@triton.jit
def count_kept(weights_ptr, size, BLOCK: tl.constexpr):
    count = size
    if weights_ptr is not None:
        count = size * 0
        for start in range(0, size, BLOCK):
            count += tl.sum(kept(weights_ptr, start + tl.arange(0, BLOCK), size).to(tl.int32))
    return count


@triton.jit
def shares(a_ptr, b_ptr, N, M, MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """What the cross-entropy of a token of x, of y counts in the loss, in float64; zero if either side has none."""
    count_x, count_y = count_kept(a_ptr, N, BLOCK_N), count_kept(b_ptr, M, BLOCK_M)
    share_x, share_y = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    if MEAN:
        share_x = share_x / tl.maximum(count_x, 1)
        share_y = share_y / tl.maximum(count_y, 1)
    has_mass = (count_x > 0) & (count_y > 0)
    return tl.where(has_mass, share_x, 0.0), tl.where(has_mass, share_y, 0.0)


@triton.jit
def load_block(ptr, tokens, others, keep, keep_others, stride, other_stride, DTYPE: tl.constexpr):
    """Entries [tokens, others] of an item's matrix; zero at padding, whatever it holds."""
    at = tokens[:, None] * stride + others[None, :] * other_stride
    return tl.load(ptr + at, mask=keep[:, None] & keep_others[None, :], other=0.0).to(DTYPE)


@triton.jit
def assigned(plan, ASSIGNMENT: tl.constexpr):
    """q of a block of the plan; barycentric, before it is divided by the row sums."""
    q = plan
    if ASSIGNMENT == LOG_PLAN:
        # Not by a maximum, which would hide NaN. What padding gets here is met by a similarity of zero.
        q = tl.log(tl.where(plan < tiny(plan.dtype), tiny(plan.dtype), plan))
    return q


@triton.jit
def tiny(DTYPE: tl.constexpr):
    return tl.full((), TINY64 if DTYPE == tl.float64 else TINY32, DTYPE)


@triton.jit
def divisor(sums):
    return tl.where(sums == 0, 1.0, sums)


@triton.jit
def products(
    plan_ptr, similarity_ptr, other_ptr, i, j, keep_i, keep_j, num_others, stride, other_stride,
    ASSIGNMENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``<q_i, s_j>`` [BLOCK, BLOCK] and, where q is divided by them, the sums of the plan [BLOCK]."""
    result, sums = tl.zeros((BLOCK, BLOCK), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, num_others, BLOCK_OTHER):
        others = start + tl.arange(0, BLOCK_OTHER)
        keep_others = kept(other_ptr, others, num_others)
        plan = load_block(plan_ptr, i, others, keep_i, keep_others, stride, other_stride, DTYPE)
        similarity = load_block(similarity_ptr, j, others, keep_j, keep_others, stride, other_stride, DTYPE)
        result = product(assigned(plan, ASSIGNMENT), tl.trans(similarity), result, PRECISION)
        if ASSIGNMENT == BARYCENTRIC:
            sums += tl.sum(plan, 1)
    if ASSIGNMENT == BARYCENTRIC:
        result = result / divisor(sums)[:, None]
    return result, sums


@triton.jit
def side_terms(
    plan_ptr, similarity_ptr, own_ptr, other_ptr, terms_ptr, normaliser_ptr, tokens, size, num_others,
    stride, other_stride, share, scale, ASSIGNMENT: tl.constexpr, CONTRAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What these tokens add to the loss, and what their softmax is shifted and divided by."""
    keep = kept(own_ptr, tokens, size)
    scale2 = (scale * LOG2E).to(DTYPE)
    highest, shift = tl.full((BLOCK,), float("-inf"), DTYPE), tl.zeros((BLOCK,), DTYPE)
    total, target = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, size, BLOCK):
        candidates = start + tl.arange(0, BLOCK)
        keep_candidates = kept(own_ptr, candidates, size)
        i, keep_i, j, keep_j = tokens, keep, candidates, keep_candidates
        if CONTRAST == OVER_ASSIGNMENT:
            i, keep_i, j, keep_j = candidates, keep_candidates, tokens, keep
        inner, _ = products(
            plan_ptr, similarity_ptr, other_ptr, i, j, keep_i, keep_j, num_others, stride, other_stride,
            ASSIGNMENT, PRECISION, BLOCK, BLOCK_OTHER, DTYPE,
        )  # fmt: skip
        if CONTRAST == OVER_ASSIGNMENT:
            inner = tl.trans(inner)
        target += tl.sum(tl.where(tokens[:, None] == candidates[None, :], inner, 0.0), 1)
        inner = tl.where(keep_candidates[None, :], inner, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(inner, 1))
        # An infinity (no candidate so far, or one in the data) less itself would be NaN.
        shift = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
        total = total * tl.exp2((before - shift) * scale2) + tl.sum(tl.exp2((inner - shift[:, None]) * scale2), 1)
    losses = (shift - target) * scale + tl.log2(total) * LN2  # a few numbers, in float64
    share = tl.where(keep, share, 0.0)
    tl.store(terms_ptr + tokens, tl.where(share > 0, losses * share, 0.0), mask=tokens < size)
    # An infinite loss has no gradient: NaN. Not the one sum of both, which would be rounded to the size of a logit.
    tl.store(normaliser_ptr + tokens, shift + losses * 0.0, mask=tokens < size)
    tl.store(normaliser_ptr + (size + num_others) + tokens, total, mask=tokens < size)


@triton.jit(do_not_specialize=["N", "M"])
def _alignment_loss_fwd_kernel(
    plan_ptr, similarity_ptr, a_ptr, b_ptr, terms_ptr, normaliser_ptr, has_mass_ptr, N, M, scale: tl.float64,
    ASSIGNMENT: tl.constexpr, CONTRAST: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of tokens): first those of x in blocks of BLOCK_N, then those of y in blocks of BLOCK_M."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = tl.float64 if plan_ptr.dtype.element_ty == tl.float64 else tl.float32
    plan_ptr += item * N * M
    similarity_ptr += item * N * M
    terms_ptr += item * (N + M)
    normaliser_ptr += item * 2 * (N + M)
    if a_ptr is not None:
        a_ptr += item * N
    if b_ptr is not None:
        b_ptr += item * M
    share_x, share_y = shares(a_ptr, b_ptr, N, M, MEAN, BLOCK_N, BLOCK_M)
    scale = tl.full((), scale, tl.float64)
    blocks_x = tl.cdiv(N, BLOCK_N)
    if part < blocks_x:
        tokens_x = part * BLOCK_N + tl.arange(0, BLOCK_N)
        side_terms(
            plan_ptr, similarity_ptr, a_ptr, b_ptr, terms_ptr, normaliser_ptr, tokens_x, N, M,
            M, 1, share_x, scale, ASSIGNMENT, CONTRAST, PRECISION, BLOCK_N, BLOCK_M, DTYPE,
        )  # fmt: skip
    else:
        tokens_y = (part - blocks_x) * BLOCK_M + tl.arange(0, BLOCK_M)
        side_terms(
            plan_ptr, similarity_ptr, b_ptr, a_ptr, terms_ptr + N, normaliser_ptr + N, tokens_y, M, N,
            1, M, share_y, scale, ASSIGNMENT, CONTRAST, PRECISION, BLOCK_M, BLOCK_N, DTYPE,
        )  # fmt: skip
    if part == 0:
        tl.store(has_mass_ptr + item, (share_x > 0).to(tl.int32))


@triton.jit
def product_gradients(
    plan_ptr, similarity_ptr, other_ptr, normaliser_ptr, grad_ptr, grad_stride, i, j, keep_i, keep_j, size, num_others,
    stride, other_stride, share, scale, ASSIGNMENT: tl.constexpr, CONTRAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to ``<q_i, s_j>`` [BLOCK, BLOCK], zero at padding, and what ``products`` returns."""
    inner, sums = products(
        plan_ptr, similarity_ptr, other_ptr, i, j, keep_i, keep_j, num_others, stride, other_stride,
        ASSIGNMENT, PRECISION, BLOCK, BLOCK_OTHER, DTYPE,
    )  # fmt: skip
    tokens, keep = i, keep_i
    if CONTRAST == OVER_ASSIGNMENT:
        tokens, keep = j, keep_j
    along: tl.constexpr = 0 if CONTRAST == OVER_ASSIGNMENT else 1
    share = tl.where(keep, share, 0.0)
    shift = tl.load(normaliser_ptr + tokens, mask=share > 0, other=0.0)
    total = tl.load(normaliser_ptr + (size + num_others) + tokens, mask=share > 0, other=1.0)
    weight = (tl.load(grad_ptr + tokens * wide(grad_stride), mask=share > 0, other=0.0) * share * scale).to(DTYPE)
    scale2 = (scale * LOG2E).to(DTYPE)
    softmax = tl.exp2((inner - tl.expand_dims(shift, along)) * scale2) * tl.expand_dims(1.0 / total, along)
    grad = (softmax - tl.where(i[:, None] == j[None, :], 1.0, 0.0)) * tl.expand_dims(weight, along)
    return tl.where(keep_i[:, None] & keep_j[None, :], grad, 0.0), inner, sums


@triton.jit
def side_gradients(
    plan_ptr, similarity_ptr, own_ptr, other_ptr, normaliser_ptr, grad_ptr, grad_stride, tokens, others,
    size, num_others, stride, other_stride, share, scale,
    ASSIGNMENT: tl.constexpr, CONTRAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What the loss of this side adds to the gradients of plan and similarity [tokens, others]; anything at padding."""
    keep, keep_others = kept(own_ptr, tokens, size), kept(other_ptr, others, num_others)
    grad_q, grad_s = tl.zeros((BLOCK, BLOCK_OTHER), DTYPE), tl.zeros((BLOCK, BLOCK_OTHER), DTYPE)
    sums, pull = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(0, size, BLOCK):
        partners = start + tl.arange(0, BLOCK)
        keep_partners = kept(own_ptr, partners, size)
        grad, inner, sums = product_gradients(
            plan_ptr, similarity_ptr, other_ptr, normaliser_ptr, grad_ptr, grad_stride, tokens, partners,
            keep, keep_partners, size, num_others, stride, other_stride, share, scale,
            ASSIGNMENT, CONTRAST, PRECISION, BLOCK, BLOCK_OTHER, DTYPE,
        )  # fmt: skip
        s = load_block(similarity_ptr, partners, others, keep_partners, keep_others, stride, other_stride, DTYPE)
        grad_q = product(grad, s, grad_q, PRECISION)
        pull += tl.sum(grad * inner, 1)
        partner_sums = sums
        if size > BLOCK:  # otherwise partners and tokens are the same
            grad, _, partner_sums = product_gradients(
                plan_ptr, similarity_ptr, other_ptr, normaliser_ptr, grad_ptr, grad_stride, partners, tokens,
                keep_partners, keep, size, num_others, stride, other_stride, share, scale,
                ASSIGNMENT, CONTRAST, PRECISION, BLOCK, BLOCK_OTHER, DTYPE,
            )  # fmt: skip
        plan = load_block(plan_ptr, partners, others, keep_partners, keep_others, stride, other_stride, DTYPE)
        q = assigned(plan, ASSIGNMENT)
        if ASSIGNMENT == BARYCENTRIC:
            q = q / divisor(partner_sums)[:, None]
        grad_s = product(tl.trans(grad), q, grad_s, PRECISION)
    if ASSIGNMENT == LOG_PLAN:
        plan = load_block(plan_ptr, tokens, others, keep, keep_others, stride, other_stride, DTYPE)
        grad_q = tl.where(plan >= tiny(DTYPE), grad_q / plan, 0.0)
    if ASSIGNMENT == BARYCENTRIC:
        pull = tl.where(sums == 0, 0.0, pull)  # such a row was divided by one
        grad_q = (grad_q - pull[:, None]) / divisor(sums)[:, None]
    return grad_q, grad_s


@triton.jit(do_not_specialize=["N", "M", "grad_stride_b", "grad_stride_n"])
def _alignment_loss_bwd_kernel(
    plan_ptr, similarity_ptr, a_ptr, b_ptr, normaliser_ptr, grad_terms_ptr, grad_plan_ptr, grad_similarity_ptr,
    N, M, grad_stride_b, grad_stride_n, scale: tl.float64,
    ASSIGNMENT: tl.constexpr, CONTRAST: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Programs (item, block of rows, block of columns): both gradients there, of the losses of both sides."""
    item = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = tl.float64 if plan_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    plan_ptr += item * N * M
    similarity_ptr += item * N * M
    normaliser_ptr += item * 2 * (N + M)
    grad_terms_ptr += item * grad_stride_b
    if a_ptr is not None:
        a_ptr += item * N
    if b_ptr is not None:
        b_ptr += item * M
    share_x, share_y = shares(a_ptr, b_ptr, N, M, MEAN, BLOCK_N, BLOCK_M)
    scale = tl.full((), scale, tl.float64)
    plan_of_x, similarity_of_x = side_gradients(
        plan_ptr, similarity_ptr, a_ptr, b_ptr, normaliser_ptr, grad_terms_ptr, grad_stride_n, rows, columns, N, M,
        M, 1, share_x, scale, ASSIGNMENT, CONTRAST, PRECISION, BLOCK_N, BLOCK_M, DTYPE,
    )  # fmt: skip
    plan_of_y, similarity_of_y = side_gradients(
        plan_ptr, similarity_ptr, b_ptr, a_ptr, normaliser_ptr + N, grad_terms_ptr + wide(N) * grad_stride_n,
        grad_stride_n,
        columns, rows, M, N, 1, M, share_y, scale, ASSIGNMENT, CONTRAST, PRECISION, BLOCK_M, BLOCK_N, DTYPE,
    )  # fmt: skip
    live = kept(a_ptr, rows, N)[:, None] & kept(b_ptr, columns, M)[None, :]
    grad_plan = tl.where(live, plan_of_x + tl.trans(plan_of_y), 0.0)
    grad_similarity = tl.where(live, similarity_of_x + tl.trans(similarity_of_y), 0.0)
    entries = item * N * M + rows[:, None] * M + columns[None, :]
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    tl.store(grad_plan_ptr + entries, grad_plan.to(grad_plan_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_similarity_ptr + entries, grad_similarity.to(grad_similarity_ptr.dtype.element_ty), mask=inside)
