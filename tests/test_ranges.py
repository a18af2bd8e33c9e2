"""Just outside the ranges of the scaling form: there its sums vanish, and what a token of little weight gets is lost.

Where a limit lies no other test sees: beside one, both forms agree. Here every column but one has so little weight that
the scaling form in float32 is wrong by all of what that column gets, so a backend has to take another.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import randn
from test_triton_large import on_path  # noqa: F401  (a fixture)

import otfuse
from otfuse._backends.select import BACKENDS
from otfuse._backends.triton.paths import Path
from otfuse._problem import SolveOptions, cost_problem
from otfuse.testing import assert_as_accurate_as_reference, references, reordered, specified_attend, specified_sinkhorn

N, M = 12, 11
LIMIT = 40.0  # of float32: what constants.SCALING_RANGE is to be

# Ranges of the log kernel and of the logarithms of the weights. All are beyond a limit: of both together, of the
# kernel; the first within the limits doubled, the second but for the weights.
RANGES = [(1.97 * LIMIT, LIMIT), (0.97 * LIMIT, 69.0), (1.47 * LIMIT, 1.5 * LIMIT)]


def half_circle(count: int) -> torch.Tensor:
    """Tokens whose cosines span -1 to 1."""
    angles = math.pi * torch.arange(count, dtype=torch.float64) / (count - 1)
    return torch.stack([angles.cos(), angles.sin()], 1)


def solved(solve, dtype, kernel, weights, of_tokens, side):
    """What both sides get, which is the plan over the weights, and its gradients; ``side``: whose weights are small."""
    a, b = torch.ones(1, N, dtype=torch.float64), torch.ones(1, M, dtype=torch.float64)
    (a, b)[side][:, 1:] = math.exp(-weights)
    a, b = (t.float().to(dtype) for t in (a, b))
    x, y = (half_circle(count)[None].to(dtype).requires_grad_() for count in (N, M))
    leaves = (x, y) if of_tokens else ((-x @ y.mT).detach().float().to(dtype).requires_grad_(),)
    out = solve(*leaves, 2 / kernel, a=a, b=b, num_iters=60)
    share = [t.double() / t.double().sum() for t in (a, b)]
    got = out.plan.double() / share[0][:, :, None], out.plan.double() / share[1][:, None, :]
    loss = sum((t * randn(i, *t.shape, dtype=torch.float64)).sum() for i, t in enumerate(got))
    return [t.detach().to(dtype) for t in (*got, *torch.autograd.grad(loss, leaves))]


NAMES = "what rows get", "what columns get", "gradient", "gradient by y"


@pytest.mark.parametrize("side", [0, 1], ids=["a", "b"])
@pytest.mark.parametrize("kernel, weights", RANGES)
@pytest.mark.parametrize("where", ["torch", "cpu", "tpc", Path.SMALL, Path.ON_CHIP, Path.CLUSTER], ids=str)
def test_problems_just_beyond_a_range(request, where, kernel, weights, side):
    if isinstance(where, Path):
        request.getfixturevalue("on_path")(where)
    of_tokens = where == "torch"  # whose bound is that of cosines
    specified = specified_attend if of_tokens else specified_sinkhorn
    backend = "triton" if isinstance(where, Path) else where
    (chosen,) = (candidate for candidate in BACKENDS if candidate.name == backend)
    problem = cost_problem(torch.zeros(1, N, M), None, None, SolveOptions(0.1))
    if reasons := chosen.why_not(problem):
        pytest.skip("; ".join(reasons))

    def solve(*args, **options):
        if of_tokens:
            return otfuse.sinkhorn_attend(*args, return_plan=True, backend=backend, **options)
        return otfuse.sinkhorn(*args, backend=backend, **options)

    args = kernel, weights, of_tokens, side
    exact = solved(specified, torch.float64, *args)
    reference = references(lambda order: solved(reordered(specified, order), torch.float32, *args))
    actual = solved(solve, torch.float32, *args)
    for *values, name in zip(actual, reference, exact, NAMES):
        scale = float(values[2].abs().max()) * (kernel + weights)  # logarithms of that size are rounded
        assert_as_accurate_as_reference(*values, scale=scale, what=f"{where}, {kernel}, {weights}: {name}")


def test_gradients_of_a_column_that_is_far_from_all_rows():
    """Without weights the scaling form itself holds farther out; but autograd forms v / sums, which overflows."""
    x, y = half_circle(N)[None].repeat(2, 1, 1), half_circle(M)[None].repeat(2, 1, 1)
    x[:, 1:] = x[:, :1] + 0.01 * randn(0, 2, N - 1, 2, dtype=torch.float64)
    y[:, :-1] = y[:, :1] + 0.01 * randn(1, 2, M - 1, 2, dtype=torch.float64)

    def by(solve, dtype, **options):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        plan = solve(*leaves, 2 / (1.47 * LIMIT), num_iters=5, **options).plan
        loss = (plan.double() * randn(2, 2, N, M, dtype=torch.float64)).sum()
        return plan.detach(), *torch.autograd.grad(loss, leaves)

    exact = by(specified_attend, torch.float64)
    reference = references(lambda order: by(reordered(specified_attend, order), torch.float32))
    actual = by(otfuse.sinkhorn_attend, torch.float32, backend="torch", return_plan=True)
    for *values, name in zip(actual, reference, exact, ("plan", "gradient by x", "gradient by y")):
        assert_as_accurate_as_reference(*values, what=name)
