"""Triton at the ends of the range, by every path: weights of any size, and offsets of a cost."""

from __future__ import annotations

import pytest
import torch
from problems import rand, randn, seeds  # noqa: F401
from test_triton_large import on_path  # noqa: F401  (a fixture)

import otfuse
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._backends.triton.paths import Path
from otfuse.testing import (
    assert_as_accurate_as_reference,
    references,
    reordered,
    specified_attend,
    specified_sinkhorn,
)

ATTENDED = (Path.ON_CHIP, Path.STORED, Path.CLUSTER, Path.RECOMPUTED)
SOLVED = (Path.SMALL, Path.ON_CHIP, Path.STORED, Path.CLUSTER)
N, M, D = 18, 5, 8  # two strips of streaming, two blocks of a cluster

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="neither CUDA nor Triton's interpreter"
)


def log_uniform(seed: int, B: int, length: int, least: float = -30) -> torch.Tensor:
    """Weights 10^least … 1."""
    return (10 ** (least * rand(seed, B, length, dtype=torch.float64))).float()


def of_cost(cost, a, b, epsilon, dtype, device, solve):
    """All outputs, and the gradients by the cost and the logarithms of the weights, in float64 on the CPU."""
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in (cost, a, b) if t is not None]
    weights = dict(zip(("a", "b"), leaves[1:]))
    out = solve(leaves[0], epsilon, num_iters=6, **weights)
    # Linear in f: of a large one a sine would be that of its rounding. Of padding, f is minus infinity.
    finite = [t.masked_fill(t.isinf(), 0).double() for t in out[:3]]
    loss = sum((t * randn(i, *t.shape, dtype=torch.float64).to(device)).sum() for i, t in enumerate(finite))
    grads = [g * t.detach() if i else g for i, (g, t) in enumerate(zip(torch.autograd.grad(loss, leaves), leaves))]
    return [t.detach().cpu() for t in (*out[:3], *grads)]


def attended(x, y, a, b, epsilon, weights, dtype, device, solve):
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in (x, y, a, b)]
    out = solve(*leaves[:2], epsilon, a=leaves[2], b=leaves[3], weights=weights, num_iters=6)
    outputs = out.x, out.y, out.plan
    loss = sum((t.double() * randn(i, *t.shape, dtype=torch.float64).to(device)).sum() for i, t in enumerate(outputs))
    grads = [g * t.detach() if i > 1 else g for i, (g, t) in enumerate(zip(torch.autograd.grad(loss, leaves), leaves))]
    return [t.detach().cpu() for t in (*outputs, *grads)]


def by_triton(*args, **options):
    return otfuse.sinkhorn_attend(*args, return_plan=True, backend="triton", **options)


def packed(x, y, epsilon, a, b, weights, num_iters):
    """The same items one after the other."""
    (B, rows, width), columns = x.shape, y.shape[1]
    starts = [torch.arange(B + 1, dtype=torch.int32, device=x.device) * size for size in (rows, columns)]
    out = otfuse.sinkhorn_attend_varlen(
        x.reshape(-1, width), y.reshape(-1, width), *starts, rows, columns, epsilon, a=a.reshape(-1), b=b.reshape(-1),
        weights=weights, num_iters=num_iters, return_plan=True, backend="triton",
    )  # fmt: skip
    return out._replace(x=out.x.reshape(x.shape), y=out.y.reshape(y.shape))


def solve_by_triton(*args, **options):
    return otfuse.sinkhorn(*args, backend="triton", **options)


ATTEND_NAMES = "x", "y", "plan", "gradient by x", "gradient by y", "gradient by log a", "gradient by log b"
SOLVE_NAMES = "plan", "f", "g", "gradient by cost", "gradient by log a", "gradient by log b"


@pytest.mark.parametrize("kind", ["plan", "barycentric"])
@pytest.mark.parametrize("path", [*ATTENDED, None], ids=str)
def test_weights_down_to_1e30_on_both_sides(on_path, device, path, kind):  # noqa: F811
    """Log-uniform: a sum of a folded kernel is as small as the product of three weights. None: packed, on chip."""
    if path is not None:
        on_path(path)
    B = 6
    x, y = randn(0, B, N, D, dtype=torch.float32), randn(1, B, M, D, dtype=torch.float32)
    a, b = log_uniform(2, B, N), log_uniform(3, B, M)
    for epsilon in (0.1, 0.005):
        args = x, y, a, b, epsilon, kind
        exact = attended(*args, torch.float64, "cpu", specified_attend)
        reference = references(
            lambda order, args=args: attended(*args, torch.float32, "cpu", reordered(specified_attend, order))
        )
        actual = attended(*args, torch.float32, device, packed if path is None else by_triton)
        for *values, name in zip(actual, reference, exact, ATTEND_NAMES):
            # Made anew, a similarity is rounded in one kernel after the other, and divided by epsilon.
            scale = float(values[2].abs().max()) * (1.4427 / epsilon if path is Path.RECOMPUTED else 1)
            assert_as_accurate_as_reference(*values, scale=scale, what=f"{path}, {epsilon}: {name}")


@pytest.mark.parametrize("path", SOLVED, ids=str)
def test_costs_with_weights_down_to_1e30_on_both_sides(on_path, device, path):  # noqa: F811
    on_path(path)
    B, columns = 8, 5
    rows = 6 if path is Path.SMALL else N
    cost, a, b = rand(0, B, rows, columns, dtype=torch.float32), log_uniform(1, B, rows), log_uniform(2, B, columns)
    for epsilon in (0.05, 0.001):
        args = cost, a, b, epsilon
        exact = of_cost(*args, torch.float64, "cpu", specified_sinkhorn)
        reference = references(
            lambda order, args=args: of_cost(*args, torch.float32, "cpu", reordered(specified_sinkhorn, order))
        )
        actual = of_cost(*args, torch.float32, device, solve_by_triton)
        for *values, name in zip(actual, reference, exact, SOLVE_NAMES):
            assert_as_accurate_as_reference(*values, what=f"{path}, {epsilon}: {name}")


def saturated(seed: int, B: int, length: int) -> torch.Tensor:
    """Of a softmax in float32, many of whose values are subnormal or zero; and a one-hot item."""
    found = (40 * randn(seed, B, length, dtype=torch.float32)).softmax(1)
    found[0] = torch.eye(length)[0]
    found[1, 0], found[1, 1:] = 1, 1e-42
    return found


@pytest.mark.parametrize("path", SOLVED, ids=str)
def test_weights_of_a_saturated_softmax(on_path, device, path):  # noqa: F811
    """Against the specification of the weights as they count: a live one at least 1e-30 of the largest, of no gradient
    then."""
    on_path(path)
    B, columns = 8, 5
    rows = 6 if path is Path.SMALL else N
    cost, a, b = rand(3, B, rows, columns, dtype=torch.float32), saturated(4, B, rows), saturated(5, B, columns)
    counted = [torch.where(w == 0, 0, (w.double() / w.double().amax(1, True)).clamp_min(1e-30)) for w in (a, b)]
    for epsilon in (0.05, 0.001):
        exact = of_cost(cost, *counted, epsilon, torch.float64, "cpu", specified_sinkhorn)
        reference = references(
            lambda order, epsilon=epsilon: of_cost(
                cost, *counted, epsilon, torch.float32, "cpu", reordered(specified_sinkhorn, order)
            )
        )
        actual = of_cost(cost, a, b, epsilon, torch.float32, device, solve_by_triton)
        raised = [w == 1e-30 for w in counted]
        for i in (4, 5):
            assert not actual[i][raised[i - 4]].any()
            for values in (exact, reference):
                values[i] = values[i].masked_fill(raised[i - 4], 0)
        for *values, name in zip(actual, reference, exact, SOLVE_NAMES):
            # A gradient by weights is the difference of a sum and its mean, which are of order one.
            size = values[2].masked_fill(~values[2].isfinite(), 0).abs().max()
            scale = max(1.0 if "log" in name else 0.0, float(size))
            assert_as_accurate_as_reference(*values, scale=scale, what=f"{path}, {epsilon}: {name}")


@pytest.mark.parametrize("path", SOLVED, ids=str)
@pytest.mark.parametrize(
    ("size", "dtype"), [(2e38, torch.float32), (2e38, torch.bfloat16), (1e300, torch.float64), (1e-50, torch.float64)],
    ids=str,
)  # fmt: skip
def test_the_size_of_weights_does_not_count(on_path, device, path, size, dtype):  # noqa: F811
    """Sums that overflow in float32, and float64 weights that float32 does not hold, of a float32 cost."""
    on_path(path)
    columns = 5
    rows = 6 if path is Path.SMALL else N
    cost = rand(0, 2, rows, columns, dtype=torch.float32).to(device)
    share = [(0.25 * (1 + (4 * rand(i, 2, n)).floor())).to(dtype) for i, n in ((1, rows), (2, columns))]

    def solve(size):
        weights = [(w.double() * size).to(dtype).to(device).requires_grad_() for w in share]
        out = otfuse.sinkhorn(cost, 0.1, *weights, num_iters=5, backend="triton")
        grads = torch.autograd.grad((out.plan * cost).sum(), weights)
        return [t.detach().double().cpu() for t in (*out[:4], *(g.double() * size for g in grads))]

    found, expected = solve(size), solve(1.0)
    if dtype != torch.float64:  # the gradient by weights of 2e38 is no normal number, and is flushed on a device
        assert all(torch.isfinite(grad).all() for grad in found[4:])
        found, expected = found[:4], expected[:4]
    # In bfloat16 weights are rounded after they are multiplied.
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for values in zip(found, expected):
        torch.testing.assert_close(*values, **tolerance)


@pytest.mark.parametrize("path", SOLVED, ids=str)
def test_an_offset_of_a_cost_or_of_its_rows_changes_nothing(on_path, device, path):  # noqa: F811
    """Against the specification in float64 of the same float32 cost, which has the digits that the offset left it."""
    on_path(path)
    columns = 5
    rows = 6 if path is Path.SMALL else N
    base = rand(0, 2, rows, columns)
    for offset in (1e5, -1e5, 1e4 * randn(1, 2, rows, 1), 1e2 * randn(2, 2, 1, 1)):
        cost = (base + offset).float()
        exact = of_cost(cost, None, None, 0.1, torch.float64, "cpu", specified_sinkhorn)
        actual = of_cost(cost, None, None, 0.1, torch.float32, device, solve_by_triton)
        for found, expected, name in zip(actual, exact, SOLVE_NAMES):
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= 1e-6, f"{path}, {name}: {error:.1e}"


@pytest.mark.parametrize("path", SOLVED, ids=str)
def test_a_gradient_is_linear_in_what_is_passed_back(on_path, device, path):  # noqa: F811
    """Down to numbers that are not normal, which iterations far from the last get at small epsilon."""
    on_path(path)
    rows, columns = (6, 5) if path is Path.SMALL else (N, M)
    cost, a = rand(0, 2, rows, columns, dtype=torch.float32), rand(1, 2, rows, dtype=torch.float32) + 0.1
    sent = randn(2, 2, rows, columns, dtype=torch.float32)
    for epsilon in (0.1, 0.001):
        leaves = [t.to(device).requires_grad_() for t in (cost, a)]
        plan = otfuse.sinkhorn(leaves[0], epsilon, leaves[1], num_iters=6, backend="triton").plan

        def passed_back(size, plan=plan, leaves=leaves):
            return torch.autograd.grad(plan, leaves, (sent * size).to(device), retain_graph=True)

        expected = passed_back(1.0)
        for size in (2.0**-144, 2.0**-132, 2.0**-120, 2.0**60):
            for found, right in zip(passed_back(size), expected):
                flushed = 2.0**-116 if size < 1 else 0.0  # on the way, to zero
                least = 1e-5 * size * float(right.abs().max()) + flushed
                torch.testing.assert_close(found, right * size, rtol=1e-3, atol=least)


def of_lengths(seed: int, lengths: list[float], count: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens [2, count, D]: in the first item these lengths take turns, in the second all have the first of them."""
    tokens = torch.nn.functional.normalize(randn(seed, 2, count, D, dtype=torch.float64), dim=2)
    mixed = torch.tensor(lengths, dtype=torch.float64)[torch.arange(count) % len(lengths)]
    return (tokens * torch.stack([mixed, torch.full_like(mixed, lengths[0])])[:, :, None]).to(dtype)


def of_plan(x, y, a, b, dtype, device, solve):
    """The plan, and the gradients of a combination of its entries by each token, times the token's length."""
    leaves = [t.to(device, dtype).requires_grad_() for t in (x, y)]
    plan = solve(*leaves, 0.1, a=a.to(device), b=b.to(device), weights="plan", num_iters=6).plan
    loss = (plan.double() * randn(7, *plan.shape, dtype=torch.float64).to(device)).sum()
    lengths = [t.double().nan_to_num().norm(dim=2, keepdim=True) for t in (x, y)]
    grads = [grad.double().cpu() * length for grad, length in zip(torch.autograd.grad(loss, leaves), lengths)]
    return [plan.detach().cpu(), *(grad.to(dtype) for grad in grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("path", [*ATTENDED, None], ids=str)
def test_cosines_of_tokens_of_any_length(on_path, device, path, dtype):  # noqa: F811
    """Lengths whose squares and products are no numbers of the solve, beside one, zero, and padding of NaN.

    None: packed, on chip.
    """
    if path is not None:
        on_path(path)
    lengths = [1e-20, 1e-19, 1.0, 1e19, 1e20] if dtype != torch.float64 else [1e-200, 1e-160, 1.0, 1e160, 1e200]
    solve = torch.float64 if dtype == torch.float64 else torch.float32
    for of_x, of_y in ((lengths, lengths[::-1]), (lengths[:1], lengths), (lengths[::-1], lengths[-1:])):
        x, y = of_lengths(0, of_x, N, dtype), of_lengths(1, of_y, M, dtype)
        a, b = torch.ones(2, N), torch.ones(2, M)
        x[:, 3], y[0, 4] = 0, 0  # similarity zero with everything, and no gradient
        x[1, 9:], a[1, 9:] = float("nan"), 0
        args = x, y, a, b
        exact = of_plan(*args, torch.float64, "cpu", specified_attend)
        reference = references(
            lambda order, args=args: of_plan(*args, solve, "cpu", reordered(specified_attend, order))
        )
        actual = of_plan(*args, dtype, device, packed if path is None else by_triton)
        for *values, name in zip(actual, reference, exact, ("plan", "gradient by x", "gradient by y")):
            assert_as_accurate_as_reference(*values, what=f"{path}, {of_x[0]:.0e}, {of_y[0]:.0e}: {name}")
        assert not actual[1][:, 3].any() and not actual[2][0, 4].any()


@pytest.mark.parametrize("path", ATTENDED, ids=str)
def test_residuals_of_tokens_of_extreme_length(on_path, device, path):  # noqa: F811
    """What a token gets as a residual does not go by its length, and is added to what does; each token by its size."""
    on_path(path)
    for length in (1e-20, 1e20):
        x, y = of_lengths(0, [length, 1.0], N, torch.float32), of_lengths(1, [length, 1.0], M, torch.float32)
        sent = randn(5, 2, N, D, dtype=torch.float32)

        def solve(solver, dtype, where, x=x, y=y, sent=sent):
            leaves = [t.to(where, dtype).requires_grad_() for t in (x, y)]
            a, b = torch.ones(2, N, device=where), torch.ones(2, M, device=where)
            out = solver(*leaves, 0.1, a=a, b=b, weights="plan", num_iters=6)
            return [grad.cpu() for grad in torch.autograd.grad(out.x, leaves, sent.to(where, dtype))]

        exact = solve(specified_attend, torch.float64, "cpu")
        reference = references(
            lambda order, solve=solve: solve(reordered(specified_attend, order), torch.float32, "cpu")
        )
        actual = solve(by_triton, torch.float32, device)
        for found, others, right, name in zip(actual, reference, exact, "xy"):
            size = right.abs().amax(2, keepdim=True)
            values = (found / size).float(), (others / size).float(), right / size
            assert_as_accurate_as_reference(*values, what=f"{path}, {length:.0e}: gradient by {name}")
