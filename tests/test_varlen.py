"""Packed tokens: what each item's own dense call returns, and nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import few_roundings, padded_weights, randn
from torch import Tensor

import otfuse

# Zero on one side, on the other, on both; one; the longest; and more empty ones at both ends.
LENGTHS_X = [0, 5, 0, 3, 1, 8, 0, 1, 0]
LENGTHS_Y = [2, 4, 0, 0, 1, 3, 6, 7, 0]
D = 6


def close() -> dict[str, float]:
    # Dots of packed tokens reach some 20 and are divided by epsilon 0.2: a rounding there is an error in the plan.
    return {"rtol": 0, "atol": 20 / 0.2 * few_roundings()}


def offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@pytest.fixture
def packed(device) -> dict:
    x, y = (randn(seed, sum(n), D).to(device) for seed, n in ((0, LENGTHS_X), (1, LENGTHS_Y)))
    return {
        "x": x, "y": y, "cu_seqlens_x": offsets(LENGTHS_X, device), "cu_seqlens_y": offsets(LENGTHS_Y, device),
        "max_seqlen_x": 8, "max_seqlen_y": 7,
    }  # fmt: skip


def token_weights(kind: str, packed: dict) -> dict[str, Tensor | None]:
    a, b = (padded_weights(seed, 1, len(packed[side]))[0].to(packed["x"]) for seed, side in ((3, "x"), (4, "y")))
    return {
        "none": {"a": None, "b": None}, "weights": {"a": a, "b": b},
        "mask": {"a": a != 0, "b": None}, "mixed": {"a": None, "b": b},
    }[kind]  # fmt: skip


def split(values: Tensor | None, lengths: list[int]) -> list[Tensor | None]:
    return [None] * len(lengths) if values is None else list(values.split(lengths))


@pytest.mark.parametrize("kind", ["none", "weights", "mask", "mixed"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_equals_dense_calls_item_by_item(backend, packed, kind, form, similarity, tol):
    sides = token_weights(kind, packed)
    options = {"weights": form, "similarity": similarity, "tol": tol, "return_plan": True, "backend": backend}
    out = otfuse.sinkhorn_attend_varlen(**packed, epsilon=0.2, **sides, **options)
    assert out.x.shape == packed["x"].shape and out.y.shape == packed["y"].shape
    assert out.plan.shape == (len(LENGTHS_X), 8, 7)
    pieces_x = zip(*(split(v, LENGTHS_X) for v in (packed["x"], sides["a"], out.x, out.f)))
    pieces_y = zip(*(split(v, LENGTHS_Y) for v in (packed["y"], sides["b"], out.y, out.g)))
    for item, ((x, a, out_x, f), (y, b, out_y, g)) in enumerate(zip(pieces_x, pieces_y)):
        dense = otfuse.sinkhorn_attend(
            x[None], y[None], 0.2, a=None if a is None else a[None], b=None if b is None else b[None], **options
        )
        message = f"item {item}"
        torch.testing.assert_close(out_x, dense.x[0], **close(), msg=message)
        torch.testing.assert_close(out_y, dense.y[0], **close(), msg=message)
        torch.testing.assert_close(f, dense.f[0], **close(), msg=message)
        torch.testing.assert_close(g, dense.g[0], **close(), msg=message)
        torch.testing.assert_close(out.plan[item, : len(x), : len(y)], dense.plan[0], **close(), msg=message)
        assert (out.plan[item, len(x) :] == 0).all() and (out.plan[item, :, len(y) :] == 0).all()
        torch.testing.assert_close(out.marginal_error[item], dense.marginal_error[0], **close(), msg=message)
        assert out.num_iters[item] == dense.num_iters[0], message


@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
@pytest.mark.parametrize("form", ["plan", "barycentric"])
def test_gradients_are_those_of_dense_calls(backend, packed, form, grad):
    x, y = (packed.pop(name).requires_grad_() for name in "xy")
    a = padded_weights(3, 1, len(x))[0].to(x).requires_grad_()
    options = {"weights": form, "grad": grad, "num_iters": 20, "backend": backend}
    out = otfuse.sinkhorn_attend_varlen(x, y, **packed, epsilon=0.2, a=a, **options)
    coefficients = randn(5, *out.x.shape).to(x), randn(6, *out.y.shape).to(x)
    leaves = (x, y) if (grad, form) == ("detach", "plan") else (x, y, a)
    actual = torch.autograd.grad((out.x * coefficients[0]).sum() + (out.y * coefficients[1]).sum(), leaves)
    loss = torch.zeros((), dtype=x.dtype, device=x.device)
    pieces_x = zip(*(split(value, LENGTHS_X) for value in (x, a, coefficients[0])))
    pieces_y = zip(*(split(value, LENGTHS_Y) for value in (y, coefficients[1])))
    for (x_i, a_i, c_x), (y_i, c_y) in zip(pieces_x, pieces_y):
        dense = otfuse.sinkhorn_attend(x_i[None], y_i[None], 0.2, a=a_i[None], **options)
        loss = loss + (dense.x[0] * c_x).sum() + (dense.y[0] * c_y).sum()
    for one, other in zip(actual, torch.autograd.grad(loss, leaves)):
        # A derivative of the plan is one over epsilon of it, twenty rounds of it at most, times coefficients up to 3.
        torch.testing.assert_close(one, other, rtol=0, atol=20 * 3 * close()["atol"])


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("kind", ["none", "weights", "mask"])
def test_too_long_for_max_seqlen_is_nan_in_that_item_only(backend, packed, kind, side):
    """Cut off, not silently shortened: also where the other side of the item is empty."""
    options = {**token_weights(kind, packed), "epsilon": 0.2, "return_plan": True, "backend": backend}
    whole = otfuse.sinkhorn_attend_varlen(**packed, **options)
    most = 2
    lengths = LENGTHS_X if side == "x" else LENGTHS_Y
    packed[f"max_seqlen_{side}"] = most
    out = otfuse.sinkhorn_attend_varlen(**packed, **options)
    cut_off = [n > most for n in lengths]
    assert 0 < sum(cut_off) < len(cut_off) and any(
        c and not other for c, other in zip(cut_off, LENGTHS_Y if side == "x" else LENGTHS_X)
    )
    for name, item_lengths in (("x", LENGTHS_X), ("y", LENGTHS_Y), ("f", LENGTHS_X), ("g", LENGTHS_Y)):
        for values, expected, cut in zip(
            split(getattr(out, name), item_lengths), split(getattr(whole, name), item_lengths), cut_off
        ):
            if cut:
                assert values.isnan().all(), name
            else:
                torch.testing.assert_close(values, expected, **close())
    assert torch.equal(out.marginal_error.isnan(), torch.tensor(cut_off, device=out.x.device))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_item(backend, packed, bad):
    packed["y"].requires_grad_()  # both with a gradient: without one, tpc has another kernel for items this small
    clean = otfuse.sinkhorn_attend_varlen(**packed, epsilon=0.2, return_plan=True, backend=backend)
    item = 5
    packed["x"] = packed["x"].clone()
    packed["x"][sum(LENGTHS_X[:item]) + 1, 2] = bad
    x, y = packed["x"].requires_grad_(), packed["y"]
    out = otfuse.sinkhorn_attend_varlen(**packed, epsilon=0.2, return_plan=True, backend=backend)
    others = torch.arange(len(LENGTHS_X)) != item
    assert torch.equal(out.plan[others], clean.plan[others]) and out.plan[item].isnan().all()
    pieces = list(zip(split(out.x, LENGTHS_X), split(clean.x, LENGTHS_X)))
    for number, (one, other) in enumerate(pieces):
        assert one.isnan().all() if number == item else torch.equal(one, other)
    loss = sum(one.square().sum() for number, (one, _) in enumerate(pieces) if number != item)
    gradients = torch.autograd.grad(loss, (x, y))
    for gradient, lengths in zip(gradients, (LENGTHS_X, LENGTHS_Y)):
        for number, piece in enumerate(split(gradient, lengths)):
            assert number == item or torch.isfinite(piece).all()


@pytest.mark.parametrize("lengths_x, lengths_y", [([], []), ([0, 0], [0, 0]), ([0, 0], [2, 3]), ([1, 4], [0, 0])])
def test_batches_without_tokens(backend, device, lengths_x, lengths_y):
    x, y = (randn(k, sum(n), D).to(device) for k, n in enumerate((lengths_x, lengths_y)))
    longest = [max([0, *n]) for n in (lengths_x, lengths_y)]
    cu_seqlens = offsets(lengths_x, device), offsets(lengths_y, device)
    out = otfuse.sinkhorn_attend_varlen(x, y, *cu_seqlens, *longest, return_plan=True, backend=backend)
    assert torch.equal(out.x, x) and torch.equal(out.y, y)
    assert out.f.shape == (len(x),) and (out.f == -torch.inf).all()
    assert out.g.shape == (len(y),) and (out.g == -torch.inf).all()
    assert out.plan.shape == (len(lengths_x), *longest) and (out.plan == 0).all()
    assert out.num_iters.tolist() == [0] * len(lengths_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backend, packed, dtype):
    packed["x"], packed["y"] = packed["x"].to(dtype), packed["y"].to(dtype)
    out = otfuse.sinkhorn_attend_varlen(**packed, return_plan=True, backend=backend)
    assert out.x.dtype == out.y.dtype == out.plan.dtype == dtype and out.f.dtype == torch.float32
    item, (x, y) = 5, (split(packed[name], n)[5] for name, n in (("x", LENGTHS_X), ("y", LENGTHS_Y)))
    dense = otfuse.sinkhorn_attend(x[None], y[None], backend=backend)
    # Both are rounded once to the dtype, from float32 numbers that agree far better than that but for float32.
    eps = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 20 / 0.1)
    torch.testing.assert_close(split(out.x, LENGTHS_X)[item], dense.x[0], rtol=0, atol=eps * float(x.abs().max()))


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"x": torch.zeros(2, 9, D)}, ValueError, r"x must have shape \[T_x, D\]; got \[2, 9, 6\]"),
        ({"y": torch.zeros(23, 5)}, ValueError, "x and y must have the same feature size D"),
        ({"cu_seqlens_x": [0, 3]}, TypeError, r"cu_seqlens_x must be an int32 torch.Tensor of length B\+1; got list"),
        (
            {"cu_seqlens_y": torch.zeros(3)},
            TypeError,
            r"cu_seqlens_y must be int32; got float32; pass cu_seqlens_y.int",
        ),
        ({"cu_seqlens_y": torch.zeros(3).long()}, TypeError, r"pass cu_seqlens_y.int\(\)"),
        ({"cu_seqlens_y": torch.zeros(0).int()}, ValueError, r"cu_seqlens_y must have shape \[B\+1\]; got \[0\]"),
        ({"cu_seqlens_y": torch.zeros(3).int()}, ValueError, r"must both have length B\+1; got 10 and 3"),
        ({"max_seqlen_x": 8.0}, TypeError, r"max_seqlen_x must be an int; got float; pass int\(max_seqlen_x\)"),
        ({"max_seqlen_y": torch.tensor(7)}, TypeError, "max_seqlen_y must be an int; got Tensor"),
        ({"max_seqlen_x": True}, TypeError, "max_seqlen_x must be an int; got bool"),
        ({"max_seqlen_x": 0}, ValueError, "max_seqlen_x must be at least 1 where there are tokens; got 0"),
        ({"a": torch.ones(9)}, ValueError, r"a must have shape \[T_x\] = \[18\]; got \[9\]"),
        ({"b": torch.ones(23).int()}, TypeError, r"pass b.bool\(\) for a mask or b.float\(\) for weights"),
        ({"epsilon": 0}, ValueError, "epsilon must be a finite number > 0; got 0"),
    ],
)
def test_errors_name_what_was_passed(packed, device, changes, error, text):
    changes = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in changes.items()}
    if "y" in changes:
        changes["y"] = changes["y"].double()
    with pytest.raises(error, match=text):
        otfuse.sinkhorn_attend_varlen(**{**packed, **changes})
