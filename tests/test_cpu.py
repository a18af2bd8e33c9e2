"""The cpu backend's own ways: tiny items are solved side by side, and none may notice."""

from __future__ import annotations

import pytest
import torch
from problems import padded_weights, randn

import otfuse
from otfuse.testing import specified_sinkhorn

pytest.importorskip("numba", reason="numba is not installed (pip install 'otfuse[cpu]')")


def solve(cost, a, b, **options):
    return otfuse.sinkhorn(cost, 0.1, a, b, num_iters=20, backend="cpu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (4, 4), (3, 7), (16, 4), (8, 8), (8, 9)])  # the last is not tiny
def test_a_tiny_item_among_many_is_as_alone(N, M, tol, dtype):
    B = 150  # two full batches of lanes and a rest; a lone item has other lanes
    cost = randn(0, B, N, M, dtype=dtype).abs()
    a, b = padded_weights(1, B, N).to(dtype), padded_weights(2, B, M).to(dtype)
    cost[7] *= 100  # in the logarithmic form
    cost[11, 0, 0] = torch.nan
    a[13] = 0  # no mass
    found = solve(cost, a, b, tol=tol)
    for item in (0, 7, 11, 13, 63, 64, 140, 149):
        alone = solve(cost[item, None], a[item, None], b[item, None], tol=tol)
        for one, many in zip(alone, found):
            assert torch.equal(one[0].nan_to_num(nan=-7), many[item].nan_to_num(nan=-7))
    assert found.plan[11].isnan().all() == bool(a[11, 0] * b[11, 0] != 0)
    assert (found.plan[13] == 0).all() and (found.f[13] == -torch.inf).all()
    finite = [item for item in range(B) if item not in (11, 13)]
    exact = specified_sinkhorn(cost[finite].double(), 0.1, a[finite], b[finite], num_iters=20, tol=tol)
    assert (found.num_iters[finite] - exact.num_iters).abs().max() <= (0 if tol is None else 1)
    if tol is None:
        torch.testing.assert_close(found.plan[finite].double(), exact.plan, rtol=0, atol=300 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_gradients_through_tiny_items(tol):
    """Its history is the one that the backward reads, for each item its own rounds."""
    cost = randn(3, 70, 4, 5, dtype=torch.float64).abs().requires_grad_()
    sent = randn(4, 70, 4, 5, dtype=torch.float64)
    grads = []
    for backend in ("cpu", "torch"):
        out = otfuse.sinkhorn(cost, 0.3, num_iters=9, tol=tol, backend=backend)
        grads += torch.autograd.grad((out.plan * sent).sum() + out.f.sum(), cost)
    assert len(set(out.num_iters.tolist())) > 1 or tol is None
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
