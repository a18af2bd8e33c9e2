"""Sinkhorn-Knopp on a CPU, compiled by numba: one fused pass over the kernel matrix a round.

Letters: N rows, M columns of one item, T rounds. "Outer" is the side that a pass walks over, "inner" the one
it vectorises along. Thin or small items are copied so that the longer side is the inner one and its length a
multiple of the vector's; large ones keep K where their plan will stand. ``pass_divide`` and ``pass_affine``
are all the arithmetic that grows with N M T.

Two forms, by the item's own range (docs/numerics.md): SCALING, where K = exp((S - max S) / epsilon) serves all
rounds; and ABSORBED, where the first round is done in the log domain and the scalings are folded into K
whenever they leave a safe range.

All in one file, because numba's cache on disk notices a change in a function's own file only, and of SCALING_RANGE
(``numba_cache``).
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types
from numba.extending import intrinsic, overload

from otfuse._backends.cpu.numba_cache import njit
from otfuse.kernels.constants import SCALING_RANGE

RANGE32, RANGE64 = SCALING_RANGE[4], SCALING_RANGE[8]  # numba takes no dictionary
NO_MASS, SCALING, ABSORBED, NOT_FINITE = 0, 1, 2, 3

# Sums may be reordered and fused; NaN and infinities keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
IN_ORDER = FAST - {"reassoc"}  # what is vectorised over items: the same for all, also for the last few
LIKE = {4: np.float32(0), 8: np.float64(0)}  # by size in bytes: picks the compiled version
LANES = 16
GATHER = 64  # lines whose contributions are summed one after the other; a multiple of four
TINY_SIDE, TINY_ITEM = 16, 64  # tiny: solved side by side
FEW_ITEMS, MANY_ITEMS = 16, 64  # solved side by side; fewer where a batch has no more
SMALL_SIDE, SMALL_ITEM = 64, 1 << 14  # thin: min(N, M) up to the first; small: N M up to the second


@intrinsic
def _as_float32(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def _pointer(typingctx, address, like):
    """The address of numbers of the type of ``like``."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), codegen


@intrinsic
def _stopped(typingctx, stop):
    """Whether the number at this address is not zero. Another thread may write it at any time: the load is atomic, so
    that the compiler does not take it out of a loop."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))
        value = builder.load_atomic(pointer, "monotonic", 8)
        return builder.icmp_signed("!=", value, value.type(0))

    return types.boolean(types.int64), codegen


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _array(address, shape, like):
    """A contiguous array where a tensor lies. The launchers hand over addresses, since a call has some twenty
    tensors, and making a numpy array of each costs more than solving a small item."""
    return carray(_pointer(address, like), shape)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _polynomial(r, n):
    """exp(r) 2^n for |r| <= ln 2 / 2 (Cephes' coefficients); zero below the smallest normal number."""
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _as_float32(np.int32(max(np.int32(n) + np.int32(127), np.int32(0))) << np.int32(23))


def _exp(x, like):
    raise NotImplementedError


@overload(_exp, inline="always")
def _exp_overload(x, like):
    """exp(x) in the type of ``like``: libm's is not vectorised, this is for float32 (1 ulp).

    A float64 x is reduced in float64 first, so that the result has no more error where x is large.
    """
    if like != types.float32:
        return lambda x, like: math.exp(x)

    def exp_float32(x, like):
        x = min(max(x, np.float32(-104.0)), np.float32(88.0))
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        r = x - n * np.float32(0.693359375)
        return _polynomial(r + n * np.float32(2.12194440e-4), n)

    def exp_reduced(x, like):
        x = min(max(x, -104.0), 88.0)
        n = np.floor(x * 1.4426950408889634 + 0.5)
        return _polynomial(np.float32(x - n * 0.6931471805599453), n)

    return exp_float32 if x == types.float32 else exp_reduced


@njit(nogil=True, cache=True, error_model="numpy")
def _exp_row(out, values, shift, scale, live, dense):
    """out = exp((values - shift) scale) where live, else 0; ``dense`` says that all are, and live is not read."""
    for j in range(values.shape[0]):
        if dense or live[j] != 0:
            out[j] = _exp((values[j] - shift) * scale, values[j])
        else:
            out[j] = 0


@njit(nogil=True, cache=True, error_model="numpy")
def _fold_row(out, values, scale, log_row, log_columns, live):
    """out = exp(values scale + log_row + log_columns) where live, else 0; the sum is taken in float64."""
    for j in range(values.shape[0]):
        if live[j] != 0:
            out[j] = _exp(values[j] * scale + (log_row + log_columns[j]), values[j])
        else:
            out[j] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _hand_over(part, whole):
    for i in range(part.shape[0]):
        whole[i] += part[i]
        part[i] = 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def pass_divide(K, inner, marginal, sums, outer, gathered):
    """A round in one pass: sums = K inner; outer = marginal / sums; gathered = Kᵀ outer.

    Four outer lines at a time share each load of ``inner`` and each store of ``gathered``.
    """
    lines, length = K.shape
    zero = K.dtype.type(0)
    gathered[:] = 0
    # In float32 a sum of hundreds of lines one after the other would lose a digit: gather in two steps.
    part = gathered if lines <= GATHER else np.zeros(length, gathered.dtype)
    for block in range(lines // 4):
        o = 4 * block
        s0 = s1 = s2 = s3 = zero
        for i in range(length):
            w = inner[i]
            s0 += K[o, i] * w
            s1 += K[o + 1, i] * w
            s2 += K[o + 2, i] * w
            s3 += K[o + 3, i] * w
        w0 = marginal[o] / s0 if marginal[o] != 0 else zero
        w1 = marginal[o + 1] / s1 if marginal[o + 1] != 0 else zero
        w2 = marginal[o + 2] / s2 if marginal[o + 2] != 0 else zero
        w3 = marginal[o + 3] / s3 if marginal[o + 3] != 0 else zero
        sums[o], sums[o + 1], sums[o + 2], sums[o + 3] = s0, s1, s2, s3
        outer[o], outer[o + 1], outer[o + 2], outer[o + 3] = w0, w1, w2, w3
        for i in range(length):
            part[i] += (K[o, i] * w0 + K[o + 1, i] * w1) + (K[o + 2, i] * w2 + K[o + 3, i] * w3)
        if lines > GATHER and (o + 4) % GATHER == 0:
            _hand_over(part, gathered)
    for o in range(lines // 4 * 4, lines):
        s0 = zero
        for i in range(length):
            s0 += K[o, i] * inner[i]
        w0 = marginal[o] / s0 if marginal[o] != 0 else zero
        sums[o], outer[o] = s0, w0
        for i in range(length):
            part[i] += K[o, i] * w0
    if lines > GATHER:
        _hand_over(part, gathered)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def pass_affine(K, inner, offset, slope, outer, gathered):
    """outer = offset + slope (K inner); gathered = Kᵀ outer: a round of the backward, a step of CG."""
    lines, length = K.shape
    zero = inner.dtype.type(0)
    gathered[:] = 0
    # In float32 a sum of hundreds of lines one after the other would lose a digit: gather in two steps.
    part = gathered if lines <= GATHER else np.zeros(length, gathered.dtype)
    for block in range(lines // 4):
        o = 4 * block
        s0 = s1 = s2 = s3 = zero
        for i in range(length):
            w = inner[i]
            s0 += K[o, i] * w
            s1 += K[o + 1, i] * w
            s2 += K[o + 2, i] * w
            s3 += K[o + 3, i] * w
        w0 = offset[o] + slope[o] * s0
        w1 = offset[o + 1] + slope[o + 1] * s1
        w2 = offset[o + 2] + slope[o + 2] * s2
        w3 = offset[o + 3] + slope[o + 3] * s3
        outer[o], outer[o + 1], outer[o + 2], outer[o + 3] = w0, w1, w2, w3
        for i in range(length):
            part[i] += (K[o, i] * w0 + K[o + 1, i] * w1) + (K[o + 2, i] * w2 + K[o + 3, i] * w3)
        if lines > GATHER and (o + 4) % GATHER == 0:
            _hand_over(part, gathered)
    for o in range(lines // 4 * 4, lines):
        s0 = zero
        for i in range(length):
            s0 += K[o, i] * inner[i]
        w0 = offset[o] + slope[o] * s0
        outer[o] = w0
        for i in range(length):
            part[i] += K[o, i] * w0
    if lines > GATHER:
        _hand_over(part, gathered)


@njit(nogil=True, cache=True, error_model="numpy")
def _weight_range(weights):
    """(sum, smallest, largest) of the weights that are not zero, and whether that is all of them."""
    mass, low, high, dense = 0.0, np.inf, 0.0, True
    for i in range(weights.shape[0]):
        mass += weights[i]
        if weights[i] != 0:
            low, high = min(low, weights[i]), max(high, weights[i])
        else:
            dense = False
    return mass, low, high, dense


@njit(nogil=True, cache=True, error_model="numpy")
def _survey(S, a, b, scale):
    """(form, shift, dense): the form by the spread of log K and of the weights that scalings must span.

    ``shift`` is the S of the largest entry of K = exp(S scale): the smallest S if S is a cost, scale < 0.
    """
    mass_a, low_a, high_a, dense_a = _weight_range(a)
    mass_b, low_b, high_b, dense_b = _weight_range(b)
    dense = dense_a and dense_b
    if mass_a == 0 or mass_b == 0:
        return NO_MASS, 0.0, dense
    finite = mass_a * 0 + mass_b * 0 == 0
    low, high = S.dtype.type(np.inf), S.dtype.type(-np.inf)
    if dense:
        entries = S.reshape(S.size)
        finite = finite and _is_finite(entries, b, True)
        if finite:
            low, high = _range(entries, b, True)
    else:
        for i in range(a.shape[0]):
            if a[i] != 0:
                finite = finite and _is_finite(S[i], b, False)
                if finite:
                    row_low, row_high = _range(S[i], b, False)
                    low, high = min(low, row_low), max(high, row_high)
    if not finite:
        return NOT_FINITE, 0.0, dense
    spread = (float(high) - float(low)) * abs(scale)
    weights_spread = math.log(high_a / low_a) + math.log(high_b / low_b)
    most = RANGE32 if S.itemsize == 4 else RANGE64
    form = SCALING if spread <= most and spread + weights_spread <= 1.5 * most else ABSORBED
    return form, float(high if scale > 0 else low), dense


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _is_finite(values, live, dense):
    zero = values.dtype.type(0)
    poison = zero
    for j in range(values.shape[0]):
        poison += values[j] * zero if dense or live[j] != 0 else zero
    return poison == 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _range(values, live, dense):
    """Only for finite values: the flags that let a minimum be vectorised exclude NaN."""
    low, high = values.dtype.type(np.inf), values.dtype.type(-np.inf)
    for j in range(values.shape[0]):
        low = min(low, values[j] if dense or live[j] != 0 else low)
        high = max(high, values[j] if dense or live[j] != 0 else high)
    return low, high


@njit(nogil=True, cache=True, error_model="numpy")
def _log_round(S, a, b, scale, log_v, log_u, stop):
    """One round in the log domain, float64 sums: log_u from log_v, then log_v from log_u."""
    N, M = S.shape
    columns_max, columns_sum = np.full(M, -np.inf), np.zeros(M)
    for i in range(N):
        if _stopped(stop):
            return
        log_u[i] = 0
        if a[i] == 0:
            continue
        row_max, row_sum = -np.inf, 0.0
        for j in range(M):
            if b[j] != 0:
                row_max = max(row_max, S[i, j] * scale + log_v[j])
        for j in range(M):
            if b[j] != 0:
                row_sum += _exp(S[i, j] * scale + log_v[j] - row_max, S[i, j])
        log_u[i] = math.log(a[i]) - row_max - math.log(row_sum)
        for j in range(M):
            columns_max[j] = max(columns_max[j], S[i, j] * scale + log_u[i])
    for i in range(N):
        if a[i] != 0:
            for j in range(M):
                if b[j] != 0:
                    columns_sum[j] += _exp(S[i, j] * scale + log_u[i] - columns_max[j], S[i, j])
    for j in range(M):
        log_v[j] = math.log(b[j]) - columns_max[j] - math.log(columns_sum[j]) if b[j] != 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _kernel_scratch(N, M, like):
    """(K, columns_outer). K is empty for a large item: it then stands in place of an output [N, M]."""
    if min(N, M) > SMALL_SIDE and N * M > SMALL_ITEM:
        return np.empty((0, 0), like.dtype), False
    lines, length = (M, N) if N > M else (N, M)
    return np.zeros((lines, (length + LANES - 1) // LANES * LANES), like.dtype), N > M


@njit(nogil=True, cache=True, error_model="numpy")
def _fill(K, columns_outer, place, S, a, b, dense, form, shift, scale, log_u, log_v):
    """Make the kernel matrix in ``place`` [N, M], and copy it to K where K has memory of its own."""
    N, M = S.shape
    if dense and form == SCALING:
        _exp_row(place.reshape(N * M), S.reshape(N * M), S.dtype.type(shift), S.dtype.type(scale), b, True)
    else:
        for i in range(N):
            if a[i] == 0:
                place[i, :] = 0
            elif form == SCALING:
                _exp_row(place[i], S[i], S.dtype.type(shift), S.dtype.type(scale), b, False)
            else:
                _fold_row(place[i], S[i], scale, log_u[i], log_v, b)
    if columns_outer:
        for j in range(M):
            for i in range(N):
                K[j, i] = place[i, j]
    elif K.ctypes.data != place.ctypes.data:
        K[:N, :M] = place


@njit(nogil=True, cache=True, error_model="numpy")
def _ones_where(live, out):
    for i in range(live.shape[0]):
        out[i] = 1 if live[i] != 0 else 0


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _divide(marginal, sums, out):
    zero = out.dtype.type(0)
    for i in range(marginal.shape[0]):
        out[i] = marginal[i] / sums[i] if marginal[i] != 0 else zero


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _row_error(u, rows, a):
    total = 0.0
    for i in range(a.shape[0]):
        total += abs(u[i] * rows[i] - a[i])
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _start(K, columns_outer, a, b, u, v, next_u, sums, gathered):
    """From v alone, what the first round divides by: the row sums K v (and with rows outer, its u at once)."""
    if columns_outer:
        nothing = np.zeros(K.shape[0], K.dtype)
        pass_affine(K, u, v, nothing, v, gathered)
    else:
        pass_divide(K, v, a, sums, next_u, gathered)


@njit(nogil=True, cache=True, error_model="numpy")
def _round(K, columns_outer, a, b, u, v, next_u, sums, gathered):
    """One round, rows then columns, in one pass; leaves K v in ``gathered`` or ``sums``, whichever is the rows'."""
    if columns_outer:
        _divide(a, gathered, u)
        pass_divide(K, u, b, sums, v, gathered)
    else:
        u[:] = next_u
        _divide(b, gathered, v)
        pass_divide(K, v, a, sums, next_u, gathered)


@njit(nogil=True, cache=True, error_model="numpy")
def _drift(w, root, limit):
    """How far live scalings are from their roots: 0 within e^limit, 1 beyond it, 2 beyond what can be trusted."""
    low, high = math.exp(-limit), math.exp(limit)
    worst = 0
    for i in range(root.shape[0]):
        if root[i] != 0:
            drift = float(w[i]) / root[i]
            if not low <= drift <= high:
                if not low**2.5 <= drift <= high**2.5:
                    return 2
                worst = 1
    return worst


@njit(nogil=True, cache=True, error_model="numpy")
def _hold(sums, live, w):
    """Whether live sums of K w are far above what is lost of them: entries of K below the smallest normal number."""
    limits, largest = np.finfo(sums.dtype), 1.0
    for i in range(w.shape[0]):
        largest = max(largest, float(w[i]))
    least = limits.tiny / limits.eps / limits.eps * largest
    for i in range(live.shape[0]):  # noqa: SIM110  numba has no all()
        if live[i] != 0 and not sums[i] >= least:
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _absorb(w, root, log_w):
    """Fold live scalings into their logarithms, leaving the roots of the weights.

    So the entries of K that count for their row or column are above the smaller weight's root, and its sums near the
    roots: far from where float32 ends, with weights of 1e-30 on both sides.
    """
    for i in range(root.shape[0]):
        if root[i] != 0:
            log_w[i] += math.log(float(w[i]) / root[i])
            w[i] = root[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _start_absorbed(live, root, w, log_w):
    """The scalings whose full logarithms are given."""
    _ones_where(live, w)
    _absorb(w, root, log_w)


@njit(nogil=True, cache=True, error_model="numpy")
def _record(history, form, w, live, log_w):
    """SCALING keeps scalings, ABSORBED their full logarithms."""
    if form == SCALING:
        history[:] = w[: history.shape[0]]
    else:
        for i in range(live.shape[0]):
            history[i] = log_w[i] + math.log(w[i]) if live[i] != 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _solve_item(S, a, b, scale, num_iters, tol, K, columns_outer, plan, f, g, u_history, v_history, stop):
    """Returns (marginal_error, rounds run, form, shift)."""
    N, M = S.shape
    epsilon = 1.0 / abs(scale)
    form, shift, dense = _survey(S, a, b, scale)
    if form in (NO_MASS, NOT_FINITE):
        plan[:, :] = 0 if form == NO_MASS else np.nan
        f[:] = -np.inf if form == NO_MASS else np.nan
        g[:] = f[0]
        return (0.0, 0, form, shift) if form == NO_MASS else (np.nan, num_iters, form, shift)

    if K.shape[0] == 0:
        K = plan
    lines, length = K.shape
    sums, gathered = np.zeros(lines, S.dtype), np.zeros(length, S.dtype)
    u = np.zeros(length if columns_outer else N, S.dtype)
    v = np.zeros(M if columns_outer else length, S.dtype)
    next_u, previous_v = u.copy(), v.copy()
    log_u, log_v = np.zeros(N), np.zeros(M)  # what is folded into K
    limit = (RANGE32 if S.itemsize == 4 else RANGE64) / 2
    root_a, root_b = np.sqrt(a), np.sqrt(b)

    rows = gathered if columns_outer else sums  # K v
    done, error = 0, np.inf
    if form == SCALING:
        _ones_where(b, v)
        log_u[:] = -shift * scale
    else:
        _log_round(S, a, b, scale, log_v, log_u, stop)
        _start_absorbed(a, root_a, u, log_u)
        _start_absorbed(b, root_b, v, log_v)
        done = 1
        if u_history.shape[0] > 0:
            _record(u_history[0], form, u, a, log_u)
            _record(v_history[0], form, v, b, log_v)
    _fill(K, columns_outer, plan, S, a, b, dense, form, shift, scale, log_u, log_v)
    _start(K, columns_outer, a, b, u, v, next_u, sums, gathered)
    if done == 1 and tol > 0:
        error = _row_error(u, rows, a)

    while done < num_iters and not error < tol and not _stopped(stop):
        holds = form == SCALING or (_hold(rows, a, v) and (columns_outer or _hold(gathered, b, next_u)))
        if form == ABSORBED:
            previous_v[:] = v
        if holds:
            _round(K, columns_outer, a, b, u, v, next_u, sums, gathered)
        if form == ABSORBED:
            drift = 2
            if holds and (not columns_outer or _hold(sums, b, u)):
                drift = max(_drift(u, root_a, limit), _drift(v, root_b, limit))
            if drift == 1:
                _absorb(u, root_a, log_u)
                _absorb(v, root_b, log_v)
            elif drift == 2:
                _record(log_v, form, previous_v, b, log_v)
                _log_round(S, a, b, scale, log_v, log_u, stop)
                _start_absorbed(a, root_a, u, log_u)
                _start_absorbed(b, root_b, v, log_v)
            if drift > 0:
                _fill(K, columns_outer, plan, S, a, b, dense, form, shift, scale, log_u, log_v)
                _start(K, columns_outer, a, b, u, v, next_u, sums, gathered)
        if tol > 0:
            error = _row_error(u, rows, a)
        if u_history.shape[0] > 0:
            _record(u_history[done], form, u, a, log_u)
            _record(v_history[done], form, v, b, log_v)
        done += 1
    error = _row_error(u, rows, a)

    for i in range(N):
        for j in range(M):
            plan[i, j] = (K[j, i] if columns_outer else K[i, j]) * u[i] * v[j]
        f[i] = epsilon * (log_u[i] + math.log(u[i])) if a[i] != 0 else -np.inf
    for j in range(M):
        g[j] = epsilon * (log_v[j] + math.log(v[j])) if b[j] != 0 else -np.inf
    return error, done, form, shift


@njit(nogil=True, cache=True, error_model="numpy")
def _outputs(like, shape, kept, addresses):
    """plan, f, g, marginal_error, rounds; history [B, 1 + T, N + M] if kept: form and shift, then u and v by round."""
    B, N, M = shape
    plan, f, g, marginal_error, rounds, history = addresses
    return (
        _array(plan, shape, like), _array(f, (B, N), like), _array(g, (B, M), like), _array(marginal_error, (B,), like),
        _array(rounds, (B,), np.int32(0)), _array(history, (B, kept, N + M), 0.0),
    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def _solve_into(item, S, a, b, scale, num_iters, tol, K, columns_outer, outputs, stop):
    """Solve one item of the batch; every output is written once."""
    plan, f, g, marginal_error, rounds, history = outputs
    N = S.shape[0]
    kept = history[item, 1:]
    marginal_error[item], rounds[item], form, shift = _solve_item(
        S, a, b, scale, num_iters, tol, K, columns_outer, plan[item], f[item], g[item], kept[:, :N], kept[:, N:], stop
    )
    if history.shape[1] > 0:
        history[item, 0, :] = 0
        history[item, 0, 0], history[item, 0, 1] = form, shift
        kept[rounds[item] if form != NOT_FINITE else 0 :] = 0


@njit(nogil=True, cache=True, error_model="numpy")
def solve_items(first, last, stop, like, shape, S, a, b, scale, num_iters, tol, kept, addresses):
    """Solve items first … last - 1 of the batch. Tensors come as addresses; numbers are of the type of ``like``.

    ``stop`` is the address of a number: once it is not zero, nobody will read the outputs, and all ends early.
    """
    B, N, M = shape
    S, a, b = _array(S, shape, like), _array(a, (B, N), like), _array(b, (B, M), like)
    outputs = _outputs(like, shape, kept, addresses)
    K, columns_outer = _kernel_scratch(N, M, S)
    if max(N, M) <= TINY_SIDE and N * M <= TINY_ITEM:
        _solve_tiny(first, last, S, a, b, scale, num_iters, tol, K, columns_outer, outputs, stop)
        return
    for item in range(first, last):
        if _stopped(stop):
            return
        _solve_into(item, S[item], a[item], b[item], scale, num_iters, tol, K, columns_outer, outputs, stop)


@njit(nogil=True, cache=True, error_model="numpy")
def _solve_tiny(first, last, S, a, b, scale, num_iters, tol, K, columns_outer, outputs, stop):
    """Items too small to be vectorised along a side, many side by side, a lane each; by themselves where not SCALING.

    A lane does the same arithmetic whatever stands in the others, and however many there are.
    """
    N, M = S.shape[1:]
    lanes = FEW_ITEMS if last - first <= FEW_ITEMS else MANY_ITEMS
    padded_N, padded_M = _tiny_side(N), _tiny_side(M)
    k = np.zeros((padded_N, padded_M, lanes), S.dtype)
    marginals = np.zeros((padded_N, lanes), S.dtype), np.zeros((padded_M, lanes), S.dtype)
    items, shifts, count = np.zeros(lanes, np.int64), np.zeros(lanes), 0
    for item in range(first, last):
        if _stopped(stop):
            return
        form, shift, _ = _survey(S[item], a[item], b[item], scale)
        if form == SCALING:
            for i in range(N):
                marginals[0][i, count] = a[item, i]
                for j in range(M):
                    k[i, j, count] = S[item, i, j]
            for j in range(M):
                marginals[1][j, count] = b[item, j]
            items[count], shifts[count] = item, shift
            count += 1
        else:
            _solve_into(item, S[item], a[item], b[item], scale, num_iters, tol, K, columns_outer, outputs, stop)
        if count == lanes or (count > 0 and item == last - 1):
            _solve_lanes(k, marginals, items[:count], shifts, scale, num_iters, tol, outputs, stop)
            count = 0


@njit(nogil=True, cache=True, error_model="numpy")
def _tiny_side(size):
    """Sides that ``_half_round`` is compiled for."""
    return 4 if size <= 4 else 8 if size <= 8 else 16


@njit(nogil=True, cache=True, error_model="numpy")
def _solve_lanes(k, marginals, items, shifts, scale, num_iters, tol, outputs, stop):
    """Rounds of the items in the first lanes of k [N, M, lanes], which comes with their similarity; and their outputs.

    What stands in the other lanes is left from earlier, and is not looked at.
    """
    plan, f, g, marginal_error, rounds, history = outputs
    (N, M), (a, b), keeps = plan.shape[1:], marginals, history.shape[1] > 0
    done, error, running = np.zeros(k.shape[2], np.int32), np.zeros(k.shape[2]), np.ones(k.shape[2], np.bool_)
    u, v, next_u, rows, columns = (
        np.zeros_like(a),
        np.zeros_like(b),
        np.zeros_like(a),
        np.zeros_like(a),
        np.zeros_like(b),
    )
    _lane_kernel(k, a, b, shifts.astype(k.dtype), k.dtype.type(scale))
    turned = k.transpose((1, 0, 2)).copy()
    for j in range(M):
        _ones_where(b[j], v[j])
    _half_round(k, v, a, rows, next_u)
    for t in range(num_iters):
        if _stopped(stop):
            break
        for i in range(N):
            for lane in range(k.shape[2]):
                u[i, lane] = next_u[i, lane] if running[lane] else u[i, lane]
        _half_round(turned, u, b, columns, v)
        _half_round(k, v, a, rows, next_u)
        for lane in range(items.shape[0]):
            done[lane] += running[lane]
            if keeps:
                kept = history[items[lane], 1 + t]
                kept[:N], kept[N:] = u[:N, lane], v[:M, lane]
        if tol > 0:
            _lane_errors(u, rows, a, error)
            for lane in range(k.shape[2]):
                running[lane] = running[lane] and not error[lane] < tol
            if not running[: items.shape[0]].any():
                break
    _lane_errors(u, rows, a, error)
    for lane, item in enumerate(items):
        for i in range(N):
            for j in range(M):
                plan[item, i, j] = k[i, j, lane] * u[i, lane] * v[j, lane]
            live, log_u = a[i, lane] != 0, math.log(u[i, lane]) - shifts[lane] * scale
            f[item, i] = log_u / abs(scale) if live else -np.inf
        for j in range(M):
            g[item, j] = math.log(v[j, lane]) / abs(scale) if b[j, lane] != 0 else -np.inf
        marginal_error[item], rounds[item] = error[lane], done[lane]
        if keeps:
            history[item, 0, :] = 0
            history[item, 0, 0], history[item, 0, 1] = SCALING, shifts[lane]
            history[item, 1 + done[lane] :] = 0


@njit(nogil=True, cache=True, error_model="numpy")
def _lane_kernel(k, a, b, shift, scale):
    """k := exp((k - shift) scale) where both marginals are not zero, else 0."""
    zero = k.dtype.type(0)
    for i in range(k.shape[0]):
        for j in range(k.shape[1]):
            for lane in range(k.shape[2]):
                entry = _exp((k[i, j, lane] - shift[lane]) * scale, zero)
                k[i, j, lane] = entry if a[i, lane] != 0 and b[j, lane] != 0 else zero


@njit(nogil=True, cache=True, error_model="numpy")
def _half_round(k, inner, marginal, sums, outer):
    """sums = k inner; outer = marginal / sums, in every lane of k [outer, inner, lanes]."""
    if k.shape[1] == 4:
        _half_round_of(k, inner, marginal, sums, outer, (0,) * 4)
    elif k.shape[1] == 8:
        _half_round_of(k, inner, marginal, sums, outer, (0,) * 8)
    else:
        _half_round_of(k, inner, marginal, sums, outer, (0,) * 16)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _half_round_of(k, inner, marginal, sums, outer, side):
    """``side`` is a tuple as long as the inner side: a length that the compiler knows, so that it unrolls the sum and
    vectorises along lanes."""
    zero = k.dtype.type(0)
    for o in range(k.shape[0]):
        for lane in range(k.shape[2]):
            total = zero
            for i in range(len(side)):
                total += k[o, i, lane] * inner[i, lane]
            sums[o, lane] = total
            outer[o, lane] = marginal[o, lane] / total if marginal[o, lane] != 0 else zero


@njit(nogil=True, cache=True, error_model="numpy", fastmath=IN_ORDER)
def _lane_errors(u, rows, a, error):
    error[:] = 0
    for i in range(a.shape[0]):
        for lane in range(a.shape[1]):
            error[lane] += abs(u[i, lane] * rows[i, lane] - a[i, lane])


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _inverse_norms(tokens, out):
    """1 / |token|, and whether all squares and products are well inside the range of numbers.

    A zero token is, and gets a finite number, so that its similarities are zero.
    """
    limits, inside = np.finfo(tokens.dtype), True
    least = limits.tiny / limits.eps / limits.eps
    for i in range(tokens.shape[0]):
        total = tokens.dtype.type(0)
        for k in range(tokens.shape[1]):
            total += tokens[i, k] * tokens[i, k]
        out[i] = 1 / max(math.sqrt(total), math.sqrt(limits.tiny))
        if not least <= total <= 1 / least:
            for k in range(tokens.shape[1]):
                inside = inside and tokens[i, k] == 0
    return inside


@njit(nogil=True, cache=True, error_model="numpy")
def _over_largest(tokens):
    """Tokens over the size of their largest entry, which leaves a cosine as it is."""
    scaled = np.empty_like(tokens)
    for i in range(tokens.shape[0]):
        largest = tokens.dtype.type(0)
        for k in range(tokens.shape[1]):
            largest = max(largest, abs(tokens[i, k]))
        for k in range(tokens.shape[1]):
            scaled[i, k] = tokens[i, k] / largest if largest != 0 else tokens[i, k]
    return scaled


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _products(x, y, S):
    """S = x yᵀ for an item in cache: two tokens of x by four of y at a time, all eight sums in registers."""
    N, M = S.shape
    zero = S.dtype.type(0)
    for block in range(M // 4):
        j = 4 * block
        for pair in range(N // 2):
            i = 2 * pair
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
            for k in range(x.shape[1]):
                x0, x1 = x[i, k], x[i + 1, k]
                s00 += x0 * y[j, k]
                s01 += x0 * y[j + 1, k]
                s02 += x0 * y[j + 2, k]
                s03 += x0 * y[j + 3, k]
                s10 += x1 * y[j, k]
                s11 += x1 * y[j + 1, k]
                s12 += x1 * y[j + 2, k]
                s13 += x1 * y[j + 3, k]
            S[i, j], S[i, j + 1], S[i, j + 2], S[i, j + 3] = s00, s01, s02, s03
            S[i + 1, j], S[i + 1, j + 1], S[i + 1, j + 2], S[i + 1, j + 3] = s10, s11, s12, s13
    for i in range(N):
        whole = M // 4 * 4 if i < N // 2 * 2 else 0
        for j in range(whole, M):
            total = zero
            for k in range(x.shape[1]):
                total += x[i, k] * y[j, k]
            S[i, j] = total


@njit(nogil=True, cache=True, error_model="numpy")
def _cosines(x, y, multiplied, S):
    """S = x yᵀ over the norms, from the products where S holds these already and they can be trusted."""
    scale_x, scale_y = np.empty(S.shape[0], S.dtype), np.empty(S.shape[1], S.dtype)
    if not (_inverse_norms(x, scale_x) and _inverse_norms(y, scale_y)):
        x, y, multiplied = _over_largest(x), _over_largest(y), False
        _inverse_norms(x, scale_x)
        _inverse_norms(y, scale_y)
    if not multiplied:
        _products(x, y, S)
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            S[i, j] *= scale_x[i] * scale_y[j]


@njit(nogil=True, cache=True, error_model="numpy")
def attend_items(
    first, last, stop, like, shape, features, x, y, multiplied, cosine, a, b, scale, num_iters, tol, S, kept, addresses
):
    """``solve_items`` for tokens. Makes the similarity S, from their products where S holds these already."""
    B, N, M = shape
    x, y = _array(x, (B, N, features), like), _array(y, (B, M, features), like)
    S, a, b = _array(S, shape, like), _array(a, (B, N), like), _array(b, (B, M), like)
    outputs = _outputs(like, shape, kept, addresses)
    K, columns_outer = _kernel_scratch(N, M, S)
    for item in range(first, last):
        if _stopped(stop):
            return
        if cosine:
            _cosines(x[item], y[item], multiplied, S[item])
        elif not multiplied:
            _products(x[item], y[item], S[item])
        _solve_into(item, S[item], a[item], b[item], scale, num_iters, tol, K, columns_outer, outputs, stop)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def _combine_lines(K, first_line, outer_terms, inner_terms, start, stop, sums):
    """Up to four lines of K, which are lines first_line … of the whole: each entry times its rank-one terms' sum."""
    lines, length = K.shape
    last = outer_terms.shape[1] - 1
    o0, o1 = first_line, min(first_line + 1, last)
    o2, o3 = min(first_line + 2, last), min(first_line + 3, last)
    sums[:, :] = 0
    for k in range(start, stop):
        w0, w1, w2, w3 = outer_terms[k, o0], outer_terms[k, o1], outer_terms[k, o2], outer_terms[k, o3]
        for i in range(length):
            w = inner_terms[k, i]
            sums[0, i] += w0 * w
            sums[1, i] += w1 * w
            sums[2, i] += w2 * w
            sums[3, i] += w3 * w
    for line in range(lines):
        for i in range(length):
            K[line, i] *= sums[line, i]


@njit(nogil=True, cache=True, error_model="numpy")
def _combine(K, outer_terms, inner_terms, stop):
    """K := K * (outer_termsᵀ inner_terms), elementwise: the history's rank-one terms, four lines at a time."""
    lines, length = K.shape
    sums = np.empty((4, length), K.dtype)
    for o in range(0, lines, 4):
        if _stopped(stop):
            return
        _combine_lines(K[o : o + 4], o, outer_terms, inner_terms, 0, outer_terms.shape[0], sums)


@njit(nogil=True, cache=True, error_model="numpy")
def _weigh(grad_plan, plan, grad_f, grad_g, epsilon, du, dv):
    """The adjoints of log u and log v that the outputs hand in."""
    N, M = plan.shape
    for i in range(N):
        du[i] = epsilon * grad_f[i] if plan.dtype.type(grad_f[i]) != 0 else 0.0
    for j in range(M):
        dv[j] = epsilon * grad_g[j] if plan.dtype.type(grad_g[j]) != 0 else 0.0
    for i in range(N):
        total = 0.0
        for j in range(M):
            if plan[i, j] != 0:
                weighed = grad_plan[i, j] * plan[i, j]
                total += weighed
                dv[j] += weighed
        du[i] += total


@njit(nogil=True, cache=True, error_model="numpy")
def _terms(lines, length, rounds, like):
    """Room for two rank-one terms a round: (outer, inner)."""
    return np.zeros((2 * rounds, lines), like.dtype), np.zeros((2 * rounds, length), like.dtype)


@njit(nogil=True, cache=True, error_model="numpy")
def _weighted(scaling, adjoint, marginal, out):
    """out = scaling adjoint / marginal: what a half round sends through K."""
    for i in range(marginal.shape[0]):
        out[i] = scaling[i] * adjoint[i] / marginal[i] if marginal[i] != 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _unroll_rows_outer(K, a, b, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop):
    """Back through all rounds, one pass each; K becomes K times the sum of the rank-one terms.

    Round t, columns: wv = v dv / b, du -= u (K wv); rows: wu = u du / a, dv = -v_before (Kᵀ wu); and
    dL -= K (u wvᵀ + wu v_beforeᵀ) in both (docs/gradients.md).
    """
    N, M = a.shape[0], b.shape[0]
    lines, length = K.shape
    outer_terms, inner_terms = _terms(lines, length, rounds, K)
    gathered, offset, slope = np.zeros(length, K.dtype), np.zeros(lines, K.dtype), np.zeros(lines, K.dtype)
    for t in range(rounds - 1, -1, -1):
        if _stopped(stop):
            break
        u, wu = outer_terms[2 * t], outer_terms[2 * t + 1]
        wv, v_before = inner_terms[2 * t], inner_terms[2 * t + 1]
        u[:N] = u_history[t]
        if t > 0:
            v_before[:M] = v_history[t - 1]
        else:
            _ones_where(b, v_before)
        _weighted(v_history[t], dv, b, wv)
        _weighted(u, du, a, offset)
        for i in range(N):
            slope[i] = -u[i] * (u[i] / a[i]) if a[i] != 0 else 0.0
        pass_affine(K, wv, offset, slope, wu, gathered)
        for i in range(N):
            grad_a[i] += wu[i] / u[i] if a[i] != 0 else 0.0
            du[i] = 0
        for j in range(M):
            grad_b[j] += dv[j] / b[j] if b[j] != 0 else 0.0
            dv[j] = -v_before[j] * gathered[j]
    _combine(K, outer_terms, inner_terms, stop)


@njit(nogil=True, cache=True, error_model="numpy")
def _unroll_columns_outer(K, a, b, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop):
    """The same with the columns outside: a pass ends one round and begins the one before."""
    N, M = a.shape[0], b.shape[0]
    lines, length = K.shape
    outer_terms, inner_terms = _terms(lines, length, rounds, K)
    gathered, offset, slope = np.zeros(length, K.dtype), np.zeros(lines, K.dtype), np.zeros(lines, K.dtype)
    last = outer_terms[2 * rounds - 2]
    _weighted(v_history[rounds - 1], dv, b, offset)
    pass_affine(K, inner_terms[0], offset, slope, last, gathered)
    for t in range(rounds - 1, -1, -1):
        if _stopped(stop):
            break
        u, wu = inner_terms[2 * t], inner_terms[2 * t + 1]
        wv, v_before = outer_terms[2 * t], outer_terms[2 * t + 1]
        u[:N] = u_history[t]
        for j in range(M):
            grad_b[j] += wv[j] / v_history[t, j] if b[j] != 0 else 0.0
        for i in range(N):
            du[i] -= u[i] * gathered[i]
        _weighted(u, du, a, wu)
        for i in range(N):
            grad_a[i] += du[i] / a[i] if a[i] != 0 else 0.0
            du[i] = 0
        if t > 0:
            v_before[:M] = v_history[t - 1]
            offset[:] = 0
            for j in range(M):
                slope[j] = -v_before[j] * (v_before[j] / b[j]) if b[j] != 0 else 0.0
            pass_affine(K, wu, offset, slope, outer_terms[2 * t - 2], gathered)
        else:
            _ones_where(b, v_before)
    _combine(K, outer_terms, inner_terms, stop)


@njit(nogil=True, cache=True, error_model="numpy")
def _near(log_w, folded, root, limit):
    for i in range(root.shape[0]):
        if root[i] != 0 and not abs(log_w[i] - folded[i] - math.log(root[i])) <= limit:
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def _without_roots(log_w, root, out):
    """What to fold for scalings to be the roots of the weights."""
    for i in range(root.shape[0]):
        out[i] = log_w[i] - math.log(root[i]) if root[i] != 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _relative(log_w, folded, live, out):
    for i in range(live.shape[0]):
        out[i] = math.exp(log_w[i] - folded[i]) if live[i] != 0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def _unroll_absorbed(K, S, a, b, scale, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop):
    """Back through rounds whose scalings are kept as logarithms, folding K anew where they have moved far.

    A half round folded at its own scalings has rows (or columns) that sum to the marginals: always safe. What
    was folded for which terms is kept as vectors, and K comes out as in the other two.
    """
    N, M = a.shape[0], b.shape[0]
    limit = 15.0 if K.itemsize == 4 else 100.0
    outer_terms, inner_terms = _terms(N, M, rounds, K)
    folds_u, folds_v = np.zeros((2 * rounds, N)), np.zeros((2 * rounds, M))
    starts = np.zeros(2 * rounds + 1, np.int64)  # the first term of each fold
    gathered, none = np.zeros(M, K.dtype), np.zeros(N, K.dtype)
    sums, slope = np.zeros(N, K.dtype), np.ones(N, K.dtype)
    before, root_a, root_b = np.zeros(M), np.sqrt(a), np.sqrt(b)
    count, folds = 0, 0
    for t in range(rounds - 1, -1, -1):
        if _stopped(stop):
            break
        log_u, log_v = u_history[t], v_history[t]
        if folds == 0 or not (
            _near(log_u, folds_u[folds - 1], root_a, limit) and _near(log_v, folds_v[folds - 1], root_b, limit)
        ):
            _without_roots(log_u, root_a, folds_u[folds])
            _without_roots(log_v, root_b, folds_v[folds])
            _fill(K, False, K, S, a, b, False, ABSORBED, 0.0, scale, folds_u[folds], folds_v[folds])
            starts[folds] = count
            folds += 1
        u, wv = outer_terms[count], inner_terms[count]
        _relative(log_u, folds_u[folds - 1], a, u)
        _relative(log_v, folds_v[folds - 1], b, gathered)
        _weighted(gathered, dv, b, wv)
        pass_affine(K, wv, none, slope, sums, gathered)
        count += 1
        for i in range(N):
            du[i] -= u[i] * sums[i]
            grad_a[i] += du[i] / a[i] if a[i] != 0 else 0.0
        for j in range(M):
            grad_b[j] += dv[j] / b[j] if b[j] != 0 else 0.0
            before[j] = v_history[t - 1, j] if t > 0 else 0.0
        if not _near(before, folds_v[folds - 1], root_b, limit):
            _without_roots(log_u, root_a, folds_u[folds])
            _without_roots(before, root_b, folds_v[folds])
            _fill(K, False, K, S, a, b, False, ABSORBED, 0.0, scale, folds_u[folds], folds_v[folds])
            starts[folds] = count
            folds += 1
        wu, v_before = outer_terms[count], inner_terms[count]
        _relative(log_u, folds_u[folds - 1], a, sums)
        _weighted(sums, du, a, wu)
        _relative(before, folds_v[folds - 1], b, v_before)
        pass_affine(K, v_before, wu.copy(), none, sums, gathered)  # sums = wu, gathered = Kᵀ wu
        count += 1
        for j in range(M):
            dv[j] = -v_before[j] * gathered[j]
        du[:] = 0
    starts[folds] = count
    _combine_folds(K, S, a, b, scale, outer_terms, inner_terms, folds_u, folds_v, starts, folds, stop)


@njit(nogil=True, cache=True, error_model="numpy")
def _combine_folds(K, S, a, b, scale, outer_terms, inner_terms, folds_u, folds_v, starts, folds, stop):
    """K := the sum over folds of the folded kernel times its own rank-one terms, four rows at a time."""
    N, M = S.shape
    folded, sums = np.empty((4, M), K.dtype), np.empty((4, M), K.dtype)
    for i in range(0, N, 4):
        if _stopped(stop):
            return
        rows = min(4, N - i)
        K[i : i + rows] = 0
        for fold in range(folds):
            for row in range(rows):
                if a[i + row] != 0:
                    _fold_row(folded[row], S[i + row], scale, folds_u[fold, i + row], folds_v[fold], b)
                else:
                    folded[row] = 0
            _combine_lines(folded[:rows], i, outer_terms, inner_terms, starts[fold], starts[fold + 1], sums)
            K[i : i + rows] += folded[:rows]


@njit(nogil=True, cache=True, error_model="numpy")
def _unroll_item(
    S, a, b, scale, form, shift, rounds, u_history, v_history, du, dv, K, columns_outer, grad_S, grad_a, grad_b, stop
):
    """grad_S comes out as K times the rank-one terms: what the rounds themselves take from dL."""
    N, M = S.shape
    if form == ABSORBED:
        _unroll_absorbed(grad_S, S, a, b, scale, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop)
        return
    unused = np.zeros(0)
    if K.shape[0] == 0:
        K = grad_S
    _fill(K, columns_outer, grad_S, S, a, b, False, form, shift, scale, unused, unused)
    if columns_outer:
        _unroll_columns_outer(K, a, b, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop)
    else:
        _unroll_rows_outer(K, a, b, u_history, v_history, rounds, du, dv, grad_a, grad_b, stop)
    for i in range(N):
        for j in range(M):
            grad_S[i, j] = K[j, i] if columns_outer else K[i, j]


@njit(nogil=True, cache=True, error_model="numpy")
def _gradients(like, shape, addresses):
    """grad_plan, grad_f, grad_g that come in; grad_S, grad_a, grad_b that go out."""
    B, N, M = shape
    grad_plan, grad_f, grad_g, grad_S, grad_a, grad_b = addresses
    return (
        _array(grad_plan, shape, like), _array(grad_f, (B, N), like), _array(grad_g, (B, M), like),
        _array(grad_S, shape, like), _array(grad_a, (B, N), like), _array(grad_b, (B, M), like),
    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def unroll_items(first, last, stop, like, shape, S, a, b, scale, plan, rounds, history, kept, addresses):
    """The gradient of the rounds that were run, for items first … last - 1."""
    B, N, M = shape
    S, a, b = _array(S, shape, like), _array(a, (B, N), like), _array(b, (B, M), like)
    plan, rounds = _array(plan, shape, like), _array(rounds, (B,), np.int32(0))
    history = _array(history, (B, kept, N + M), 0.0)
    grad_plan, grad_f, grad_g, grad_S, grad_a, grad_b = _gradients(like, shape, addresses)
    K, columns_outer = _kernel_scratch(N, M, S)
    du, dv = np.zeros(N), np.zeros(M)
    for item in range(first, last):
        if _stopped(stop):
            return
        form, shift = int(history[item, 0, 0]), history[item, 0, 1]
        if form in (NO_MASS, NOT_FINITE):
            _no_gradient(form, grad_S[item], grad_a[item], grad_b[item])
            continue
        grad_a[item] = 0
        grad_b[item] = 0
        _weigh(grad_plan[item], plan[item], grad_f[item], grad_g[item], 1 / abs(scale), du, dv)
        _unroll_item(
            S[item], a[item], b[item], scale, form, shift, rounds[item], history[item, 1:, :N], history[item, 1:, N:],
            du, dv, K, columns_outer, grad_S[item], grad_a[item], grad_b[item], stop,
        )  # fmt: skip
        _finish(grad_S[item], grad_plan[item], plan[item], scale)


@njit(nogil=True, cache=True, error_model="numpy")
def _no_gradient(form, grad_S, grad_a, grad_b):
    nothing = 0.0 if form == NO_MASS else np.nan
    grad_S[:, :] = nothing
    grad_a[:] = nothing
    grad_b[:] = nothing


@njit(nogil=True, cache=True, error_model="numpy")
def _finish(grad_S, grad_plan, plan, scale):
    """grad_S = (grad_plan plan - what the rounds take) scale; a plan of zero takes no part."""
    for i in range(plan.shape[0]):
        for j in range(plan.shape[1]):
            weighed = grad_plan[i, j] * plan[i, j] if plan[i, j] != 0 else 0.0
            grad_S[i, j] = (weighed - grad_S[i, j]) * scale


@njit(nogil=True, cache=True, error_model="numpy")
def _centred_solve(plan, rows, columns, right, stop):
    """Conjugate gradients, float64, on what is left for the columns once the rows are eliminated.

    The matrix diag(c) - Pᵀ diag(1/r) P is singular along constants; c cᵀ lifts that direction. Preconditioned
    by diag(c); a pass over the plan a step.
    """
    N, M = plan.shape
    ridge = 10 * np.finfo(plan.dtype).eps
    slope, nothing = np.zeros(N), np.zeros(N)
    for i in range(N):
        slope[i] = 1 / rows[i] if rows[i] != 0 else 0.0
    outer, gathered = np.zeros(N), np.zeros(M)
    x, residual, direction, scaled = np.zeros(M), right.copy(), np.zeros(M), np.zeros(M)
    for j in range(M):
        direction[j] = residual[j] / columns[j] if columns[j] != 0 else 0.0
    product = np.dot(residual, direction)
    # The largest entry must not hide the others: by the inverse of the smallest weight it is 1e30 times these.
    _, low, high, _ = _weight_range(columns)
    enough = product * (low / high) * min(1e-20, np.finfo(plan.dtype).eps ** 2)
    for _ in range(4 * M + 50):
        if not product > enough or _stopped(stop):
            break
        pass_affine(plan, direction, nothing, slope, outer, gathered)
        lift = np.dot(columns, direction)
        for j in range(M):
            scaled[j] = columns[j] * ((1 + ridge) * direction[j] + lift) - gathered[j]
        step = product / np.dot(direction, scaled)
        for j in range(M):
            x[j] += step * direction[j]
            residual[j] -= step * scaled[j]
            scaled[j] = residual[j] / columns[j] if columns[j] != 0 else 0.0
        new_product = np.dot(residual, scaled)
        for j in range(M):
            direction[j] = scaled[j] + new_product / product * direction[j]
        product = new_product
    return x


@njit(nogil=True, cache=True, error_model="numpy")
def _implicit_item(plan, grad_plan, grad_f, grad_g, scale, grad_S, grad_a, grad_b, stop):
    """Adjoint of the fixed point: J (lambda, mu) = (du, dv), then grad_S, and grad_a, grad_b = lambda, mu."""
    N, M = plan.shape
    du, dv = np.zeros(N), np.zeros(M)
    _weigh(grad_plan, plan, grad_f, grad_g, 1 / abs(scale), du, dv)
    rows, columns = np.zeros(N), np.zeros(M)
    for i in range(N):
        for j in range(M):
            rows[i] += plan[i, j]
            columns[j] += plan[i, j]
    inverse = np.zeros(N)
    for i in range(N):
        inverse[i] = 1 / rows[i] if rows[i] != 0 else 0.0
    gathered, outer, nothing, zero = np.zeros(M), np.zeros(N), np.zeros(N), np.zeros(M)
    pass_affine(plan, zero, du * inverse, nothing, outer, gathered)
    mu = _centred_solve(plan, rows, columns, dv - gathered, stop)
    pass_affine(plan, mu, nothing, -inverse, outer, gathered)
    for i in range(N):
        outer[i] += du[i] * inverse[i]
        grad_a[i] = outer[i]
        for j in range(M):
            weighed = grad_plan[i, j] * plan[i, j] if plan[i, j] != 0 else 0.0
            grad_S[i, j] = (weighed - plan[i, j] * (outer[i] + mu[j])) * scale
    for j in range(M):
        grad_b[j] = mu[j]


@njit(nogil=True, cache=True, error_model="numpy")
def implicit_items(first, last, stop, like, shape, plan, scale, addresses):
    """The gradient of the converged plan, for items first … last - 1."""
    plan = _array(plan, shape, like)
    grad_plan, grad_f, grad_g, grad_S, grad_a, grad_b = _gradients(like, shape, addresses)
    for item in range(first, last):
        if _stopped(stop):
            return
        if np.isnan(plan[item, 0, 0]):
            _no_gradient(NOT_FINITE, grad_S[item], grad_a[item], grad_b[item])
        else:
            _implicit_item(
                plan[item], grad_plan[item], grad_f[item], grad_g[item], scale,
                grad_S[item], grad_a[item], grad_b[item], stop,
            )  # fmt: skip
