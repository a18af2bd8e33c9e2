"""What holds for every problem: known answers, marginals, symmetries, and stopping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import (
    Known,
    assert_solves,
    eps,
    few_roundings,
    inner,
    known_problems,
    normalised,
    padded_weights,
    rand,
    randn,
    seeds,
    weights,
)
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens

sizes = st.integers(1, 20)


def solve(known: Known, backend: str, device: torch.device, **options) -> otfuse.SinkhornOutput:
    a, b = (None if w is None else w.to(device, inner()) for w in (known.a, known.b))
    options = {"num_iters": known.num_iters, **options}
    out = otfuse.sinkhorn(known.cost.to(device, inner()), known.epsilon, a, b, backend=backend, **options)
    return otfuse.SinkhornOutput(*(value.cpu() for value in out))


@given(known=known_problems)
def test_known_answers(backend, device, known):
    assert_solves(solve(known, backend, device), known)


@given(known=known_problems)
def test_known_answers_stay_when_stopping_early(backend, device, known):
    """Stopped at a row error of 1e-9, the rounds left out could not move the plan by more than that error times
    the sum of what further rounds keep of it: 1 / (1 - 0.93) for the slowest of these problems."""
    out = solve(known, backend, device, tol=1e-9)
    stopped = out.marginal_error < 1e-9
    assert (stopped | (out.num_iters == known.num_iters)).all()
    assert ((out.plan - known.plan).abs() <= known.tolerance + 1e-9 / 0.07)[stopped].all()


@given(seed=seeds, N=sizes, M=sizes)
def test_plain_tensors_of_weights_and_masks(backend, device, seed, N, M):
    """Scaling weights changes nothing; a mask is uniform over True; None is uniform."""
    cost = rand(seed, 2, N, M).to(device)
    a, mask = padded_weights(seed, 2, N).to(device), (padded_weights(seed + 9, 2, M) != 0).to(device)
    out = otfuse.sinkhorn(cost, 0.1, a, mask, backend=backend)
    same = otfuse.sinkhorn(cost, 0.1, 4 * a, 0.5 * mask.to(a.dtype), backend=backend)
    for name, one, other in zip(out._fields, out, same):
        assert torch.equal(one, other), name  # scaling by a power of two is exact
    uniform = otfuse.sinkhorn(cost, 0.1, backend=backend)
    ones = otfuse.sinkhorn(cost, 0.1, torch.ones_like(a), torch.ones_like(mask), backend=backend)
    torch.testing.assert_close(ones.plan, uniform.plan, rtol=0, atol=few_roundings() * 10)


@given(seed=seeds, N=sizes, M=sizes, epsilon=st.sampled_from([1.0, 0.1, 0.01]))
def test_swapping_sides_transposes_the_converged_plan(backend, device, seed, N, M, epsilon):
    cost, a, b = 2 * epsilon * rand(seed, 2, N, M), weights(seed + 1, 2, N), weights(seed + 2, 2, M)
    # log K within two of each other: a round contracts by tanh(4 / 4)² = 0.58 or better, 150 rounds by 1e-35.
    one = solve(Known(cost, epsilon, cost, 0, a, b, 150), backend, device)
    other = solve(Known(cost.mT, epsilon, cost.mT, 0, b, a, 150), backend, device)
    torch.testing.assert_close(other.plan.mT, one.plan, rtol=0, atol=few_roundings() / (1 - 0.58))
    log_a, log_b = normalised(a).log(), normalised(b).log()
    # Which potential carries the constant is a matter of who was last: compare their sum.
    sums = one.f[:, :, None] + one.g[:, None, :], (other.g[:, :, None] + other.f[:, None, :])
    size = 4 * epsilon * (1 + log_a.abs().max() + log_b.abs().max())
    torch.testing.assert_close(*sums, rtol=0, atol=float(few_roundings() * size / (1 - 0.58)))


@given(seed=seeds, N=sizes, M=sizes)
def test_shifting_rows_and_columns_of_the_cost_moves_only_potentials(backend, device, seed, N, M):
    """Row shifts are undone by the first row update; column shifts are undone at convergence."""
    cost, shift = 0.2 * rand(seed, 2, N, M), 8 * randn(seed + 1, 2, N, 1)
    problem, shifted = (Known(c, 0.1, c, 0, weights(seed, 2, N), None, 9) for c in (cost, cost + shift))
    one, other = solve(problem, backend, device), solve(shifted, backend, device)
    # Shifts reach some 8 * 5, and log K that over epsilon: a rounding there is an error in the plan.
    close = {"rtol": 0, "atol": 40 / 0.1 * few_roundings()}
    torch.testing.assert_close(other.plan, one.plan, **close)
    torch.testing.assert_close(other.f - shift[:, :, 0], one.f, **close)
    torch.testing.assert_close(other.g, one.g, **close)


@given(seed=seeds, N=sizes, M=sizes, factor=st.sampled_from([2.0**-20, 0.5, 2.0, 2.0**20]))
def test_scaling_cost_and_epsilon_together_scales_potentials(backend, device, seed, N, M, factor):
    cost, a = rand(seed, 2, N, M), padded_weights(seed, 2, N)
    one = solve(Known(cost, 0.125, cost, 0, a), backend, device)
    other = solve(Known(cost * factor, 0.125 * factor, cost, 0, a), backend, device)
    # Powers of two commute with every rounding.
    assert torch.equal(other.plan, one.plan)
    assert torch.equal(other.f, one.f * factor) and torch.equal(other.g, one.g * factor)


@given(
    seed=seeds, N=sizes, M=sizes, kind=st.sampled_from(["cosine", "dot"]), form=st.sampled_from(["plan", "barycentric"])
)
def test_permuting_tokens_permutes_the_answer(backend, device, seed, N, M, kind, form):
    x, y, a = randn(seed, 2, N, 5), randn(seed + 1, 2, M, 5), padded_weights(seed, 2, N)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (N, M))
    options = {"similarity": kind, "weights": form, "return_plan": True, "backend": backend}
    one = otfuse.sinkhorn_attend(x.to(device), y.to(device), 0.2, a=a.to(device), **options)
    other = otfuse.sinkhorn_attend(
        x[:, rows].to(device), y[:, columns].to(device), 0.2, a=a[:, rows].to(device), **options
    )
    # Only the order of sums differs. Dots of five normal numbers reach some 60, over 0.2; tokens reach 5.
    size = 5 * 60 / 0.2
    for name in ("x", "y", "plan"):
        value = getattr(one, name).cpu()
        value = value[:, columns] if name == "y" else value[:, rows]
        value = value[:, :, columns] if name == "plan" else value
        torch.testing.assert_close(getattr(other, name).cpu(), value, rtol=0, atol=size * few_roundings(), msg=name)


@given(seed=seeds, N=sizes, M=sizes, epsilon=st.sampled_from([1.0, 0.1, 0.01, 0.001]))
def test_attended_tokens_are_the_plan_times_tokens(backend, device, seed, N, M, epsilon):
    """Eq. 5, and rows and columns of a barycentric map that sum to one: constant tokens move by just that."""
    x, y = randn(seed, 2, N, 4), randn(seed + 1, 2, M, 4)
    a, b = padded_weights(seed, 2, N), padded_weights(seed + 2, 2, M)
    sides = {"a": a.to(device), "b": b.to(device), "backend": backend, "return_plan": True}
    out = otfuse.sinkhorn_attend(x.to(device), y.to(device), epsilon, **sides)
    plan = out.plan.cpu()
    close = {"rtol": 0, "atol": 5 * few_roundings()}  # tokens reach 5
    torch.testing.assert_close(out.x.cpu(), x + plan @ y, **close)
    torch.testing.assert_close(out.y.cpu(), y + plan.mT @ x, **close)
    out = otfuse.sinkhorn_attend(x.to(device), y.to(device), epsilon, weights="barycentric", **sides)
    map_x = torch.where((a != 0)[:, :, None], plan / normalised(a)[:, :, None], 0)
    map_y = torch.where((b != 0)[:, None, :], plan / normalised(b)[:, None, :], 0)
    # Dividing by the smallest weight, 0.1 of 3.1 at most 20 of them, makes the plan's roundings larger.
    close = {"rtol": 0, "atol": 5 * 31 * 20 * few_roundings()}
    torch.testing.assert_close(out.x.cpu(), x + map_x @ y, **close)
    torch.testing.assert_close(out.y.cpu(), y + map_y.mT @ x, **close)
    live = (b != 0).to(map_y.dtype)
    torch.testing.assert_close(map_y.sum(1), live, **close)


def row_errors(cost: Tensor, epsilon: float, a: Tensor, b: Tensor, num_iters: int) -> Tensor:
    """[num_iters, B]: L1 error of the row sums after every round, by scalings in plain float64."""
    K, v, errors = torch.exp(-cost / epsilon), torch.ones_like(b), []
    for _ in range(num_iters):
        u = a / (K * v[:, None, :]).sum(2)
        v = b / (K * u[:, :, None]).sum(1)
        errors.append((u * (K * v[:, None, :]).sum(2) - a).abs().sum(1))
    return torch.stack(errors)


@given(seed=seeds, N=st.integers(2, 12), M=st.integers(2, 12), log_tol=st.floats(-9, 0))
def test_tol_stops_each_item_at_its_own_round(backend, device, seed, N, M, log_tol):
    epsilon, tol, most = 0.05, 10.0**log_tol, 40
    cost, a, b = rand(seed, 5, N, M), normalised(weights(seed + 1, 5, N)), normalised(weights(seed + 2, 5, M))
    errors = row_errors(cost, epsilon, a, b, most)  # [T, B]
    # Which side of tol an error lies on must not be a matter of rounding (of sums that are one).
    assume(not ((errors - tol).abs() < few_roundings()).any())
    below = errors < tol
    expected = torch.where(below.any(0), below.int().argmax(0) + 1, most).int()
    problem = Known(cost, epsilon, cost, 0, a, b, most)
    out = solve(problem, backend, device, tol=tol)
    assert torch.equal(out.num_iters, expected)
    torch.testing.assert_close(
        out.marginal_error, errors.gather(0, expected[None].long() - 1)[0], rtol=0, atol=few_roundings() / epsilon
    )
    for item, rounds in enumerate(expected.tolist()):
        # The answer is that of so many rounds and no tol, neighbours or not.
        alone = Known(cost[[item]], epsilon, cost, 0, a[[item]], b[[item]], rounds)
        for name, one, other in zip(out._fields, solve(alone, backend, device), out):
            torch.testing.assert_close(one[0], other[item], rtol=0, atol=few_roundings() / epsilon, msg=name)


def test_items_of_one_batch_do_stop_at_different_rounds(backend, device):
    """So that the test above has something to find."""
    x, y = clustered_tokens(16, 30, 20, 32, device=device)
    out = otfuse.sinkhorn_attend(x, y, 0.1, tol=1e-3, num_iters=200, backend=backend)
    assert len(out.num_iters.unique()) > 3
    assert (out.marginal_error < 1e-3).all()


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_marginals_at_every_dtype(backend, device, dtype, epsilon):
    """Columns are exact and the row error is what it says, both up to the rounding of the plan's entries."""
    x, y = clustered_tokens(4, 33, 20, 16, dtype=dtype, device=device)
    b = weights(0, 4, 20, dtype).to(device)
    out = otfuse.sinkhorn_attend(x, y, epsilon, b=b, backend=backend, return_plan=True)
    assert out.x.dtype == out.y.dtype == out.plan.dtype == dtype
    solved = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.f.dtype == out.g.dtype == out.marginal_error.dtype == solved
    plan = out.plan.double()
    # A plan entry is rounded by half an eps of its own size (or to the smallest float16, 6e-8, once halved);
    # before that a sum of at most 33 terms and four more operations in the inner dtype.
    absolute = 33 * 20 * 3e-8 if dtype == torch.float16 else 0
    eps = torch.finfo(dtype).eps / 2 + 37 * torch.finfo(solved).eps
    assert ((plan.sum(1) - normalised(b.double())).abs().sum(1) <= eps + absolute).all()
    error = (plan.sum(2) - 1 / 33).abs().sum(1)
    assert ((out.marginal_error - error).abs() <= eps + absolute).all()


@pytest.mark.parametrize("num_iters", [1, 2, 3])
def test_fewest_rounds_by_hand(backend, device, num_iters):
    cost, a, b = rand(0, 3, 5, 4), normalised(weights(1, 3, 5)), normalised(weights(2, 3, 4))
    K, v = torch.exp(-cost / 0.3), torch.ones(3, 4, dtype=inner())
    for _ in range(num_iters):
        u = a / (K @ v[:, :, None])[:, :, 0]
        v = b / (K.mT @ u[:, :, None])[:, :, 0]
    out = solve(Known(cost, 0.3, cost, 0, a, b, num_iters), backend, device)
    close = {"rtol": 0, "atol": 20 * eps()}
    torch.testing.assert_close(out.plan, u[:, :, None] * K * v[:, None, :], **close)
    # One round fixes the constant that the potentials have in common.
    torch.testing.assert_close(out.f, 0.3 * u.log(), **close)
    torch.testing.assert_close(out.g, 0.3 * v.log(), **close)
