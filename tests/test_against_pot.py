"""Against POT: its Sinkhorn at convergence and round by round, and an exact linear program at small epsilon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import eps, normalised, rand, roundings, weights
from torch import Tensor

import otfuse

ot = pytest.importorskip("ot", reason="the oracle is POT: pip install pot")
batch = pytest.importorskip("ot.batch", reason="POT's batched solvers came with 0.9.6")

SHAPE = (3, 9, 6)
EPSILON = 0.1


def close() -> dict[str, object]:
    # log K reaches 1 / EPSILON, and an error in it is one in the plan; sums of nine terms and a few more operations
    # on each side of the comparison. Earlier rounds' roundings shrink: the contraction at this range is about 0.5.
    return {"rtol": 0, "atol": 100 * eps() / EPSILON, "check_dtype": False}


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    B, N, M = SHAPE
    return rand(0, B, N, M), normalised(weights(1, B, N)), normalised(weights(2, B, M))


def each(solver, cost: Tensor, a: Tensor, b: Tensor, **options) -> Tensor:
    """One of POT's solvers for single problems, over a batch."""
    cost, a, b = cost.double(), a.double(), b.double()
    plans = [solver(a_i.numpy(), b_i.numpy(), c.numpy(), **options) for c, a_i, b_i in zip(cost, a, b)]
    return torch.from_numpy(np.stack(plans))


def test_converged_plan_is_that_of_both_solvers(backend, device, problem):
    cost, a, b = problem
    out = otfuse.sinkhorn(cost.to(device), EPSILON, a.to(device), b.to(device), num_iters=500, backend=backend)
    for method in ("sinkhorn", "sinkhorn_log"):
        options = {"reg": EPSILON, "method": method, "numItermax": 500, "stopThr": 0, "warn": False}
        expected = each(ot.sinkhorn, cost, a, b, **options)
        torch.testing.assert_close(out.plan.cpu(), expected, **close())


@pytest.mark.parametrize("num_iters", [1, 2, 7])
def test_columns_first_solver_transposed(backend, device, problem, num_iters):
    """``ot.bregman.sinkhorn`` updates its columns first, so ours is its solution of the transposed problem."""
    cost, a, b = problem
    out = otfuse.sinkhorn(cost.to(device), EPSILON, a.to(device), b.to(device), num_iters=num_iters, backend=backend)
    options = {"reg": EPSILON, "numItermax": num_iters, "stopThr": 0, "warn": False}
    expected = each(ot.bregman.sinkhorn, cost.mT.contiguous(), b, a, **options).mT
    torch.testing.assert_close(out.plan.cpu(), expected, **close())
    # And the order of the updates is not without effect here: the test above can fail.
    other_order = each(ot.bregman.sinkhorn, cost, a, b, **options)
    assert (other_order - expected).abs().max() > 10 * close()["atol"]


@pytest.mark.parametrize("method", ["sinkhorn", "log_sinkhorn"])
@pytest.mark.parametrize("num_iters", [1, 2, 7])
def test_rows_first_batch_solver(backend, device, problem, num_iters, method):
    cost, a, b = problem
    out = otfuse.sinkhorn(cost.to(device), EPSILON, a.to(device), b.to(device), num_iters=num_iters, backend=backend)
    expected = batch.solve_batch(
        cost.double(), EPSILON, a.double(), b.double(), max_iter=num_iters, tol=0.0, method=method, grad="detach"
    )
    torch.testing.assert_close(out.plan.cpu(), expected.plan, **close())


def test_linear_program_at_small_epsilon(backend, device, problem):
    """The plan's cost exceeds the optimum by at most ``epsilon log(N M)``, the range of the entropy, and the mass
    that the last row sums misplace times the range of the cost."""
    cost, a, b = problem
    epsilon, (_, N, M) = 0.002, SHAPE
    out = otfuse.sinkhorn(cost.to(device), epsilon, a.to(device), b.to(device), num_iters=20000, backend=backend)
    optimum = (each(ot.emd, cost, a, b) * cost).sum((1, 2))
    value = (out.plan.cpu() * cost).sum((1, 2))
    misplaced = out.marginal_error.cpu()  # the cost lies within [0, 1]
    assert (misplaced < 1e-3).all()
    assert (value <= optimum + epsilon * np.log(N * M) + misplaced).all()
    assert (value >= optimum - misplaced - roundings(1e-12)).all()


def test_linear_program_whose_solution_is_clear(backend, device):
    """A solution that every other vertex misses by at least ``gap``: mass leaks at most like exp(-gap / epsilon)."""
    N, epsilon = 6, 0.01
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    cost = 1 + 0.2 * rand(3, 1, N, N)
    cost[0, torch.arange(N), permutation] = rand(4, N) * 0.2
    uniform = torch.full((1, N), 1 / N, dtype=torch.float64)
    out = otfuse.sinkhorn(cost.to(device), epsilon, num_iters=200, backend=backend)
    expected = each(ot.emd, cost, uniform, uniform)
    # Leaving the permutation costs 0.8 a row at least, at most 0.4 of which the potentials make up for on one
    # entry: exp(-40) is below a rounding of log K, at most 1.2 / epsilon.
    torch.testing.assert_close(out.plan.cpu(), expected, **(close() | {"atol": 100 * eps() * 1.2 / epsilon}))
