"""The modules hold numbers: they equal the functions, keep no state, and say what they hold."""

from __future__ import annotations

import math

import pytest
import torch
from problems import padded_weights
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens

SOLVE = {"similarity": "dot", "num_iters": 9, "tol": 1e-4, "weights": "barycentric", "grad": "implicit"}
LOSS = {"temperature": 0.5, "assignment": "barycentric", "contrast": "assignment", "reduction": "sum"}


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def inputs(request, device) -> dict[str, Tensor]:
    x, y = clustered_tokens(3, 12, 9, 8, dtype=request.param, device=device)
    a, b = padded_weights(0, 3, 12, request.param).to(device), padded_weights(1, 3, 9).to(device) != 0
    return {"x": x, "y": y, "a": a, "b": b}


def test_attention_is_the_function(backend, inputs):
    for options in ({}, SOLVE, {"return_plan": True}):
        module = otfuse.nn.OTAttention(0.2, **options, backend=backend)
        out, expected = module(**inputs), otfuse.sinkhorn_attend(epsilon=0.2, **inputs, **options, backend=backend)
        assert (out.plan is None) == ("return_plan" not in options)
        for name, one, other in zip(out._fields, out, expected):
            assert one is other is None or torch.equal(one, other), name


@pytest.mark.parametrize("solve, loss", [({}, {}), (SOLVE, {}), ({}, LOSS), (SOLVE, LOSS)])
def test_fusion_is_its_parts(backend, inputs, solve, loss):
    """Concatenated tokens, and the loss of a plan that no half precision has rounded."""
    x, y, a, b = inputs.values()
    out = otfuse.nn.OTFusion(0.2, **solve, **loss, backend=backend)(**inputs)
    parts = otfuse.sinkhorn_attend(x, y, 0.2, a=a, b=b, **solve, backend=backend)
    assert torch.equal(out.tokens, torch.cat((parts.x, parts.y), 1)) and out.tokens.dtype == x.dtype
    inner = torch.promote_types(x.dtype, torch.float32)
    assert out.plan.dtype == out.loss.dtype == inner
    wide = otfuse.sinkhorn_attend(x.to(inner), y.to(inner), 0.2, a=a, b=b, **solve, return_plan=True, backend=backend)
    similarity = otfuse.similarity_matrix(x.to(inner), y.to(inner), solve.get("similarity", "cosine"))
    expected = otfuse.ot_alignment_loss(wide.plan, similarity.requires_grad_(), a=a, b=b, **loss)
    # The backend may sum the products in another order: D + 6 roundings of a similarity, through the loss, and a
    # few of the loss itself.
    (slope,) = torch.autograd.grad(expected, similarity)
    largest = 1.0 if solve.get("similarity", "cosine") == "cosine" else x.norm(dim=2).max() * y.norm(dim=2).max()
    eps = torch.finfo(inner).eps
    # The same of the plan, where epsilon divides them: bit for bit but for backends that read half precision.
    order = (x.shape[2] + 6) * largest * eps / 0.2 if backend == "triton" else 0.0
    torch.testing.assert_close(out.plan, wide.plan, rtol=float(order), atol=0)
    assert abs(out.loss - expected) <= eps * ((x.shape[2] + 6) * largest * slope.abs().sum() + 8 * expected.abs())


@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
def test_fusion_gradients_are_those_of_its_parts(backend, inputs, grad):
    x, y = (inputs[name].clone().requires_grad_() for name in "xy")
    masks = {"a": inputs["a"] != 0, "b": inputs["b"]}
    fused = otfuse.nn.OTFusion(0.2, grad=grad, backend=backend)(x, y, **masks)
    one = torch.autograd.grad(fused.loss.float() + fused.tokens.float().square().sum(), (x, y))
    inner = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(inner), y.to(inner)
    out = otfuse.sinkhorn_attend(*wide, 0.2, **masks, grad=grad, return_plan=True, backend=backend)
    loss = otfuse.ot_alignment_loss(out.plan, otfuse.similarity_matrix(*wide), **masks)
    tokens = torch.cat((out.x, out.y), 1).to(x.dtype)
    other = torch.autograd.grad(loss.float() + tokens.float().square().sum(), (x, y))
    for left, right in zip(one, other):
        # The same operations; only their sums may come in another order.
        close = 64 * torch.finfo(x.dtype).eps * float(right.abs().max())
        torch.testing.assert_close(left, right, rtol=0, atol=close)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_what_padding_holds_does_not_reach_the_loss(backend, inputs, similarity, bad):
    results = []
    for filler in (0.0, bad):
        x = inputs["x"].masked_fill((inputs["a"] == 0)[..., None], filler).requires_grad_()
        y = inputs["y"].masked_fill(~inputs["b"][..., None], filler).requires_grad_()
        out = otfuse.nn.OTFusion(0.2, similarity=similarity, backend=backend)(x, y, inputs["a"], inputs["b"])
        results.append((out.loss, out.plan, *torch.autograd.grad(out.loss, (x, y))))
    for clean, dirty in zip(*results):
        assert torch.isfinite(clean).all() and torch.equal(clean, dirty)
    assert (results[0][2][inputs["a"] == 0] == 0).all() and (results[0][2] != 0).any()


@pytest.mark.parametrize("module", [otfuse.nn.OTAttention(0.3), otfuse.nn.OTFusion(0.3)])
def test_there_is_no_state(module):
    assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())
    assert module.train() is module and module.half() is module
    module.load_state_dict({})


def test_repr_holds_the_numbers():
    assert repr(otfuse.nn.OTAttention(0.25, tol=1e-3, backend="torch")) == (
        "OTAttention(epsilon=0.25, similarity='cosine', num_iters=50, tol=0.001, weights='plan', grad='unroll', "
        "backend='torch')"
    )
    text = repr(otfuse.nn.OTFusion(0.25, temperature=0.376, reduction="sum"))
    assert "temperature=0.376, assignment='log_plan', contrast='similarity', reduction='sum'" in text
    assert "(attention): OTAttention(epsilon=0.25" in text


def test_wrong_values_are_refused_when_called(inputs):
    x, y = inputs["x"], inputs["y"]
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0"):
        otfuse.nn.OTAttention(-1.0)(x, y)
    with pytest.raises(ValueError, match=r'assignment must be one of "plan", "log_plan", "barycentric"; got \'logs\''):
        otfuse.nn.OTFusion(assignment="logs")(x, y)
    with pytest.raises(ValueError, match=r"a must have shape \[B, N\] = \[3, 12\]; got \[3, 9\]"):
        otfuse.nn.OTFusion()(x, y, a=inputs["b"])


def test_shapes_and_gradients_on_the_meta_device() -> None:
    """A model that holds the fusion can be counted without values, at any size."""
    x = torch.empty(2, 64, 768, device="meta", requires_grad=True)
    fused = otfuse.nn.OTFusion()(x, torch.empty(2, 20, 768, device="meta"), torch.ones(2, 64, device="meta").bool())
    (fused.tokens.sum() + fused.loss).backward()
    assert fused.tokens.shape == (2, 84, 768) and fused.plan.shape == (2, 64, 20)
    assert x.grad is not None and x.grad.is_meta and x.grad.shape == x.shape
