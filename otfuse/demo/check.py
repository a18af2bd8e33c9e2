"""The same problem solved by POT in float64, and how far from it our plan may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ot
import torch
from ot.batch import bregman_log_projection_batch
from torch import Tensor

import otfuse

MANY_ROUNDS = 5000


@dataclass(frozen=True)
class Agreement:
    """The largest difference between our plan and POT's, absolute and as a part of POT's largest entry."""

    solver: str
    rounds: int
    absolute: float
    relative: float
    allowed: float  # bound on `relative`

    @property
    def holds(self) -> bool:
        return self.relative <= self.allowed  # False for NaN


def compare_with_pot(
    x: Tensor, y: Tensor, plan: Tensor, epsilon: float, num_iters: int, backend: str
) -> list[Agreement]:
    """Compare our plan of x [N, D] and y [M, D] at `num_iters` rounds, and one at MANY_ROUNDS, with POT's.

    POT gets the very same tokens in float64 and the cost `-cosine`.
    """
    cost = -_cosine(x, y)  # [N, M], float64
    same = bregman_log_projection_batch(-cost[None] / epsilon, max_iter=num_iters, tol=-1.0)["T"][0]
    allowed = rounding_bound(x, y, epsilon)
    agreements = [_agreement("ot.batch, rows first", num_iters, plan, same, allowed)]

    ours = otfuse.sinkhorn_attend(x[None], y[None], epsilon, num_iters=MANY_ROUNDS, return_plan=True, backend=backend)
    a, b = (np.full(size, 1.0 / size) for size in cost.shape)
    converged = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=4 * MANY_ROUNDS, stopThr=1e-14, warn=False)
    # Where the rounds do not suffice, the two stop at marginals that differ by as much as theirs are off.
    left = float(ours.marginal_error[0]) + float(np.abs(converged.sum(1) - a).sum())
    assert ours.plan is not None
    allowed_there = allowed + left / float(converged.max())
    agreements.append(_agreement("ot.sinkhorn_log, converged", MANY_ROUNDS, ours.plan[0], converged, allowed_there))
    return agreements


def rounding_bound(x: Tensor, y: Tensor, epsilon: float) -> float:
    """First-order bound on the relative error of a plan's entries.

    An entry is `exp((f + g + S) / epsilon)`. A similarity is a dot product of D terms between two normalised
    tokens: it is off by at most D + 6 roundings (of at most one). Each potential is a soft minimum, which
    passes errors of S on at their size, so three terms are off by one such error each, and the final addition
    by a fourth. The last normalisation sums N or M entries and adds a rounding for each.
    """
    rounding = torch.finfo(x.dtype).eps / 2.0
    return (4.0 * (x.shape[1] + 6) / epsilon + x.shape[0] + y.shape[0]) * rounding


def _cosine(x: Tensor, y: Tensor) -> np.ndarray:
    x_unit, y_unit = (torch.nn.functional.normalize(tokens.double().cpu(), dim=1) for tokens in (x, y))
    return (x_unit @ y_unit.mT).numpy()


def _agreement(solver: str, rounds: int, ours: Tensor, theirs: np.ndarray, allowed: float) -> Agreement:
    absolute = float(np.abs(ours.double().cpu().numpy() - theirs).max())
    return Agreement(solver, rounds, absolute, absolute / float(theirs.max()), allowed)
