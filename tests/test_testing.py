"""The tolerance rule: no luck of one evaluation in it, and lost accuracy is seen."""

from __future__ import annotations

import pytest
import torch
from problems import weights

import otfuse
from otfuse.testing import (
    EVALUATIONS,
    assert_as_accurate_as_reference,
    clustered_tokens,
    references,
    reordered,
    specified_attend,
    specified_sinkhorn,
)

B, N, M, EPSILON = 16, 9, 66, 0.1


def problem(dtype=torch.float32):
    """So many items that an evaluation's largest error is no luck."""
    x, y = clustered_tokens(B, N, M, 16)
    cost = -otfuse.similarity_matrix(x, y)
    return tuple(t.to(dtype) for t in (cost, weights(1, B, N, torch.float32), weights(2, B, M, torch.float32)))


def solve(order=0, dtype=torch.float32, epsilon=EPSILON):
    """Plan, f + g and the gradient by the cost of a function of all."""
    cost, a, b = problem(dtype)
    cost.requires_grad_()
    out = reordered(specified_sinkhorn, order)(cost, epsilon, a, b, num_iters=50)
    weight = torch.arange(N * M, dtype=torch.float64).square().sin().view(N, M).to(dtype)
    (gradient,) = torch.autograd.grad((out.plan * weight).sum(), cost)
    return out.plan.detach(), (out.f[:, :, None] + out.g[:, None, :]).detach(), gradient


def judge(actual):
    """Of every output whether it passes."""
    passed = []
    for one, reference, exact in zip(actual, references(solve), solve(dtype=torch.float64)):
        try:
            assert_as_accurate_as_reference(one.float(), reference, exact)
            passed.append(True)
        except AssertionError as error:
            assert "the reference at the same dtype has" in str(error)
            passed.append(False)
    return passed


def test_another_order_is_the_same_function_rounded_otherwise():
    values = [solve(order, torch.float64) for order in range(EVALUATIONS)]
    for other in values[1:]:
        for one, two in zip(other, values[0]):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    for reference in references(solve):
        assert len({tuple(one.flatten().tolist()) for one in reference}) == EVALUATIONS


def test_another_order_of_tokens():
    x, y = clustered_tokens(2, 7, 5, 4, dtype=torch.float64)
    a = weights(1, 2, 7)
    one, other = (reordered(specified_attend, order)(x, y, a=a, weights="barycentric") for order in (0, 3))
    for name in one._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-11, atol=1e-13)


def test_a_reference_that_is_right_by_luck_does_not_decide():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    off = torch.tensor([1e-6, 0.0])
    lucky, usual, actual = exact.float(), exact.float() + off, exact.float() + 1.5 * off
    assert_as_accurate_as_reference(actual, torch.stack([lucky, usual]), exact)
    with pytest.raises(AssertionError, match="result: error"):
        assert_as_accurate_as_reference(actual, lucky[None], exact)
    with pytest.raises(AssertionError, match=r"expected evaluations \[K, \*\[2\]\]"):
        assert_as_accurate_as_reference(actual, usual, exact)


def test_lost_accuracy_is_seen():
    """The exact answer passes; one of another epsilon does not, nor one of which a sum is in bfloat16."""
    plan, potentials, gradient = exact = solve(dtype=torch.float64)
    assert judge(exact) == [True, True, True]
    assert judge(solve(dtype=torch.float64, epsilon=EPSILON * (1 + 2e-5))) == [False, False, False]
    rows = plan.sum(2, keepdim=True)
    assert not judge((plan * (rows.bfloat16() / rows), potentials, gradient))[0]


def test_four_times_the_usual_error_is_seen():
    """So what is allowed is less than twice what a usual evaluation alone would allow."""
    exact = solve(dtype=torch.float64)
    usual = []
    for reference, right in zip(references(solve), exact):
        errors = (reference - right).abs().amax((1, 2, 3))
        usual.append(right + 4 * (reference[errors.argsort()[EVALUATIONS // 2]] - right))
    assert judge(usual) == [False, False, False]
