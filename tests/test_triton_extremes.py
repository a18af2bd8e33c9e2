"""Triton at the ends of the range, by every path: weights of any size, and offsets of a cost."""

from __future__ import annotations

import pytest
import torch
from problems import rand, randn, seeds  # noqa: F401
from test_triton_large import on_path  # noqa: F401  (a fixture)

import otfuse
from otfuse.backends import triton as backend
from otfuse.backends._triton_paths import Path
from otfuse.testing import assert_as_accurate_as_reference, specified_attend, specified_sinkhorn

ATTENDED = (Path.ON_CHIP, Path.STORED, Path.CLUSTER, Path.RECOMPUTED)
SOLVED = (Path.SMALL, Path.ON_CHIP, Path.STORED, Path.CLUSTER)
N, M, D = 18, 5, 8  # two strips of streaming, two blocks of a cluster

pytestmark = pytest.mark.skipif(
    not (backend.INTERPRETED or torch.cuda.is_available()), reason="neither CUDA nor Triton's interpreter"
)


def log_uniform(seed: int, B: int, length: int, least: float = -30) -> torch.Tensor:
    """Weights 10^least … 1."""
    return (10 ** (least * rand(seed, B, length, dtype=torch.float64))).float()


def of_cost(cost, a, b, epsilon, dtype, device, solve):
    """All outputs, and the gradients by the cost and the logarithms of the weights, in float64 on the CPU."""
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in (cost, a, b) if t is not None]
    weights = dict(zip(("a", "b"), leaves[1:]))
    out = solve(leaves[0], epsilon, num_iters=6, **weights)
    # Linear in f: of a large one a sine would be that of its rounding.
    loss = sum((t.double() * randn(i, *t.shape, dtype=torch.float64).to(device)).sum() for i, t in enumerate(out[:3]))
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
        reference = attended(*args, torch.float32, "cpu", specified_attend)
        actual = attended(*args, torch.float32, device, packed if path is None else by_triton)
        for values in zip(actual, reference, exact, ATTEND_NAMES):
            print(path,kind,epsilon,values[3],*["%.1e"%((v-values[2]).abs().max()/values[2].abs().max()) for v in values[:2]])
