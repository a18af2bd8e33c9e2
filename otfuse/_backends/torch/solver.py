"""The solver in plain PyTorch: the specification, and the faster form that runs.

Letters: B batch, N tokens of ``x``, M tokens of ``y``. Notation as in docs/concepts.md: the plan is
``exp((f + g + S) / epsilon) = diag(u) K diag(v)`` with ``K = exp(S / epsilon)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from otfuse._attention import Marginals
from otfuse._backends.base import Solution
from otfuse._problem import SolveOptions
from otfuse.kernels.constants import SCALING_RANGE

# Iterations between absorptions beyond that range. An iteration changes a scaling by at most a factor of one over the
# smallest weight (docs/numerics.md): with uniform weights five keep 16384 tokens well inside float32. Weights that are
# passed may be as small as 1e-30: they get half the range above, and beyond it an absorption every half iteration.
ABSORB_EVERY = 5


def specification(similarity: Tensor, a: Tensor, b: Tensor, options: SolveOptions) -> Solution:
    """Sinkhorn-Knopp in the log domain: in float64, what every backend is judged against.

    ``a`` [B, N] and ``b`` [B, M] sum to one per item; zero means padding, whose similarity must be finite.
    """
    epsilon, tol = options.epsilon, options.tol
    log_kernel = similarity / epsilon  # [B, N, M]
    log_a, log_b = _log(a), _log(b)  # -inf at padding
    log_u = torch.zeros_like(a)
    log_v = torch.where(b == 0, -torch.inf, torch.zeros_like(b))
    rows = torch.logsumexp(log_kernel + log_v[:, None, :], 2)  # [B, N]
    marginal_error = torch.full_like(a[:, 0], torch.inf)  # [B]
    num_iters_run = torch.zeros_like(marginal_error, dtype=torch.int32)
    for _ in range(options.num_iters):
        active = (marginal_error >= (tol or 0)) | marginal_error.isnan()
        new_u = log_a - rows
        new_v = log_b - torch.logsumexp(log_kernel + new_u[:, :, None], 1)
        log_u = torch.where(active[:, None], new_u, log_u)
        log_v = torch.where(active[:, None], new_v, log_v)
        rows = torch.logsumexp(log_kernel + log_v[:, None, :], 2)
        marginal_error = (torch.exp(log_u + rows) - a).detach().abs().sum(1)
        num_iters_run = num_iters_run + active
    plan = torch.exp(log_kernel + log_u[:, :, None] + log_v[:, None, :])
    return Solution(plan, epsilon * log_u, epsilon * log_v, marginal_error, num_iters_run)


def scaling(
    similarity: Tensor,
    a: Tensor,
    b: Tensor,
    options: SolveOptions,
    bound: float | None = None,
    uniform: bool = False,
    masked: bool = True,
) -> Solution:
    """The same by scalings: one exponential per entry where ``bound >= |S|`` proves that safe.

    Otherwise, where the weights are known to be ``uniform`` (over a mask, say), the first iteration is done in the
    log domain, and the scalings are folded into the kernel every few iterations (absorption): after the first no
    row or column sum can underflow, see docs/numerics.md. With weights of any size they can, so there each half
    iteration has a kernel of its own. Sums of padding can underflow too, so unless ``masked`` is False (no weight
    is zero) they are lifted: 0 / 0 is NaN. The folded part carries no gradient; the result does not depend on it.
    """
    epsilon, tol = options.epsilon, options.tol
    safe = SCALING_RANGE[similarity.itemsize] / (1 if uniform else 2)
    one_piece = bound is not None and not isinstance(epsilon, Tensor) and 2 * bound / epsilon <= safe
    if not (one_piece or uniform):
        return _halves(similarity, a, b, options)
    log_kernel = similarity / epsilon  # [B, N, M]
    u, v = torch.ones_like(a), (b != 0).to(b.dtype)
    if one_piece:
        assert bound is not None
        # Folded into the kernel. Not by full_like: an op's parameter stays as it was when torch.compile traced it.
        log_u0, log_v0 = torch.zeros_like(a) - bound / epsilon, torch.zeros_like(b)
    else:
        log_v = torch.where(b == 0, -torch.inf, torch.zeros_like(b))
        log_u = _log(a) - torch.logsumexp(log_kernel + log_v[:, None, :], 2)
        log_v = _log(b) - torch.logsumexp(log_kernel + log_u[:, :, None], 1)
        log_u0, log_v0 = _finite(log_u.detach()), _finite(log_v.detach())
        u, v = torch.exp(log_u - log_u0), torch.exp(log_v - log_v0)  # ones, with the gradient
    first = 0 if one_piece else 1
    num_iters_run = torch.full_like(a[:, 0], first, dtype=torch.int32)  # [B]
    active = num_iters_run == first

    padding_a, padding_b = (a == 0).to(a.dtype), (b == 0).to(b.dtype)
    kernel, rows = _folded(log_kernel, log_u0, log_v0, v)
    if not uniform:  # of one piece: row sums at most one, since autograd forms u / rows, and weights may be 1e-30
        lower = 2.0 ** -math.ceil(safe / math.log(2))  # a power of two, which rounds nothing
        kernel, rows = kernel * lower, rows * lower
    for t in range(first, options.num_iters):
        if not one_piece and t > first and (t - first) % ABSORB_EVERY == 0:
            log_u0, u = _absorb(log_u0, u)
            log_v0, v = _absorb(log_v0, v)
            kernel, rows = _folded(log_kernel, log_u0, log_v0, v)
        if tol is not None and t > 0:
            active = active & ~(_row_error(u * rows, a) < tol)
        new_u = a / (rows + padding_a if masked else rows)
        columns = (kernel * new_u[:, :, None]).sum(1)
        new_v = b / (columns + padding_b if masked else columns)
        if tol is not None:
            new_u, new_v = torch.where(active[:, None], new_u, u), torch.where(active[:, None], new_v, v)
        u, v = new_u, new_v
        rows = (kernel * v[:, None, :]).sum(2)
        num_iters_run = num_iters_run + active

    plan = kernel * u[:, :, None] * v[:, None, :]
    marginal_error = _row_error(u * rows, a)
    f, g = epsilon * (_log(u if uniform else u * lower) + log_u0), epsilon * (_log(v) + log_v0)
    return Solution(plan, f, g, marginal_error, num_iters_run)


def _halves(similarity: Tensor, a: Tensor, b: Tensor, options: SolveOptions) -> Solution:
    """A kernel for each half iteration, with the other side folded in, and on its own side what made the last sums one.

    Sums then are at least a weight, and at most one over a weight: numbers, also in a gradient, for weights of 1e-30.
    """
    epsilon, tol = options.epsilon, options.tol
    log_kernel = similarity / epsilon  # [B, N, M]
    log_a, log_b = _log(a), _log(b)  # -inf at padding, whose sums are one
    padding_a, padding_b = (a == 0).to(a.dtype), (b == 0).to(b.dtype)
    log_u, log_v = torch.zeros_like(a), torch.where(b == 0, -torch.inf, torch.zeros_like(b))
    # Constants, any: their gradients go out. At first what makes the largest of a row, of a column, one.
    shift_u = torch.where(a == 0, -torch.inf, -(log_kernel + log_v[:, None, :]).detach().amax(2))  # [B, N]
    num_iters_run = torch.zeros_like(a[:, 0], dtype=torch.int32)  # [B]
    active = num_iters_run == 0
    for t in range(options.num_iters):
        rows = torch.exp(log_kernel + log_v[:, None, :] + shift_u[:, :, None]).sum(2) + padding_a
        if tol is not None and t > 0:
            active = active & ~(_row_error(a * rows, a) < tol)
        log_rows = rows.log() - shift_u
        new_u = log_a - log_rows
        if t == 0:
            shift_v = torch.where(b == 0, -torch.inf, -(log_kernel + new_u[:, :, None]).detach().amax(1))  # [B, M]
        columns = torch.exp(log_kernel + new_u[:, :, None] + shift_v[:, None, :]).sum(1) + padding_b
        log_columns = columns.log() - shift_v
        new_v = log_b - log_columns
        if tol is not None:
            new_u, new_v = torch.where(active[:, None], new_u, log_u), torch.where(active[:, None], new_v, log_v)
        log_u, log_v, shift_u, shift_v = new_u, new_v, -log_rows.detach(), -log_columns.detach()
        num_iters_run = num_iters_run + active

    kernel = torch.exp(log_kernel + log_u[:, :, None] + shift_v[:, None, :])
    plan = kernel * (b / (kernel.sum(1) + padding_b))[:, None, :]  # its columns sum to b, however log_v is rounded
    return Solution(plan, epsilon * log_u, epsilon * log_v, _row_error(plan.sum(2), a), num_iters_run)


Solver = Callable[[Tensor, Tensor, Tensor], Solution]  # of similarity, a and b


def without_offset(solver: Solver, masked: bool) -> Solver:
    """``solver`` of what the similarities are below the largest of their row: division by epsilon rounds by their size.

    The difference is exact where a row's values lie within a factor of two of each other. The plan does not depend on
    what is taken off, and f gets it back.
    """

    def solve_rest(similarity: Tensor, a: Tensor, b: Tensor) -> Solution:
        rows = similarity.detach()
        largest = (torch.where((b != 0)[:, None, :], rows, -torch.inf) if masked else rows).amax(2)  # [B, N]
        solution = solver(similarity - largest[:, :, None], a, b)
        return solution._replace(f=solution.f - largest)

    return solve_rest


def solve(solver: Solver, similarity: Tensor, p: Marginals) -> Solution:
    """``solver`` with the contract's rules for padding, for items without mass, and for NaN."""
    a, b, has_mass = p.a, p.b, None
    if p.masked:
        similarity = torch.where((a != 0)[:, :, None] & (b != 0)[:, None, :], similarity, 0)
        has_mass = (a != 0).any(1)  # [B]; b has mass exactly where a has
        # Any marginals will do for an item without mass that keep its arithmetic finite.
        a = torch.where(has_mass[:, None], a, 1 / a.shape[1])
        b = torch.where(has_mass[:, None], b, 1 / b.shape[1])
    # One entry that is not finite spoils its item as a whole, and only that.
    finite = torch.isfinite(similarity).flatten(1).all(1)  # [B]
    similarity = similarity + torch.where(finite, 0.0, torch.nan)[:, None, None].to(similarity.dtype)
    solution = solver(similarity, a, b)
    if has_mass is None:
        return solution
    return Solution(
        torch.where(has_mass[:, None, None], solution.plan, 0),
        torch.where(has_mass[:, None], solution.f, -torch.inf),
        torch.where(has_mass[:, None], solution.g, -torch.inf),
        torch.where(has_mass, solution.marginal_error, 0),
        torch.where(has_mass, solution.num_iters, 0),
    )


def _folded(log_kernel: Tensor, log_u0: Tensor, log_v0: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel with scalings folded in [B, N, M], and its product with v [B, N].

    A live entry is part of a plan then, so at most one; the clamp keeps padding finite.
    """
    kernel = torch.exp((log_kernel + log_u0[:, :, None] + log_v0[:, None, :]).clamp_max(1))
    return kernel, (kernel * v[:, None, :]).sum(2)


def _absorb(log_folded: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a scaling's value in and leave its gradient behind, on a scaling of one (zero at padding)."""
    value = scaling.detach()
    value = torch.where(value == 0, 1, value)
    return log_folded + value.log(), scaling / value


def _row_error(rows: Tensor, a: Tensor) -> Tensor:
    """[B], L1 error of a plan's row sums."""
    return (rows - a).detach().abs().sum(1)


def _finite(log_weights: Tensor) -> Tensor:
    return torch.where(log_weights == -torch.inf, 0, log_weights)


def _log(weights: Tensor) -> Tensor:
    """log, with -inf and no gradient where the weight is zero."""
    padding = weights == 0
    return torch.where(padding, -torch.inf, torch.where(padding, 1, weights).log())
