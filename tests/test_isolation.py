"""An item's answer is its own: not its neighbours', its padding's, its memory layout's or the threads'."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from problems import padded_weights, rand, randn, roundings, weights
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GARBAGE = [math.nan, math.inf, -math.inf, 6e4]


def assert_same(one: tuple, other: tuple, message: str = "") -> None:
    """Bit for bit, NaN equal to NaN."""
    for name, left, right in zip(one._fields, one, other):
        if left is None and right is None:
            continue
        assert left.dtype == right.dtype and left.shape == right.shape, f"{message} {name}"
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=f"{message} {name}")


def items(out: tuple, index: slice) -> tuple:
    return type(out)(*(None if value is None else value[index] for value in out))


@pytest.fixture(params=["float32", "float64"])
def batch(request, device) -> dict[str, Tensor]:
    """Costs of which some solve by scaling alone and some do not, weights with zeros, an item without mass."""
    dtype = getattr(torch, request.param)
    cost = rand(0, 12, 17, 9, dtype=dtype) * torch.logspace(-2, 2, 12, dtype=dtype)[:, None, None]
    a, b = padded_weights(1, 12, 17, dtype), padded_weights(2, 12, 9, dtype)
    a[4] = 0
    return {"cost": cost.to(device), "a": a.to(device), "b": b.to(device)}


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_item_alone_in_a_batch_and_at_another_place(batch, backend, tol):
    whole = otfuse.sinkhorn(**batch, epsilon=0.1, tol=tol, backend=backend)
    order = torch.arange(11, -1, -1)
    turned = otfuse.sinkhorn(**{k: v[order] for k, v in batch.items()}, epsilon=0.1, tol=tol, backend=backend)
    assert_same(whole, items(turned, order), "turned round")
    for item in range(12):
        at = slice(item, item + 1)
        alone = otfuse.sinkhorn(**{k: v[at] for k, v in batch.items()}, epsilon=0.1, tol=tol, backend=backend)
        assert_same(alone, items(whole, at), f"item {item}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_attended_item_beside_other_neighbours(backend, device, dtype, form):
    """The same launch shape with other neighbours: bit for bit."""
    x, y = clustered_tokens(4, 33, 20, 24, dtype=dtype, device=device)
    other_x, other_y = clustered_tokens(4, 33, 20, 24, dtype=dtype, device=device, seed=1)
    other_x[2], other_y[2] = x[2], y[2]
    other_x[0] = math.nan
    other_y[3] *= 100
    options = {"weights": form, "return_plan": True, "backend": backend, "tol": 1e-4}
    one = otfuse.sinkhorn_attend(x, y, 0.05, **options)
    other = otfuse.sinkhorn_attend(other_x, other_y, 0.05, **options)
    assert_same(items(one, slice(2, 3)), items(other, slice(2, 3)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_nan_and_inf_stay_in_their_item_and_fill_it(batch, backend, where, bad):
    clean = otfuse.sinkhorn(**batch, epsilon=0.1, backend=backend)
    spoilt = {name: value.clone() for name, value in batch.items()}
    place = spoilt[where][7].flatten()
    live = (batch["a"][7][:, None] * batch["b"][7]).flatten() if where == "cost" else batch[where][7]
    place[live.nonzero()[3]] = bad
    spoilt[where][7] = place.view_as(spoilt[where][7])
    out = otfuse.sinkhorn(**spoilt, epsilon=0.1, backend=backend)
    others = torch.arange(12) != 7
    assert_same(items(clean, others), items(out, others))
    assert out.plan[7].isnan().all() and out.f[7].isnan().all() and out.g[7].isnan().all()
    assert out.marginal_error[7].isnan()


def test_negative_weight_makes_its_item_nan(batch, backend):
    batch["a"][3, 5] = -1e-3
    out = otfuse.sinkhorn(**batch, epsilon=0.1, backend=backend)
    assert out.plan[3].isnan().all()
    others = torch.arange(12) != 3
    assert not torch.cat([out.plan[others].flatten(), out.marginal_error[others]]).isnan().any()


@pytest.mark.parametrize("bad", GARBAGE)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_padding_holds_changes_nothing(backend, device, dtype, form, similarity, bad):
    x, y = clustered_tokens(3, 12, 9, 8, dtype=dtype, device=device)
    x, y = x / 2, y / 2
    a, b = padded_weights(0, 3, 12, dtype).to(device), padded_weights(1, 3, 9).to(device) != 0
    options = {"a": a, "b": b, "similarity": similarity, "weights": form, "return_plan": True, "backend": backend}
    clean = otfuse.sinkhorn_attend(x, y, 0.1, **options)
    dirty_x, dirty_y = x.clone(), y.clone()
    dirty_x[a == 0], dirty_y[~b] = bad, -bad
    dirty = otfuse.sinkhorn_attend(dirty_x, dirty_y, 0.1, **options)
    padded = (a == 0)[:, :, None] | ~b[:, None, :]
    assert padded.any() and (dirty.plan[padded] == 0).all() and (dirty.plan[~padded] > 0).any()
    for out, tokens, clean_out, weight in ((dirty.x, dirty_x, clean.x, a), (dirty.y, dirty_y, clean.y, b)):
        unchanged, live = out[weight == 0], weight != 0
        torch.testing.assert_close(unchanged, tokens[weight == 0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out[live], clean_out[live])
    for name in ("plan", "f", "g", "marginal_error", "num_iters"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
    assert torch.equal(dirty.f == -torch.inf, a == 0) and torch.equal(dirty.g == -torch.inf, ~b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_item_without_mass_returns_its_tokens(backend, device, dtype, sides):
    x, y = clustered_tokens(3, 12, 9, 8, dtype=dtype, device=device)
    a, b = weights(0, 3, 12, dtype).to(device), torch.ones(3, 9, dtype=torch.bool, device=device)
    if "a" in sides:
        a[1] = 0
    if "b" in sides:
        b[1] = False
    out = otfuse.sinkhorn_attend(x, y, 0.1, a=a, b=b, return_plan=True, backend=backend)
    assert torch.equal(out.x[1], x[1]) and torch.equal(out.y[1], y[1])
    assert (out.plan[1] == 0).all() and (out.f[1] == -torch.inf).all() and (out.g[1] == -torch.inf).all()
    assert out.marginal_error[1] == 0 and out.num_iters.tolist() == [50, 0, 50]
    assert (out.plan[[0, 2]].double().sum((1, 2)) - 1).abs().max() <= torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 0, 0, 5), (0, 0, 0, 0), (2, 0, 4, 0)])
@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_to_transport(backend, device, shape, grad, weighted):
    B, N, M, D = shape
    x, y = (torch.randn(B, n, D, device=device, requires_grad=True) for n in (N, M))
    a = torch.rand(B, N, device=device, requires_grad=True) if weighted else None
    out = otfuse.sinkhorn_attend(x, y, 0.1, a=a, grad=grad, return_plan=True, backend=backend)
    assert torch.equal(out.x, x) and torch.equal(out.y, y)
    assert out.plan.shape == (B, N, M) and out.num_iters.shape == (B,)
    assert out.f.shape == (B, N) and (out.f == -torch.inf).all() and (out.g == -torch.inf).all()
    assert (out.marginal_error == 0).all() and (out.num_iters == 0).all() and out.num_iters.dtype == torch.int32
    (2 * out.x.sum() + 3 * out.y.sum()).backward()
    assert (x.grad == 2).all() and (y.grad == 3).all()
    cost = torch.randn(B, N, M, device=device, requires_grad=True)
    plan = otfuse.sinkhorn(cost, 0.1, grad=grad, backend=backend).plan
    assert plan.shape == (B, N, M)
    if grad != "detach":
        plan.sum().backward()
        assert cost.grad.shape == cost.shape


@pytest.mark.parametrize("shape", [(2, 3, 4, 0), (2, 1, 1, 3), (2, 1, 4, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_featureless_and_single_tokens(backend, device, shape, similarity):
    """Where there is nothing to tell tokens apart, or only one, the plan is the product of the weights."""
    B, N, M, D = shape
    x, y, a = (t.to(device) for t in (randn(0, B, N, D), randn(1, B, M, D), weights(2, B, N)))
    a = a / a.sum(1, keepdim=True)
    out = otfuse.sinkhorn_attend(x, y, 0.1, a=a, similarity=similarity, return_plan=True, backend=backend)
    expected = a[:, :, None].expand(B, N, M) / M
    torch.testing.assert_close(out.plan, expected, rtol=roundings(1e-12), atol=0)
    torch.testing.assert_close(out.x, x + expected @ y, rtol=0, atol=roundings(1e-12))
    torch.testing.assert_close(out.y, y + expected.mT @ x, rtol=0, atol=roundings(1e-12))


def test_zero_tokens_have_cosine_zero(backend, device):
    x, y = (t.to(device) for t in (randn(0, 2, 5, 3), randn(1, 2, 4, 3)))
    x[:, 2] = 0
    x.requires_grad_()
    out = otfuse.sinkhorn_attend(x, y, 0.1, num_iters=1, backend=backend)
    # One row update: the zero token's row of K is constant, so its potential is that of an even spread.
    expected = torch.full_like(out.f[:, 2], 0.1 * math.log(1 / 5 / 4))
    torch.testing.assert_close(out.f[:, 2], expected, rtol=roundings(1e-12), atol=0)
    (gradient,) = torch.autograd.grad(out.f[:, 2].sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_memory_layout_does_not_matter(backend, device, grad):
    """Transposed, strided, expanded: forward and gradients are those of a contiguous copy."""
    wide = randn(0, 6, 10, 14).to(device)
    layouts = {
        "transposed": wide.mT,
        "strided": wide[::2, ::2, 1::3],
        "flipped batch": wide.transpose(0, 1),
        "expanded": wide[:1].expand(4, -1, -1),
        "expanded rows": wide[:, :1].expand(-1, 5, -1),
    }
    for name, cost in layouts.items():
        B, N, _ = cost.shape
        a = weights(1, 1, N).to(device).expand(B, N)
        results = []
        for c, w in ((cost, a), (cost.contiguous(), a.contiguous())):
            c, w = c.detach().requires_grad_(), w.detach().requires_grad_()
            out = otfuse.sinkhorn(c, 0.1, w, grad=grad, backend=backend)
            # A sum hands back an expanded gradient, a product with a transposed tensor a transposed one.
            loss = out.f.sum() + (out.plan.mT * rand(2, *out.plan.mT.shape).to(device)).sum()
            results.append((*out, *torch.autograd.grad(loss, (c, w))))
        for one, other in zip(*results):
            # Order of summation may follow the strides; the numbers are of order one over epsilon.
            torch.testing.assert_close(one, other, rtol=0, atol=roundings(1e-11), msg=name)
    x, y = randn(3, 3, 12, 7).to(device).mT, randn(4, 12, 3, 5).to(device).permute(1, 2, 0)
    out = otfuse.sinkhorn_attend(x, y, return_plan=True, backend=backend)
    same = otfuse.sinkhorn_attend(x.contiguous(), y.contiguous(), return_plan=True, backend=backend)
    for name, one, other in zip(out._fields, out, same):
        torch.testing.assert_close(one, other, rtol=0, atol=roundings(1e-12), msg=name)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_autocast_changes_nothing(backend, device, dtype, amp, grad):
    results = []
    for surroundings in (contextlib.nullcontext(), torch.autocast(device.type, dtype=amp)):
        x, y = clustered_tokens(2, 20, 12, 32, dtype=dtype, device=device)
        x.requires_grad_()
        with surroundings:
            out = otfuse.sinkhorn_attend(x, y, return_plan=True, grad=grad, backend=backend)
            similarity = otfuse.similarity_matrix(x, y)
            solved = otfuse.sinkhorn(1 - similarity, 0.1, grad=grad, backend=backend)
        # Under autocast the loss itself may be in half precision: it stays outside.
        gradient = torch.autograd.grad(out.x.double().square().sum() + solved.f.double().square().sum(), x)
        results.append((*out, similarity, *solved, *gradient))
    for one, other in zip(*results):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_two_threads_give_the_answer_of_one(backend, device, grad):
    if backend == "triton":
        pytest.skip("what threads of the host there are is no matter of its kernels")
    cost = (rand(0, 256, 40, 48, dtype=torch.float32) * torch.logspace(-1, 1, 256)[:, None, None]).to(device)
    a = padded_weights(1, 256, 40, torch.float32).to(device)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)  # 256 * 40 * 48 * 50 is work for six
            leaves = cost.clone().requires_grad_(), a.clone().requires_grad_()
            out = otfuse.sinkhorn(leaves[0], 0.1, leaves[1], grad=grad, tol=1e-3, backend=backend)
            results.append((*out, *torch.autograd.grad(out.plan.square().sum(), leaves)))
    finally:
        torch.set_num_threads(1)
    for one, other in zip(*results):
        assert torch.equal(one, other)
