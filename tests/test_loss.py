"""The loss against Eq. 4 written out as loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import padded_weights, rand, randn
from torch import Tensor
from torch.autograd import gradcheck

import otfuse
from otfuse.testing import clustered_tokens

ASSIGNMENTS = ("plan", "log_plan", "barycentric")
CONTRASTS = ("similarity", "assignment")
REDUCTIONS = ("mean", "sum")
COMBINATIONS = list(itertools.product(ASSIGNMENTS, CONTRASTS, REDUCTIONS))
# An inner product of some ten terms, each up to ln of the smallest number (745) times one over the temperature,
# and a logarithm of a sum of exponentials of such.
TOLERANCE = 100 * 745 / 0.07 * torch.finfo(torch.float64).eps


def side_by_hand(plan: list, similarity: list, keep: list, others: list, options: dict) -> list[float]:
    """Cross-entropies of the kept rows; ``plan[i][j]`` and ``similarity[i][j]`` are numbers."""

    def assigned(i: int, j: int) -> float:
        if options["assignment"] == "plan":
            return plan[i][j]
        if options["assignment"] == "log_plan":
            return math.log(max(plan[i][j], torch.finfo(torch.float64).tiny))
        return plan[i][j] / sum(plan[i][k] for k in others)

    def logit(i: int, j: int) -> float:
        """<q_i, s_j> / temperature, over the tokens of the other side that are kept."""
        return sum(assigned(i, k) * similarity[j][k] for k in others) / options["temperature"]

    losses = []
    for i in keep:
        logits = {j: logit(i, j) if options["contrast"] == "similarity" else logit(j, i) for j in keep}
        highest = max(logits.values())
        losses.append(highest + math.log(sum(math.exp(z - highest) for z in logits.values())) - logits[i])
    return losses


def loss_by_hand(plan: Tensor, similarity: Tensor, a: Tensor | None, b: Tensor | None, **options) -> float:
    B, N, M = plan.shape
    total, items = 0.0, 0
    for item in range(B):
        rows = [i for i in range(N) if a is None or a[item, i] != 0]
        columns = [j for j in range(M) if b is None or b[item, j] != 0]
        if not rows or not columns:
            continue
        p, s = plan[item], similarity[item]
        of_x = side_by_hand(p.tolist(), s.tolist(), rows, columns, options)
        of_y = side_by_hand(p.mT.tolist(), s.mT.tolist(), columns, rows, options)
        if options["reduction"] == "sum":
            total += sum(of_x) + sum(of_y)
        else:
            total += sum(of_x) / len(of_x) + sum(of_y) / len(of_y)
        items += 1
    return total / items if items and options["reduction"] == "mean" else total


def problem(device: torch.device, masked: bool) -> dict[str, Tensor | None]:
    similarity = 2 * rand(0, 4, 7, 5).to(device) - 1
    a = b = None
    if masked:
        a, b = padded_weights(1, 4, 7).to(device), padded_weights(2, 4, 5).to(device) != 0
        a[2] = 0  # an item without mass
    plan = otfuse.sinkhorn(-similarity, 0.1, a, b, backend="torch").plan
    return {"plan": plan, "similarity": similarity, "a": a, "b": b}


@pytest.mark.parametrize("assignment, contrast, reduction", COMBINATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.376, 10.0])
def test_loss_is_equation_four(device, assignment, contrast, reduction, masked, temperature):
    values = problem(device, masked)
    options = {
        "assignment": assignment, "contrast": contrast, "reduction": reduction, "temperature": temperature,
    }  # fmt: skip
    loss = otfuse.ot_alignment_loss(**values, **options)
    expected = loss_by_hand(**values, **options)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=0, abs=TOLERANCE * (39 if reduction == "sum" else 1))
    assert expected > 1e-3


@pytest.mark.parametrize("assignment, contrast, reduction", COMBINATIONS)
def test_gradients(device, assignment, contrast, reduction):
    """With respect to plan and similarity, masked entries included: their derivative is zero."""
    values = problem(device, masked=True)
    live = (values["a"] != 0)[:, :, None] & values["b"][:, None, :]

    def loss(plan, similarity):
        options = {"assignment": assignment, "contrast": contrast, "reduction": reduction}
        # The plan of real padding is zero, where the logarithm is cut off: a kink.
        return otfuse.ot_alignment_loss(
            torch.where(live, plan, 0), similarity, a=values["a"], b=values["b"], temperature=0.5, **options
        )

    leaves = [values[name].detach().clone().requires_grad_() for name in ("plan", "similarity")]
    with torch.no_grad():
        leaves[0] += 1e-2  # away from the cut, by far more than the step of the difference
    assert gradcheck(loss, leaves)
    for gradient in torch.autograd.grad(loss(*leaves), leaves):
        assert (gradient[~live] == 0).all() and (gradient[live] != 0).any()


@pytest.mark.parametrize("assignment, contrast, reduction", COMBINATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_padding_holds_changes_nothing(device, assignment, contrast, reduction, bad):
    values = problem(device, masked=True)
    options = {"assignment": assignment, "contrast": contrast, "reduction": reduction}
    padding = ~((values["a"] != 0)[:, :, None] & values["b"][:, None, :])
    results = []
    for filler in (0.0, bad):
        leaves = [values[name].masked_fill(padding, filler).requires_grad_() for name in ("plan", "similarity")]
        loss = otfuse.ot_alignment_loss(*leaves, a=values["a"], b=values["b"], **options)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert results[0][0] > 0


def test_the_plan_itself_sits_at_chance(device):
    """Measured for docs and DESIGN: entries of order 1 / (N M) leave every softmax flat, at ln N + ln M."""
    x, y = clustered_tokens(4, 64, 20, 768, device=device)
    plan = otfuse.sinkhorn_attend(x, y, return_plan=True).plan
    similarity = otfuse.similarity_matrix(x, y)
    chance = math.log(64) + math.log(20)
    flat = otfuse.ot_alignment_loss(plan, similarity, assignment="plan", temperature=1 / math.log(1 / 0.07))
    # A logit is at most a row sum, 1 / 20, times a similarity of one, times 2.66: the loss of a token is within
    # twice that of chance, on either side.
    assert abs(flat.item() - chance) < 2 * 2.66 * (1 / 64 + 1 / 20)
    sharp = otfuse.ot_alignment_loss(plan, similarity, assignment="log_plan")
    assert abs(sharp.item() - chance) > 0.5


def test_loss_rewards_alignment(device):
    """Matching tokens: the plan of the true similarity has a lower loss than that of a shuffled one."""
    similarity = torch.eye(6, device=device)[None].repeat(2, 1, 1) + 0.01 * randn(0, 2, 6, 6).float().to(device)
    for assignment, contrast in itertools.product(("log_plan", "barycentric"), CONTRASTS):
        right, wrong = (
            otfuse.ot_alignment_loss(plan, similarity, assignment=assignment, contrast=contrast)
            for plan in (otfuse.sinkhorn(-s, 0.1).plan for s in (similarity, similarity.roll(1, 1)))
        )
        assert right < 0.01 and wrong > 1


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_align_costs_nothing(device, shape, reduction):
    plan = torch.rand(*shape, device=device, requires_grad=True)
    loss = otfuse.ot_alignment_loss(plan, torch.rand(*shape, device=device), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert plan.grad.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_items_without_tokens_do_not_count(device, reduction):
    values = problem(device, masked=True)
    loss = otfuse.ot_alignment_loss(**values, reduction=reduction)
    without = {name: value[[0, 1, 3]] for name, value in values.items()}
    assert loss.item() == pytest.approx(otfuse.ot_alignment_loss(**without, reduction=reduction).item(), rel=1e-14)
    values["a"] = torch.zeros_like(values["a"])
    assert otfuse.ot_alignment_loss(**values, reduction=reduction).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_worked_out_in_float32(device, dtype):
    values = problem(device, masked=False)
    plan, similarity = values["plan"].to(dtype), values["similarity"].to(dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = otfuse.ot_alignment_loss(plan, similarity)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, otfuse.ot_alignment_loss(plan.float(), similarity.float()))
