"""The parts of the operator around the solver, in plain PyTorch: marginals, similarity, the two attends.

Backends that fuse these with the solver replace them; the others share them. Everything here runs in the
solve dtype (float32 at least) and is differentiable.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from otfuse._problem import Problem
from otfuse.kernels.constants import LEAST


class Marginals(NamedTuple):
    """Weights that sum to one per batch element; zero means padding. One without mass is zero on both sides."""

    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    masked: bool  # False promises that no weight is zero


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast off: the operator is solved in float32 at least, whatever surrounds it."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def solve_precision(values: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def marginals(problem: Problem) -> Marginals:
    """The problem's ``a`` and ``b`` as :class:`Marginals`, in the solve dtype, differentiable."""
    B, N, M = problem.shape
    if problem.a is None and problem.b is None:
        dtype, device = problem.solve_dtype, problem.values.device
        a = torch.full((B, N), 1 / N, dtype=dtype, device=device)
        return Marginals(a, torch.full((B, M), 1 / M, dtype=dtype, device=device), masked=False)
    a, has_a = _normalised(problem.a, (B, N), problem)
    b, has_b = _normalised(problem.b, (B, M), problem)
    has_mass = has_a & has_b  # [B, 1]
    return Marginals(torch.where(has_mass, a, 0), torch.where(has_mass, b, 0), masked=True)


def _normalised(weights: Tensor | None, shape: tuple[int, int], problem: Problem) -> tuple[Tensor, Tensor]:
    """Weights scaled to sum one, and whether a batch element has any; zero weights get no gradient."""
    dtype, device = problem.solve_dtype, problem.values.device
    if weights is None:
        return (
            torch.full(shape, 1 / shape[1], dtype=dtype, device=device),
            torch.ones(shape[0], 1, dtype=torch.bool, device=device),
        )
    weights = (weights if weights.dtype == torch.bool else over_largest(weights)).to(dtype)
    total = weights.sum(-1, keepdim=True)  # [B, 1]
    has_mass = total != 0
    return weights / torch.where(has_mass, total, 1), has_mass


def over_largest(weights: Tensor) -> Tensor:
    """Weights [B, N] over the largest of the batch element, in their own precision; not zero means at least LEAST.

    So no sum overflows, and no product of a weight's and its inverse. A constant factor goes out again by the sum:
    it has no gradient, and a weight that is raised has none either.
    """
    weights = solve_precision(weights)
    # There is no transport with negative weights, and no exception without reading the values.
    weights = torch.where(weights < 0, torch.nan, weights)
    largest = weights.detach().amax(-1, keepdim=True)  # [B, 1]
    scaled = weights / torch.where(largest == 0, 1, largest)
    return torch.where(weights == 0, 0, torch.where(scaled < LEAST, LEAST, scaled))


def without_padding(tokens: Tensor, weights: Tensor, masked: bool) -> Tensor:
    """Tokens with zero weight set to zero, so that nothing stored there (NaN, say) reaches a result."""
    return torch.where((weights != 0)[..., None], tokens, 0) if masked else tokens


def similarity(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """[B, N, M]. The norms divide the products, not the tokens: one pass less over the features."""
    if kind == "dot":
        return _products(x, y)
    x, y = x / largest_entry(x), y / largest_entry(y)
    return _products(x, y) * inverse_norm(x)[:, :, None] * inverse_norm(y)[:, None, :]


def _products(x: Tensor, y: Tensor) -> Tensor:
    # With the longer side inside, a CPU's batched product took two thirds of the time (64 x 20 x 768).
    return torch.bmm(x, y.mT) if x.shape[1] <= y.shape[1] else torch.bmm(y, x.mT).mT  # [B, N, M]


def largest_entry(tokens: Tensor) -> Tensor:
    """[B, N, 1], the size of each token's largest entry, one for a zero token; a constant.

    A cosine does not depend on lengths, but the squares and products it is made of leave float32 at 1e-19 and 1e19.
    """
    if not tokens.shape[-1]:  # of nothing there is no largest
        return tokens.new_ones(*tokens.shape[:-1], 1)
    largest = torch.linalg.vector_norm(tokens.detach(), torch.inf, dim=-1, keepdim=True)
    return torch.where(largest == 0, 1, largest)


def inverse_norm(tokens: Tensor) -> Tensor:
    """[B, N]. A zero token gets similarity zero with everything, and a zero gradient."""
    norm = torch.linalg.vector_norm(tokens, dim=-1)
    return torch.where(norm == 0, 0, 1 / torch.where(norm == 0, 1, norm))


def similarity_gradient(grad: Tensor, similarity: Tensor, x: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What ``similarity`` sends back to x and y, written out for ops that compute it themselves."""
    if kind == "dot":
        return torch.bmm(grad, y), torch.bmm(grad.mT, x)
    size_x, size_y = largest_entry(x), largest_entry(y)  # [B, N, 1], [B, M, 1]
    x, y = x / size_x, y / size_y
    norm_x, norm_y = inverse_norm(x)[:, :, None], inverse_norm(y)[:, :, None]
    products = grad * norm_x * norm_y.mT
    weighed = grad * similarity
    own_x = norm_x**2 * weighed.sum(2, keepdim=True) / size_x
    own_y = norm_y**2 * weighed.sum(1, keepdim=True).mT / size_y
    return torch.bmm(products / size_x, y) - x * own_x, torch.bmm(products.mT / size_y, x) - y * own_y


def attend(
    x: Tensor, y: Tensor, x_tokens: Tensor, y_tokens: Tensor, plan: Tensor, p: Marginals, weights: str
) -> tuple[Tensor, Tensor]:
    """Eq. 5 of the paper: ``x + W y`` and ``y + W' x``.

    ``x``, ``y`` are the residuals; ``x_tokens``, ``y_tokens`` the same without what padding holds.
    """
    map_x = map_y = plan  # [B, N, M]
    if weights == "barycentric":
        map_x, map_y = _divide(plan, p.a[:, :, None]), _divide(plan, p.b[:, None, :])
    return torch.baddbmm(x, map_x, y_tokens), torch.baddbmm(y, map_y.mT, x_tokens)


def _divide(plan: Tensor, weights: Tensor) -> Tensor:
    """plan / weights, zero where the weight is zero, with gradients that stay finite there."""
    padding = weights == 0
    return torch.where(padding, 0, plan / torch.where(padding, 1, weights))
