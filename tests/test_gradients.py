"""Gradients: against finite differences, between modes, and where there must be none."""

from __future__ import annotations

import math

import pytest
import torch
from problems import few_roundings, here, inner, is_interpreted, padded_weights, rand, randn, roundings, weights
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import otfuse
from otfuse.testing import specified_sinkhorn

B, N, M, D = 2, 4, 3, 3
EPSILONS = [0.5, 0.05]


def leaf(values: Tensor, device: torch.device) -> Tensor:
    return values.detach().clone().to(device).requires_grad_()


def assert_derivatives(solve, leaves, backend: str, device: torch.device, second: bool = False) -> None:
    """``solve(*leaves, backend=...)`` by finite differences; where there is no float64 for them, beside the torch
    backend in float64, whose derivatives are held against differences by the same tests."""
    if inner() == torch.float64:
        check = gradgradcheck if second else gradcheck
        assert check(lambda *x: solve(*x, backend=backend), leaves, fast_mode=is_interpreted(backend, device))
        return
    exact = _derivatives(solve, [leaf(x.double(), x.device) for x in leaves], "torch", second)
    for one, other in zip(_derivatives(solve, leaves, backend, second), exact):
        size = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=few_roundings() * size)


def _derivatives(solve, leaves, backend: str, second: bool) -> tuple[Tensor, ...]:
    """Of a fixed combination of the outputs; with ``second``, of a fixed combination of those."""
    values = solve(*leaves, backend=backend)
    for order in range(1 + second):
        total = sum((v * randn(60 + 10 * order + k, *v.shape).to(v)).sum() for k, v in enumerate(values))
        values = torch.autograd.grad(total, leaves, create_graph=second)
    return tuple(value.detach() for value in values)


def finite(values: Tensor) -> Tensor:
    """The -inf of padding is a constant without which differences can be taken."""
    return torch.where(torch.isinf(values), 0, values)


@pytest.fixture
def inputs(device) -> dict[str, Tensor]:
    """Leaves: a cost whose range is near one, weights, tokens of length near one."""
    values = {
        "cost": rand(0, B, N, M), "a": weights(1, B, N), "b": weights(2, B, M),
        "x": randn(3, B, N, D), "y": randn(4, B, M, D),
    }  # fmt: skip
    return {name: leaf(value, device) for name, value in values.items()}


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("num_iters", [1, 2, 7])
@pytest.mark.parametrize("sides", ["none", "weights", "padded"])
def test_unrolled_cost(backend, device, inputs, sides, num_iters, epsilon):
    """All of plan, f and g with respect to all of cost, a and b."""
    if sides == "padded":
        mask_a, mask_b = (padded_weights(7, B, n).to(device) != 0 for n in (N, M))
        assert not mask_a.all() or not mask_b.all()

    def solve(cost, a=None, b=None, backend=backend):
        if sides == "padded":  # a zero times a leaf: the difference quotient is zero there, as the gradient must be
            a, b = a * mask_a, b * mask_b
        out = otfuse.sinkhorn(cost, epsilon, a, b, num_iters=num_iters, backend=backend)
        return out.plan, finite(out.f), finite(out.g)

    leaves = (inputs["cost"],) if sides == "none" else (inputs["cost"], inputs["a"], inputs["b"])
    assert_derivatives(solve, leaves, backend, device)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_unrolled_attention(backend, device, inputs, form, similarity, epsilon):
    def attend(x, y, a, b, backend=backend):
        options = {"weights": form, "similarity": similarity, "return_plan": True, "num_iters": 5}
        out = otfuse.sinkhorn_attend(x, y, epsilon, a=a, b=b, backend=backend, **options)
        return out.x, out.y, out.plan, out.f, out.g

    assert_derivatives(attend, [inputs[name] for name in "xyab"], backend, device)


def test_unroll_differentiates_the_rounds_that_were_run(backend, device):
    """Items that stop at different rounds, differentiated numerically and beside as many rounds without tol."""
    cost = leaf(rand(0, 4, 5, 4) * torch.tensor([0.1, 0.4, 1.0, 2.0])[:, None, None], device)

    def solve(cost, backend=backend):
        out = otfuse.sinkhorn(cost, 0.1, num_iters=30, tol=1e-3, backend=backend)
        return out.plan, out.f, out.g

    rounds = otfuse.sinkhorn(cost, 0.1, num_iters=30, tol=1e-3, backend=backend).num_iters.tolist()
    assert len(set(rounds)) > 2 and min(rounds) < 30
    assert_derivatives(solve, (cost,), backend, device)
    for item, num_iters in enumerate(rounds):
        one = torch.autograd.grad(solve(cost)[1][item].square().sum(), cost)[0][item]
        out = otfuse.sinkhorn(cost[[item]], 0.1, num_iters=num_iters, backend=backend)
        other = torch.autograd.grad(out.f.square().sum(), cost)[0][item]
        torch.testing.assert_close(one, other, rtol=0, atol=10 * few_roundings())


@pytest.mark.parametrize("sides", ["none", "padded"])
@pytest.mark.parametrize("epsilon", [0.5, 0.1])
def test_implicit_is_the_limit_of_unroll(backend, device, epsilon, sides):
    """By losses that do not see the constant which f and g have in common: it is no matter of the fixed point."""
    if is_interpreted(backend, device) and epsilon < 0.5:
        pytest.skip("thousands of rounds are too slow in Triton's interpreter")
    num_iters = 3000 if epsilon < 0.5 else 300
    cost, a, b = rand(0, B, N, M), padded_weights(7, B, N), weights(2, B, M)
    mask = a != 0
    g_plan, g_f, g_g = randn(3, B, N, M).to(device), randn(4, B, N) * mask, randn(5, B, M)
    g_f = g_f - mask * (g_f.sum(1) - g_g.sum(1))[:, None] / mask.sum(1, keepdim=True)
    if sides == "none":
        g_f = randn(4, B, N)
        g_f = g_f - (g_f.sum(1) - g_g.sum(1))[:, None] / N
    results = []
    for grad in ("implicit", "unroll"):
        leaves = [leaf(value, device) for value in ((cost,) if sides == "none" else (cost, a, b))]
        out = otfuse.sinkhorn(leaves[0], epsilon, *leaves[1:], num_iters=num_iters, grad=grad, backend=backend)
        assert (out.marginal_error < few_roundings()).all()
        loss = (out.plan * g_plan).sum() + (finite(out.f) * g_f.to(device)).sum() + (out.g * g_g.to(device)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for name, one, other in zip(("cost", "a", "b"), *results):
        # Unroll gathers a few roundings of coefficients, up to three over epsilon, from each of the rounds.
        torch.testing.assert_close(one, other, rtol=0, atol=3 / epsilon * num_iters * roundings(2.3e-16), msg=name)


@pytest.mark.parametrize("form", ["plan", "barycentric"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_implicit_attention_by_finite_differences(backend, device, inputs, form, similarity):
    def attend(x, y, a, b, backend=backend):
        options = {"weights": form, "similarity": similarity, "grad": "implicit", "return_plan": True}
        out = otfuse.sinkhorn_attend(x, y, 1.0, a=a, b=b, num_iters=100, backend=backend, **options)
        return out.x, out.y, out.plan

    assert_derivatives(attend, [inputs[name] for name in "xyab"], backend, device)


def test_implicit_potentials_are_the_derivative_of_the_value(backend, device, inputs):
    """Envelope theorem: the optimal value of <plan, cost> - epsilon H(plan) has derivative plan with respect to the
    cost; and its dual <a, f> + <b, g> - epsilon, differentiated through f and g, gives the same."""
    cost = inputs["cost"]
    out = otfuse.sinkhorn(cost, 0.3, num_iters=1000, grad="implicit", backend=backend)
    (gradient,) = torch.autograd.grad(out.f.mean(1).sum() + out.g.mean(1).sum(), cost)
    torch.testing.assert_close(gradient, out.plan.detach(), rtol=0, atol=max(1e-9, few_roundings()))


@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_detach_takes_the_plan_as_a_constant(backend, inputs, form):
    x, y, a, b = (inputs[name] for name in "xyab")
    out = otfuse.sinkhorn_attend(x, y, 0.1, a=a, b=b, weights=form, grad="detach", return_plan=True, backend=backend)
    assert not any(value.requires_grad for value in (out.plan, out.f, out.g, out.marginal_error))
    assert not otfuse.sinkhorn(inputs["cost"], 0.1, a, b, grad="detach", backend=backend).plan.requires_grad
    map_x = map_y = out.plan
    if form == "barycentric":
        map_x = out.plan / (a / a.sum(1, keepdim=True))[:, :, None]
        map_y = out.plan / (b / b.sum(1, keepdim=True))[:, None, :]
    coefficients = rand(8, B, N, D).to(x), rand(9, B, M, D).to(x)
    expected = ((x + map_x @ y) * coefficients[0]).sum() + ((y + map_y.mT @ x) * coefficients[1]).sum()
    loss = (out.x * coefficients[0]).sum() + (out.y * coefficients[1]).sum()
    leaves = (x, y) if form == "plan" else (x, y, a, b)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * few_roundings())


@pytest.mark.parametrize("sides", ["none", "padded"])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_second_derivatives_of_unroll(backend, device, inputs, sides, tol):
    mask = padded_weights(7, B, N).to(device) != 0

    def solve(cost, a=None, b=None, backend=backend):
        a = None if a is None else a * mask
        out = otfuse.sinkhorn(cost, 0.3, a, b, num_iters=4, tol=tol, backend=backend)
        return out.plan, finite(out.f), finite(out.g)

    leaves = (inputs["cost"],) if sides == "none" else (inputs["cost"], inputs["a"], inputs["b"])
    assert_derivatives(solve, leaves, backend, device, second=True)


def test_second_derivatives_of_unrolled_attention(backend, device, inputs):
    def attend(x, y, backend=backend):
        out = otfuse.sinkhorn_attend(x, y, 0.5, num_iters=3, weights="barycentric", backend=backend)
        return out.x, out.y

    assert_derivatives(attend, (inputs["x"], inputs["y"]), backend, device, second=True)


@pytest.mark.parametrize("power", [1, 2])  # of a linear loss the first derivative would have no graph at all
def test_second_derivative_of_implicit_is_refused(backend, inputs, power):
    cost = inputs["cost"]
    plan = otfuse.sinkhorn(cost, 0.3, grad="implicit", backend=backend).plan
    weight = torch.linspace(0, 1, plan.shape[2], dtype=plan.dtype, device=plan.device)
    (gradient,) = torch.autograd.grad((weight * plan**power).sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match='grad="implicit" has first derivatives only; pass grad="unroll"'):
        torch.autograd.grad(gradient.sum(), cost)


@pytest.mark.parametrize(("N", "M"), [(5, 9), (9, 5), (6, 6)])
def test_implicit_gradients_of_potentials_agree_between_backends(backend, N, M):
    """They are defined up to a constant, which every backend puts in the same place."""
    values = here(torch.randn(2, N, M, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    b = here(torch.rand(2, M, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    b[1, -1] = 0

    def gradients(name, dtype=torch.float64):
        cost, weights = (t.to(dtype, copy=True).requires_grad_() for t in (values, b))
        out = otfuse.sinkhorn(cost, 0.5, b=weights, num_iters=400, grad="implicit", backend=name)
        g = torch.where(torch.isinf(out.g), 0, out.g)
        return torch.autograd.grad(out.f.square().sum() + g.square().sum(), (cost, weights))

    close = max(1e-9, 10 * few_roundings())
    for ours, plain in zip(gradients(backend, inner()), gradients("torch")):
        torch.testing.assert_close(ours.double(), plain, rtol=close, atol=close)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_padding_gets_exactly_zero(backend, device, similarity, form, grad, bad):
    """And what it holds changes no other gradient. Its own output is its input: that is differentiated apart."""
    a, b = padded_weights(7, B, 9), padded_weights(17, B, 8)
    dirty, clean = [], []
    for gradients, filler in ((dirty, bad), (clean, 0.0)):
        x = leaf(torch.where((a != 0)[..., None], randn(0, B, 9, D), filler), device)
        y = leaf(torch.where((b != 0)[..., None], randn(1, B, 8, D), -filler), device)
        w = leaf(a, device), leaf(b, device)
        options = {"weights": form, "grad": grad, "similarity": similarity, "return_plan": True, "backend": backend}
        out = otfuse.sinkhorn_attend(x, y, 0.5, a=w[0], b=w[1], **options)
        # With the plan a constant, and not divided by them, the weights have no part in anything.
        leaves = (x, y) if (grad, form) == ("detach", "plan") else (x, y, *w)
        live = out.x[a.to(device) != 0].square().sum() + out.y[b.to(device) != 0].square().sum()
        loss = live + out.plan.square().sum() + finite(out.f).sum() + 2 * finite(out.g).sum()
        gradients += torch.autograd.grad(loss, leaves, retain_graph=True)
        (through,) = torch.autograd.grad(out.x[a.to(device) == 0].sum(), x)
        assert (through[a.to(device) == 0] == 1).all() and (through[a.to(device) != 0] == 0).all()
    for one, other, weight in zip(dirty, clean, (a, b, a, b)):
        assert (one[weight.to(device) == 0] == 0).all() and (one != 0).any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_padding_of_a_cost_gets_exactly_zero(backend, device, grad):
    a, b = padded_weights(7, B, 9), padded_weights(17, B, 8)
    live = ((a != 0)[:, :, None] & (b != 0)[:, None, :]).to(device)
    results = []
    for filler in (0.0, math.nan, -math.inf, torch.finfo(inner()).max):
        cost = leaf(torch.where(live.cpu(), rand(0, B, 9, 8), filler), device)
        leaves = (cost, leaf(a, device), leaf(b, device))
        out = otfuse.sinkhorn(leaves[0], 0.1, *leaves[1:], grad=grad, backend=backend)
        # Coefficients that are not zero meet the constants at padding, too.
        loss = (out.plan * rand(3, B, 9, 8).to(device)).sum() + finite(out.f).sum() + (2 * out.g)[b != 0].sum()
        results.append(torch.autograd.grad(loss, leaves))
        assert (results[-1][0][~live] == 0).all()
        assert (results[-1][1][a.to(device) == 0] == 0).all() and (results[-1][2][b.to(device) == 0] == 0).all()
        assert all(torch.equal(one, first) for one, first in zip(results[-1], results[0]))


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_items_without_mass_get_zero_and_nan_stays_in_its_item(backend, device, grad):
    results = []
    for spoilt in (False, True):
        cost, a, b = rand(0, 4, N, M), weights(1, 4, N), weights(2, 4, M)
        a[1] = 0
        if spoilt:
            cost[2, 1, 1] = math.nan
            a[3, 0] = math.inf
        leaves = [leaf(value, device) for value in (cost, a, b)]
        out = otfuse.sinkhorn(leaves[0], 0.1, *leaves[1:], grad=grad, backend=backend)
        loss = out.plan.square().sum((1, 2)) + finite(out.f).sum(1) + finite(out.g).square().sum(1)
        results.append(torch.autograd.grad(loss.sum(), leaves))
    for clean, spoilt in zip(*results):
        assert (clean[1] == 0).all() and torch.equal(clean[:2], spoilt[:2])
        assert torch.isfinite(clean).all() and (clean[0] != 0).any()
    assert results[1][0][2].isnan().all(), "the gradient of a NaN is NaN, not a number to train on"


@pytest.mark.parametrize("epsilon", [0.02, 0.005, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_gradients_stay_finite_at_small_epsilon(backend, device, grad, dtype, epsilon):
    """Unconverged, nearly a permutation, rows without a column of their own: still numbers, of a bounded size."""
    cost = rand(0, 4, 8, 8, dtype=dtype)
    cost[1] = 1 - torch.eye(8)
    cost[2, :, 1:] += 1
    cost = leaf(cost, device)
    out = otfuse.sinkhorn(cost, epsilon, grad=grad, backend=backend)
    (gradient,) = torch.autograd.grad(out.plan.square().sum(), cost)
    assert torch.isfinite(gradient).all()
    if grad == "unroll":
        # d plan / d cost has entries of at most plan / epsilon times one a half round, there being a hundred.
        assert gradient.abs().max() <= 100 / epsilon


def test_no_history_is_kept_without_a_gradient(backend, device, inputs):
    """The answer is the same with and without, and nothing hangs on a graph."""
    with torch.no_grad():
        plain = otfuse.sinkhorn(inputs["cost"], 0.1, inputs["a"], backend=backend)
    tracked = otfuse.sinkhorn(inputs["cost"], 0.1, inputs["a"], backend=backend)
    assert plain.plan.grad_fn is None and tracked.plan.requires_grad
    for one, other in zip(plain, tracked):
        # Where nothing is to be learnt, tpc solves items this small a lane each, with another order of sums.
        atol = few_roundings() if backend == "tpc" else 0
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=atol)
    expected = specified_sinkhorn(inputs["cost"], 0.1, inputs["a"])
    torch.testing.assert_close(plain.plan, expected.plan, rtol=0, atol=10 * few_roundings())


def test_gradients_of_the_marginal_error_are_none(backend, inputs):
    """It is a report about the solve, not a part of it."""
    out = otfuse.sinkhorn(inputs["cost"], 0.1, backend=backend)
    assert not out.marginal_error.requires_grad and not out.num_iters.requires_grad
    (out.plan.sum((1, 2)) + out.marginal_error).sum().backward()
    assert torch.isfinite(inputs["cost"].grad).all()
