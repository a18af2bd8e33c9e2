"""One answer: every backend against the specification in float64, beside the specification at the same dtype.

Batches have many items, and the reference is evaluated in several orders: its error is then the worst of many, not the
luck of one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import (
    assert_accurate,
    assert_solution_accurate,
    is_interpreted,
    padded_weights,
    rand,
    randn,
    weights,
    why_not,
)
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, references, reordered, specified_attend, specified_sinkhorn

B = 8
# One, odd, and below, at and above what decides in the CPU kernels: vectors of 16; thin up to a side of 64;
# small up to 16384 entries. Four outer lines go together, whichever side is the outer one.
SHAPES = [
    (1, 1), (1, 9), (9, 1), (2, 3), (5, 4), (15, 17), (16, 16), (17, 15), (33, 20), (20, 33),
    (63, 65), (64, 300), (300, 64), (65, 66), (127, 129), (128, 128), (129, 128), (128, 129),
]  # fmt: skip
LARGE = [shape for shape in SHAPES if shape[0] * shape[1] > 16000]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPSILONS = [1.0, 0.1, 0.05, 0.01, 0.001]


def batch_size(N: int, M: int) -> int:
    return 16 if N * M <= 1024 else B


def sides(kind: str, N: int, M: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    return {
        "uniform": lambda: (None, None),
        "weights": lambda: (weights(1, B, N, dtype), weights(2, B, M, dtype)),
        "masks": lambda: (padded_weights(1, B, N) != 0, padded_weights(2, B, M) != 0),
        "padded": lambda: (padded_weights(1, B, N, dtype), None),
        "both": lambda: (padded_weights(1, B, N, dtype), padded_weights(2, B, M) != 0),
    }[kind]()


def to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return value.to(dtype) if value is not None and value.is_floating_point() else value


def four_ways(run: Callable, specify: Callable, device: torch.device, *inputs: Tensor | None) -> list[tuple]:
    """(actual, reference, exact, truth) as ``assert_accurate`` takes them, of a function of tensors.

    ``specify`` takes the order of its reference too (otfuse.testing.reordered).
    """
    dtype = inputs[0].dtype
    low = torch.float32 if dtype == torch.float64 else dtype
    lowered = [to(value, low) for value in inputs]

    def call(function: Callable, values, **options) -> tuple[Tensor, ...]:
        return tuple(
            value.cpu() for value in function(*(None if v is None else v.to(device) for v in values), **options)
        )

    return [
        call(run, inputs),
        tuple(references(lambda order: call(specify, lowered, order=order))),
        call(specify, [to(value, torch.float64) for value in lowered]),
        call(specify, [to(value, torch.float64) for value in inputs]),
    ]


def check_cost(
    backend: str, device: torch.device, cost: Tensor, epsilon: float, a=None, b=None, what: str = ""
) -> None:
    """Everything that :func:`otfuse.sinkhorn` returns."""

    def run(cost, a, b):
        return otfuse.sinkhorn(cost, epsilon, a, b, backend=backend)

    def specify(cost, a, b, order=0):
        out = reordered(specified_sinkhorn, order)(cost, epsilon, a, b)
        return out._replace(plan=out.plan.to(cost.dtype))

    outputs = four_ways(run, specify, device, cost, a, b)
    assert_solution_accurate(*(otfuse.SinkhornOutput(*out) for out in outputs), epsilon, what)


def check_attend(
    backend: str,
    device: torch.device,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    a=None,
    b=None,
    form="plan",
    what: str = "",
) -> None:
    """Everything that :func:`otfuse.sinkhorn_attend` returns."""

    def run(x, y, a, b):
        return otfuse.sinkhorn_attend(x, y, epsilon, a=a, b=b, weights=form, return_plan=True, backend=backend)

    def specify(x, y, a, b, order=0):
        out = reordered(specified_attend, order)(x, y, epsilon, a=a, b=b, weights=form)
        return out._replace(plan=out.plan.to(x.dtype))

    outputs = four_ways(run, specify, device, x, y, a, b)
    for name, *values in zip("xy", *outputs):
        assert_accurate(*values, what=f"{what}: {name}")
    assert_solution_accurate(*(otfuse.SinkhornOutput(*out[2:]) for out in outputs), epsilon, what)


@pytest.mark.parametrize("kind", ["uniform", "weights", "masks", "padded"])
@pytest.mark.parametrize(
    "dtype, shape",
    [
        *((dtype, shape) for dtype in (torch.float64, torch.float32) for shape in SHAPES),
        *((dtype, shape) for dtype in (torch.bfloat16, torch.float16) for shape in ((1, 9), (33, 20), (65, 66))),
    ],
)
def test_cost(backend, device, dtype, shape, kind):
    if reasons := why_not(backend, device, *shape, dtype):
        pytest.skip(f"{backend}: {reasons}")
    for epsilon in (0.3, 0.01):
        ab = sides(kind, *shape, dtype)
        check_cost(backend, device, rand(0, B, *shape, dtype=dtype), epsilon, *ab, f"epsilon {epsilon}")


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "both"])
def test_attend(backend, device, kind, dtype, epsilon):
    for N, M in ((64, 20), (20, 64), (15, 17)):
        x, y = clustered_tokens(B, N, M, 48, dtype=dtype)
        for form in ("plan", "barycentric"):
            check_attend(backend, device, x, y, epsilon, *sides(kind, N, M, dtype), form, f"{N}x{M} {form}")


@pytest.mark.parametrize("most, inner", [(40.0, torch.float32), (300.0, torch.float64)])
@pytest.mark.parametrize("kind", ["uniform", "both"])
def test_the_switch_from_scalings_to_absorption_does_not_show(backend, device, kind, most, inner):
    """Ranges of log K around the switch, items of one batch on either side of it, and bounds on either side."""
    factors = torch.tensor([0.5, 0.99, 0.999999, 1.0, 1.000001, 1.01, 1.5, 3.0], dtype=inner)
    cost = rand(0, B, 24, 18, dtype=inner)
    low, high = cost.amin((1, 2), True), cost.amax((1, 2), True)
    cost = (cost - low) / (high - low) * factors[:, None, None]
    check_cost(backend, device, cost, 1 / most, *sides(kind, 24, 18, inner), "cost")
    x, y = clustered_tokens(B, 24, 18, 32, dtype=inner)
    for epsilon in (2.001 / most, 2 / most, 1.999 / most, 1.001 / most, 0.999 / most):
        check_attend(backend, device, x, y, epsilon, *sides(kind, 24, 18, inner), what=f"epsilon {epsilon}")


@pytest.mark.parametrize("least", [1e-4, 1e-8, 1e-12, 1e-20])
@pytest.mark.parametrize("epsilon", [0.1, 0.05, 0.01, 0.001])
def test_weights_of_very_different_size(backend, device, epsilon, least):
    dtype = torch.float32
    a, b = weights(1, B, 9, dtype), weights(2, B, 6, dtype)
    a[:, 3], a[:, 4], b[:, 2] = least, least, least
    check_cost(backend, device, rand(0, B, 9, 6, dtype=dtype), epsilon, a, b, "random")
    # A token of hardly any weight which the heavy ones would rather have: scalings move by its weight every round.
    a = torch.tensor([[least, 1.0]], dtype=dtype)
    check_cost(backend, device, torch.tensor([[[0.0, 0.1], [2.0, 1.0]]]), epsilon, a, what="wanted")
    # And the same with cosines at both ends of their range.
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    check_attend(backend, device, x, x, epsilon, a, what="cosines")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size, epsilon", [(1e2, 0.1), (1e4, 0.1), (1e6, 0.1), (1e6, 1e4), (1e-6, 1e-8)])
def test_costs_of_very_different_size(backend, device, size, epsilon, dtype):
    for offset in (0.0, -3.0, 3.0):  # potentials far from zero on either side: padding has none to go with them
        cost = size * (rand(0, B, 12, 10, dtype=dtype) + offset)
        check_cost(backend, device, cost, epsilon, *sides("both", 12, 10, dtype), f"offset {offset}")


def gradients(out: tuple, names: tuple[str, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a fixed random combination of the named outputs, whose coefficients are the same at every dtype."""
    loss = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for k, name in enumerate(names):
        value = getattr(out, name)
        coefficients = randn(50 + k, *value.shape, dtype=torch.bfloat16).to(value.device)
        loss = loss + torch.where(torch.isinf(value), 0, value * coefficients.to(value.dtype)).double().sum()
    return torch.autograd.grad(loss, leaves)


def assert_gradient_accurate(
    actual: Tensor, reference: Tensor, exact: Tensor, truth: Tensor, what: str, scale: float = 0.0
) -> None:
    """The rule of ``assert_accurate`` for root mean squares.

    A few entries of a gradient are far more sensitive than the rest (an item that converges slowly, a small
    weight): how well one of those is rounded is luck, here and in the reference, and no matter of the formula.
    """
    assert torch.isfinite(actual).all(), f"{what}: NaN or Inf"
    magnified, dtype = (2.0**29 / 3, torch.float32) if actual.dtype == torch.float64 else (1.0, actual.dtype)
    error = magnified * root_mean_square(actual.double() - truth)
    allowed = max(root_mean_square(one.double() - exact) for one in reference)
    band = torch.finfo(dtype).eps * max(scale, root_mean_square(truth))
    assert error <= 2 * allowed + band, f"{what}: error {error:.3g}, reference {allowed:.3g}, a rounding {band:.3g}"


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def even_weights(seed: int, B: int, N: int, dtype: torch.dtype) -> Tensor:
    """Within a factor of two of each other, but for zeros: a gradient goes like one over a weight."""
    return ((1 + rand(seed + 1, B, N)) * (padded_weights(seed, B, N) != 0)).to(dtype)


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
@pytest.mark.parametrize("epsilon", [0.3, 0.02])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_a_cost(backend, device, dtype, epsilon, grad):
    """``unroll`` beside autograd through the specification; ``implicit`` beside the plain PyTorch formula.

    Few rounds where f and g are differentiated: of their common constant, roundings add up round by round.
    """
    # Where the fixed point is differentiated it has to be one.
    cases = ((("plan",), 50), (("plan", "f", "g"), 5)) if grad == "unroll" else ((("plan",), 400),)
    all_shapes = dtype == torch.float32 and grad == "unroll" and not is_interpreted(backend, device)
    shapes = SHAPES if all_shapes else ((9, 1), (15, 17), (33, 20))
    shapes = [shape for shape in shapes if not why_not(backend, device, *shape, dtype)]
    for (N, M), (names, num_iters) in ((shape, case) for shape in shapes for case in cases):

        def differentiate(solver, cost, a, b, names=names, num_iters=num_iters, **options):
            leaves = tuple(value.detach().requires_grad_() for value in (cost, a, b))
            out = solver(leaves[0], epsilon, *leaves[1:], num_iters=num_iters, **options)
            return gradients(out._replace(plan=out.plan.to(cost.dtype)), names, leaves)

        def run(*values, differentiate=differentiate):
            return differentiate(otfuse.sinkhorn, *values, grad=grad, backend=backend)

        def specify(*values, order=0, differentiate=differentiate):
            if grad == "unroll":
                return differentiate(reordered(specified_sinkhorn, order), *values)
            return differentiate(reordered(otfuse.sinkhorn, order), *values, grad=grad, backend="torch")

        B = batch_size(N, M)
        a, b = even_weights(1, B, N, dtype), even_weights(2, B, M, dtype)
        outputs = four_ways(run, specify, device, rand(0, B, N, M, dtype=dtype), a, b)
        # A gradient is a difference of terms of the size of each output's own derivative: coefficients, up to
        # four, times a plan entry over epsilon (a column's or row's weight if it holds but one) for the cost, and
        # over its weight for the weights, which are all between one and two.
        most = 4 / min(N, M)
        for name, scale, *values in zip(("cost", "a", "b"), (most / epsilon, most, most), *outputs):
            assert_gradient_accurate(*values, scale=scale, what=f"{N}x{M}, {num_iters} rounds: gradient of {name}")


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_gradients_of_tokens(backend, device, form, dtype, epsilon):
    def differentiate(solver, *values, **options):
        x, y, a, b = leaves = tuple(value.detach().requires_grad_() for value in values)
        out = solver(x, y, epsilon, a=a, b=b, weights=form, **options)
        return gradients(out._replace(plan=out.plan.to(x.dtype)), ("x", "y", "plan"), leaves)

    def run(*values):
        return differentiate(otfuse.sinkhorn_attend, *values, backend=backend, return_plan=True)

    def specify(*values, order=0):
        return differentiate(reordered(specified_attend, order), *values)

    B = batch_size(33, 20)
    a, b = even_weights(1, B, 33, dtype), even_weights(2, B, 20, dtype)
    x, y = clustered_tokens(B, 33, 20, 24, dtype=dtype)
    for name, *values in zip("xyab", *four_ways(run, specify, device, x, y, a, b)):
        assert_gradient_accurate(*values, what=f"gradient of {name}")


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_gradients_of_large_items_in_both_forms(backend, device, shape):
    """Where the kernel matrix has no memory of its own, by scalings and by absorption."""
    if reasons := why_not(backend, device, *shape):
        pytest.skip(f"{backend}: {reasons}")
    for epsilon in (0.1, 0.01):

        def differentiate(solver, cost, epsilon=epsilon, **options):
            leaf = cost.detach().requires_grad_()
            return gradients(solver(leaf, epsilon, num_iters=7, **options), ("plan", "g"), (leaf,))

        def run(cost, differentiate=differentiate):
            return differentiate(otfuse.sinkhorn, cost, backend=backend)

        def specify(cost, order=0, differentiate=differentiate):
            return differentiate(reordered(specified_sinkhorn, order), cost)

        outputs = four_ways(run, specify, device, rand(0, 3, *shape, dtype=torch.float32))
        assert_gradient_accurate(*(values for (values,) in outputs), what=f"epsilon {epsilon}")
