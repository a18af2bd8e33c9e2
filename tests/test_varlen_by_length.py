"""Packed tokens on the ``cpu`` backend: dense batches of equal lengths, each item as it is alone, and no padding."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from problems import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse._backends.cpu import backend as cpu
from otfuse._backends.cpu import varlen as by_length
from otfuse._ops import MODES

pytest.importorskip("numba")

# Two of a kind apart from each other, one alone, empty ones, and one a thousand times as long as another.
LENGTHS_X, LENGTHS_Y = [9, 1, 1000, 0, 9, 1, 30, 7], [4, 1, 40, 3, 4, 2, 4, 0]
D = 8


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def batch(lengths_x: list[int], lengths_y: list[int], dtype: torch.dtype = torch.float32, D: int = D) -> dict:
    x, y = (randn(seed, sum(n), D).to(dtype) for seed, n in ((0, lengths_x), (1, lengths_y)))
    return {
        "x": x, "y": y, "cu_seqlens_x": offsets(lengths_x), "cu_seqlens_y": offsets(lengths_y),
        "max_seqlen_x": max(lengths_x), "max_seqlen_y": max(lengths_y),
    }  # fmt: skip


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worth", [0, 1 << 30], ids=["as they came", "sorted"])
def test_an_item_has_the_bits_of_its_own_dense_call(monkeypatch, grad, dtype, worth):
    """Forward and backward, of a kind with others or alone."""
    monkeypatch.setattr(by_length, "WORTH_A_CALL", worth)
    items = batch(LENGTHS_X, LENGTHS_Y, dtype)
    options = {"epsilon": 0.2, "num_iters": 6, "tol": 1e-3, "grad": grad, "return_plan": True, "backend": "cpu"}
    x, y = (items[side].requires_grad_() for side in "xy")
    out = otfuse.sinkhorn_attend_varlen(**items, **options)
    gradients = torch.autograd.grad(out.x.float().square().sum() + out.y.float().sum(), (x, y))
    columns = zip(*(t.split(LENGTHS_X) for t in (x, out.x, out.f, gradients[0])))
    rows = zip(*(t.split(LENGTHS_Y) for t in (y, out.y, out.g, gradients[1])))
    for item, ((x_i, x_out, f, grad_x), (y_i, y_out, g, grad_y)) in enumerate(zip(columns, rows)):
        leaves = [tokens.detach()[None].clone().requires_grad_() for tokens in (x_i, y_i)]
        alone = otfuse.sinkhorn_attend(*leaves, **options)
        sent = torch.autograd.grad(alone.x.float().square().sum() + alone.y.float().sum(), leaves)
        for one, other in zip((x_out, y_out, f, g, grad_x, grad_y), (*alone[:2], *alone[3:5], *sent)):
            assert torch.equal(one, other[0]), item
        assert torch.equal(out.plan[item, : len(x_i), : len(y_i)], alone.plan[0])
        assert out.plan[item].count_nonzero() == alone.plan.count_nonzero()
        assert torch.equal(out.marginal_error[item], alone.marginal_error[0])
        assert torch.equal(out.num_iters[item], alone.num_iters[0])


@pytest.mark.parametrize(
    "lengths, D, calls",
    [([9] * 5, 8, [5]), ([9, 4] * 3, 8, [3, 3]), ([9, 4] * 3, 8000, [1] * 6), ([9, 9, 4], 8000, [2, 1])],
    ids=["equal", "sorted", "dear to sort", "together as they came"],
)
def test_equal_items_are_one_call(monkeypatch, lengths, D, calls):
    """Unless to sort them would move more than the calls are worth."""
    seen, attend = [], cpu.attend

    def counted(backend, problem):
        seen.append(len(problem.x))
        return attend(backend, problem)

    monkeypatch.setattr(cpu, "attend", counted)
    otfuse.sinkhorn_attend_varlen(**batch(lengths, lengths, D=D), num_iters=1, backend="cpu")
    assert seen == calls


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


def test_nothing_is_padded(monkeypatch):
    """Nothing is made that is larger than the longest item's plan or all tokens; padded, eight times as much is."""
    items = batch(LENGTHS_X, LENGTHS_Y)
    with Largest() as made:
        otfuse.sinkhorn_attend_varlen(**items, num_iters=2, backend="cpu")
    assert made.numbers == max(1000 * 40, sum(LENGTHS_X) * D)
    monkeypatch.setattr(cpu, "can_read", lambda offsets: False)
    with Largest() as made:
        otfuse.sinkhorn_attend_varlen(**items, num_iters=2, backend="cpu")
    assert made.numbers == 8 * 1000 * 40


@pytest.mark.parametrize("ends", [[0, 5, 3, 9], [1, 3, 6, 9], [0, 3, 6, 10]])
@pytest.mark.parametrize("side", ["x", "y"])
def test_offsets_that_are_none_are_refused(side, ends):
    items = batch([3, 3, 3], [3, 3, 3])
    items[f"cu_seqlens_{side}"] = torch.tensor(ends, dtype=torch.int32)
    message = f"cu_seqlens_{side} must not decrease, from 0 to T_{side} = 9; got {ends}"
    with pytest.raises(ValueError, match=re.escape(message)):
        otfuse.sinkhorn_attend_varlen(**items, backend="cpu")


# torch says so of the tokens' places, which vmap spreads over the copies; it looks them up all the same.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
def test_offsets_that_cannot_be_read_are_padded_for():
    """Many at a time, by vmap; the answer is the same within roundings."""
    items = batch([3, 4, 2], [2, 1, 3])
    many = torch.stack([items["cu_seqlens_x"], offsets([2, 3, 4])])

    def run(ends):
        return otfuse.sinkhorn_attend_varlen(**{**items, "cu_seqlens_x": ends}, num_iters=3, backend="cpu").x

    together = torch.func.vmap(run)(many)
    for one, ends in zip(together, many):
        torch.testing.assert_close(one, run(ends), rtol=0, atol=64 * torch.finfo(torch.float32).eps)
