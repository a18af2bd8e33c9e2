"""Weights, tokens and costs at the ends of the range: finite, and by the rule of every other answer.

The oracle is the specification in float64, on the same float32 numbers.
"""

from __future__ import annotations

import pytest
import torch
from problems import assert_accurate, assert_solution_accurate, is_interpreted, padded_weights, rand, randn, why_not
from test_accuracy import assert_gradient_accurate, four_ways
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, references, reordered, specified_attend, specified_sinkhorn

N, M, D = 6, 5, 8
LEAST = 1e-30  # of the largest weight: what a weight is at least
# In float64 a third of a rounding of float32 is asked for, which logarithms of 1000 do not leave of themselves.
EPSILONS = {torch.float32: (0.1, 0.01, 0.001), torch.float64: (0.1, 0.01)}


def batch_size(backend: str, device: torch.device) -> int:
    return 4 if is_interpreted(backend, device) else 64 if backend == "tpc" else 256


def extreme_weights(kind: str, seed: int, B: int, n: int, dtype: torch.dtype) -> Tensor:
    """[B, n]. From 1e-30 to one; a saturated softmax, with zeros and subnormal numbers; all mass on one token."""
    if kind == "wide":
        return (10 ** (-30 * rand(seed, B, n, dtype=torch.float64))).to(dtype)
    if kind == "softmax":
        return (30 * randn(seed, B, n, dtype=torch.float32)).softmax(1).to(dtype)
    one = torch.full((B, n), LEAST, dtype=dtype)
    one[:, seed] = 1
    return one


def raised(weights: Tensor) -> Tensor:
    """The rule of docs/numerics.md."""
    least = LEAST * weights.detach().amax(1, keepdim=True)
    return torch.where((weights > 0) & (weights < least), least, weights)


def loss(out: tuple[Tensor, ...]) -> Tensor:
    return sum(
        (value.double() * randn(50 + k, *value.shape, dtype=torch.float64).to(value.device)).sum()
        for k, value in enumerate(out)
    )


def differentiated(values: tuple[Tensor, ...], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Values, and the gradient of a random combination of them by tokens or cost, and by the logarithms of weights."""
    *inputs, a, b = torch.autograd.grad(loss(values), leaves)
    return *(value.detach() for value in values), *inputs, a * leaves[-2].detach(), b * leaves[-1].detach()


def of_tokens(solver, epsilon, form, x, y, a, b, raise_weights=False, **options):
    x, y, a, b = leaves = [value.detach().requires_grad_() for value in (x, y, a, b)]
    a, b = (raised(a), raised(b)) if raise_weights else (a, b)
    out = solver(x, y, epsilon, a=a, b=b, weights=form, **options)
    return differentiated((out.x, out.y, out.plan), *leaves)


def check_tokens(run, specify, device, inputs, epsilon, form, what, logs=None):
    """By the rule, for every item that has nearly converged: elsewhere plan / a is as large as one over a weight.

    ``logs``: the size of the logarithms that scalings pass through on the way, which are rounded by it.
    """
    results = four_ways(run, specify, device, *inputs)
    x_out, y_out = results[3][:2]  # of the truth
    settled = (x_out.abs().amax((1, 2)) < 1e3) & (y_out.abs().amax((1, 2)) < 1e3)
    assert settled.double().mean() >= 0.5, what
    names = ("x", "y", "plan", "gradient of x", "gradient of y", "gradient of log a", "gradient of log b")
    # A gradient is a difference of terms of the size of a coefficient, up to four, times an entry of the map, at most
    # one, over epsilon for tokens.
    scales = (*(None,) * 3, 4 / epsilon, 4 / epsilon, 4.0, 4.0)
    for name, scale, *values in zip(names, scales, *results):
        actual, reference, exact, truth = values
        kept = actual[settled], reference[:, settled], exact[settled], truth[settled]
        if scale is None:
            assert_accurate(*kept, scale=logs and logs * float(truth[settled].abs().max()), what=f"{what}: {name}")
        else:
            assert_gradient_accurate(*kept, scale=(logs or 1) * scale, what=f"{what}: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["wide", "softmax", "one"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_weights_of_tokens(backend, device, form, kind, dtype):
    B = batch_size(backend, device)
    x, y = randn(0, B, N, D, dtype=dtype), randn(1, B, M, D, dtype=dtype)
    a, b = extreme_weights(kind, 2, B, N, dtype), extreme_weights(kind, 3, B, M, dtype)
    for epsilon in EPSILONS[dtype]:

        def run(*values, epsilon=epsilon):
            options = {"num_iters": 20, "backend": backend, "return_plan": True}
            return of_tokens(otfuse.sinkhorn_attend, epsilon, form, *values, **options)

        def specify(*values, order=0, epsilon=epsilon):
            solver = reordered(specified_attend, order)
            return of_tokens(solver, epsilon, form, *values, raise_weights=True, num_iters=20)

        # Triton solves float64 in logarithms where weights are this small, of 1e-30 to base two.
        logs = 100.0 if (backend, dtype) == ("triton", torch.float64) else None
        check_tokens(run, specify, device, (x, y, a, b), epsilon, form, f"epsilon {epsilon}", logs)


@pytest.mark.parametrize("kind", ["wide", "softmax", "one"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_weights_of_tokens_implicitly(backend, device, form, kind):
    """Beside the plain PyTorch formula, whose own error is the ridge's: ten roundings of what a round contracts by."""
    B, epsilon = batch_size(backend, device), 0.2
    x, y = randn(0, B, N, D, dtype=torch.float32), randn(1, B, M, D, dtype=torch.float32)
    a, b = extreme_weights(kind, 2, B, N, torch.float32), extreme_weights(kind, 3, B, M, torch.float32)

    def solve(*values, order=0, backend=backend, **options):
        options |= {"num_iters": 300, "grad": "implicit", "backend": backend, "return_plan": True}
        return of_tokens(reordered(otfuse.sinkhorn_attend, order), epsilon, form, *values, **options)

    def specify(*values, order=0):
        if values[0].dtype == torch.float64:
            return of_tokens(specified_attend, epsilon, form, *values, raise_weights=True, num_iters=300)
        reference = solve(*values, order=order, backend="torch", raise_weights=True)
        assert all(torch.isfinite(value).all() for value in reference)
        return reference

    logs = 100.0 if backend == "triton" else None  # its history, to base two
    check_tokens(solve, specify, device, (x, y, a, b), epsilon, form, kind, logs)
    found, exact = solve(x, y, a, b), specify(*(value.double() for value in (x, y, a, b)))
    for value, right in zip(found, exact):
        assert (value - right).abs().max() <= 1000 * torch.finfo(torch.float32).eps * max(
            4 / epsilon, right.abs().max()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["wide", "softmax", "one"])
def test_weights_of_a_cost(backend, device, kind, dtype):
    B = batch_size(backend, device)
    cost = 2 * rand(0, B, N, M, dtype=dtype)
    a, b = extreme_weights(kind, 2, B, N, dtype), extreme_weights(kind, 3, B, M, dtype)
    for epsilon in EPSILONS[dtype]:

        def run(*values, epsilon=epsilon):
            return otfuse.sinkhorn(values[0], epsilon, *values[1:], num_iters=20, backend=backend)

        def specify(cost, a, b, order=0, epsilon=epsilon):
            return reordered(specified_sinkhorn, order)(cost, epsilon, raised(a), raised(b), num_iters=20)

        outputs = four_ways(run, specify, device, cost, a, b)
        assert_solution_accurate(*(otfuse.SinkhornOutput(*out) for out in outputs), epsilon, f"epsilon {epsilon}")

        def gradient(solver, *values, **options):
            leaves = [value.detach().requires_grad_() for value in values]
            return differentiated((solver(*leaves, **options)[0],), *leaves)[1:]

        results = four_ways(
            lambda *values: gradient(run, *values),
            lambda *values, order=0: gradient(specify, *values, order=order),
            device,
            cost,
            a,
            b,
        )
        for name, scale, *values in zip(("cost", "log a", "log b"), (4 / epsilon, 4.0, 4.0), *results):
            assert_gradient_accurate(*values, scale=scale, what=f"epsilon {epsilon}: gradient of {name}")


def test_a_raised_weight_is_live_and_has_no_gradient(backend, device):
    a = torch.tensor([[1.0, 1e-31, 1e-42, 0.0, 0.5]], device=device)
    cost = rand(0, 1, 5, M, dtype=torch.float32).to(device)
    leaf = a.clone().requires_grad_()
    out = otfuse.sinkhorn(cost, 0.1, leaf, backend=backend)
    assert torch.isfinite(out.f[0, [0, 1, 2, 4]]).all() and out.f[0, 3] == -torch.inf
    shares = out.plan.detach() / torch.where(a == 0, 1, raised(a) / 1.5)[:, :, None]
    few = 16 * torch.finfo(torch.float32).eps
    assert ((shares.sum(2) - (a != 0).float()).abs() <= out.marginal_error / a.clamp_min(LEAST) + few).all()
    (gradient,) = torch.autograd.grad(loss((out.plan, torch.where(torch.isinf(out.f), 0, out.f))), leaf)
    assert torch.isfinite(gradient).all() and (gradient[0, 1:4] == 0).all() and (gradient[0, [0, 4]] != 0).all()


@pytest.mark.parametrize(
    "dtype, factor",
    [
        (torch.float32, 2.0**127),  # the sum overflows
        (torch.float32, 2.0**-120),
        (torch.bfloat16, 2.0**126),
        (torch.double, 2.0**1000),  # beyond the dtype of the solve
        (torch.double, 2.0**-1000),
    ],
)
def test_a_common_factor_of_weights_changes_nothing(backend, device, dtype, factor):
    """A power of two, so that the weights are the same to the last bit; gradients up to their least number."""
    a, b = ((1 + rand(seed, 2, n, dtype=torch.float64)).to(torch.bfloat16).to(dtype) for seed, n in ((1, N), (2, M)))
    cost = rand(0, 2, N, M, dtype=torch.float32).to(device)
    few = 8 * torch.finfo(torch.float32).eps

    def solve(factor):
        leaves = [(value.to(device) * factor).requires_grad_() for value in (a, b)]
        out = otfuse.sinkhorn(cost, 0.1, *leaves, backend=backend)
        return out.plan.detach(), torch.autograd.grad(loss((out.plan,)), leaves)

    plain, scaled = solve(1.0), solve(factor)
    torch.testing.assert_close(scaled[0], plain[0], rtol=0, atol=few)
    for one, other in zip(plain[1], scaled[1]):
        limits = torch.finfo(dtype)
        least = limits.smallest_normal
        if dtype != torch.bfloat16 or not is_interpreted(backend, device):  # which rounds subnormal bfloat16 wrongly
            least *= limits.eps
        band = max(few, 2 * limits.eps) * one.abs().max() + factor * least
        torch.testing.assert_close(other.double() * factor, one.double(), rtol=0, atol=float(band))


@pytest.mark.parametrize("shape", [(N, M), (80, 70)], ids=str)  # a small item's tokens stay in cache on the cpu backend
@pytest.mark.parametrize("size_x, size_y", [(1e-20, 1e-20), (1e20, 1e20), (1e-20, 1e20), (1e-35, 1e34)])
def test_cosines_do_not_depend_on_lengths(backend, device, size_x, size_y, shape):
    if reasons := why_not(backend, device, *shape):
        pytest.skip(f"{backend}: {reasons}")
    x, y = clustered_tokens(4, *shape, D)
    x, y = size_x * x, size_y * y
    x[:, 1] = 0  # similarity zero, no gradient
    x[:, 2] /= size_x  # beside one of an ordinary length

    def solve(solver, x, y, **options):
        leaves = [value.detach().requires_grad_() for value in (x, y)]
        plan = solver(*leaves, 0.1, num_iters=20, **options).plan
        lengths = [value.detach().double().abs().amax(2, keepdim=True) for value in leaves]
        grads = torch.autograd.grad(loss((plan,)), leaves)
        return plan.detach(), *(grad.double() * length for grad, length in zip(grads, lengths))

    outputs = four_ways(
        lambda x, y: solve(otfuse.sinkhorn_attend, x, y, backend=backend, return_plan=True),
        lambda x, y, order=0: solve(reordered(specified_attend, order), x, y),
        device, x, y,
    )  # fmt: skip
    plan, *grads = zip(*outputs)
    assert_accurate(*plan, what="plan")
    for name, values in zip("xy", grads):
        actual, *others = values
        assert_gradient_accurate(actual.float(), *others, what=f"gradient of {name}")
    assert (grads[0][0][:, 1] == 0).all()


@pytest.mark.parametrize("kind", ["uniform", "masks", "weights"])
@pytest.mark.parametrize("of", ["all", "rows"])
@pytest.mark.parametrize("offset", [1e2, -1e3, 1e4, -1e5, 1e5])
def test_a_constant_added_to_a_cost_or_to_a_row_changes_nothing(backend, device, offset, of, kind):
    """The reference at the same dtype is that without the constant, which float64 takes off exactly."""
    B = batch_size(backend, device)
    cost = rand(0, B, N, M, dtype=torch.float32)
    cost = cost + (offset if of == "all" else offset * rand(1, B, N, 1, dtype=torch.float32))
    a, b = padded_weights(2, B, N, torch.float32), padded_weights(3, B, M, torch.float32)
    a, b = {"uniform": (None, None), "masks": (a != 0, b != 0), "weights": (a, b)}[kind]
    rows = cost.double().amin(2, keepdim=True)

    def solve(solver, cost, **options):
        leaf = cost.to(device).requires_grad_()
        out = solver(leaf, 0.1, *(None if w is None else w.to(device) for w in (a, b)), num_iters=20, **options)
        (grad,) = torch.autograd.grad(loss((out.plan, torch.where(torch.isinf(out.g), 0, out.g))), leaf)
        return [value.detach().cpu() for value in (out.plan, out.f, out.g, grad)]

    actual = solve(otfuse.sinkhorn, cost, backend=backend)
    low = (cost.double() - rows).float()
    reference = references(lambda order: solve(reordered(specified_sinkhorn, order), low))
    exact = solve(specified_sinkhorn, cost.double())
    assert_accurate(actual[0], reference[0], exact[0], exact[0], what="plan")
    assert_gradient_accurate(actual[3], reference[3], exact[3], exact[3], scale=4 / 0.1 / M, what="gradient")
    rounding = torch.finfo(torch.float32).eps
    reference[1] = reference[1] + rows.squeeze(2)
    assert_accurate(actual[1], reference[1].float(), exact[1], exact[1], scale=2 * abs(offset), what="f")
    assert ((actual[2] - exact[2]).abs().nan_to_num() <= 40 * rounding).all()


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_a_gradient_is_linear_in_what_is_passed_back(backend, device, grad):
    """Down to numbers that are not normal: finite, and right but for what is flushed to zero on the way."""
    cost, a = rand(0, 2, N, M, dtype=torch.float32).to(device), rand(1, 2, N, dtype=torch.float32).to(device) + 0.1
    sent = randn(2, 2, N, M, dtype=torch.float32).to(device)
    for epsilon in (0.5, 0.02):
        leaves = [t.detach().requires_grad_() for t in (cost, a)]
        plan = otfuse.sinkhorn(leaves[0], epsilon, leaves[1], num_iters=30, grad=grad, backend=backend).plan

        def passed_back(size, plan=plan, leaves=leaves):
            return torch.autograd.grad(plan, leaves, sent * size, retain_graph=True)

        expected = passed_back(1.0)
        for size in (2.0**-144, 2.0**-120, 2.0**60):
            for found, right in zip(passed_back(size), expected):
                flushed = 2.0**-116 if size < 1 else 0.0
                least = 1e-4 * size * float(right.abs().max()) + flushed
                torch.testing.assert_close(found, right * size, rtol=1e-3, atol=least)
