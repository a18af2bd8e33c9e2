"""Run by tests/test_tpc_op.py in a process of its own, since torch takes up a new device only when it starts.

From Python to the emulated kernel everything is what a Gaudi would see, but for the graph compiler in between.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from gaudi_device import HpuTensor, stand_in_gaudi
from gaudi_glue import KERNELS, PRODUCTS, products_around_kernels, signature
from gaudi_libraries import libraries, plugin

import otfuse
from otfuse._backends.select import select
from otfuse._backends.tpc import library as _tpc_library
from otfuse._problem import SolveOptions, cost_problem
from otfuse.testing import clustered_tokens

ctypes.CDLL(str(plugin()))  # before torch asks what devices there are
HPU = torch._C.DispatchKey.HPU


@pytest.fixture
def gaudi(monkeypatch):
    with stand_in_gaudi(monkeypatch) as gaudi:
        torch.ops.load_library(str(libraries()[1]))
        yield gaudi


def to_hpu(tensor):
    moved = HpuTensor(tensor.detach().clone())
    return moved.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_an_op_gives_what_the_emulator_gives(gaudi, kernel, dtype):
    """C++ op, parameters, glue, index space, kernel: the bits of the emulator called from Python."""
    wanted = signature(kernel, dtype, **({"B": 66, "N": 3, "M": 5} if kernel == "small" else {"B": 2, "N": 18, "M": 7}))
    random = torch.Generator().manual_seed(0)
    inputs = []
    for name, spec in wanted.inputs.items():
        made = torch.rand(spec.shape, generator=random).to(spec.dtype)
        if name in ("a", "b"):
            made /= made.sum(0 if kernel == "small" else 1, keepdim=True)
        inputs.append(torch.zeros(spec.shape) if name == "form" else made)
    if "history" in wanted.inputs:
        made = torch.ops.otfuse_tpc.sinkhorn_history(*inputs[:4], -10.0, 3, 0.0, 3)
        inputs[4], inputs[5] = made[3], made[4]
    op = getattr(torch.ops.otfuse_tpc, kernel).default
    results = op._op_dk(HPU, *inputs, *wanted.scalars.values())
    gaudi.check()
    expected = op(*inputs, *wanted.scalars.values())
    assert gaudi.guids == [f"otfuse_{kernel}"]
    for name, result, should in zip(wanted.outputs, *map(as_tuple, (results, expected))):
        assert result.dtype == should.dtype
        if name != "history":  # which has parts that nobody writes
            assert torch.equal(result, should), name


class TestRefusals:
    def inputs(self, **changed):
        made = {"values": torch.rand(2, 5, 7), "a": torch.rand(2, 7), "b": torch.rand(2, 5), "form": torch.zeros(2, 1)}
        return [*{**made, **changed}.values(), -10.0, 3, 0.0]

    @pytest.mark.parametrize(
        "changed, said",
        [
            ({"values": torch.rand(2, 5, 7).double()}, "takes float32 or bfloat16; got Double"),
            ({"a": torch.rand(2, 7).bfloat16()}, "a must be Float; got BFloat16"),
            ({"a": torch.rand(2, 8)}, "dimension 1 of a must be N = 7; got 8"),
            ({"b": torch.rand(5)}, "b must have 2 dimensions; got 1"),
            ({"form": torch.zeros(2, 2)}, "dimension 1 of form must be 1 = 1; got 2"),
            ({"values": torch.rand(2, 7, 5).mT}, "values must be contiguous; pass it by .contiguous()"),
        ],
    )
    def test_a_wrong_tensor_is_named(self, gaudi, changed, said):
        with pytest.raises(RuntimeError, match=re.escape(said)):
            torch.ops.otfuse_tpc.sinkhorn.default._op_dk(HPU, *self.inputs(**changed))
        assert gaudi.guids == []


class TestTensorsOnHpu:
    """The public functions with tensors that say 'hpu'."""

    def problem(self, dtype=torch.float32, grad=True):
        x, y = clustered_tokens(2, 18, 7, 24, seed=3)
        return x.to(dtype).requires_grad_(grad), y.to(dtype).requires_grad_(grad)

    def test_auto_takes_the_kernels(self, gaudi):
        problem = cost_problem(to_hpu(torch.zeros(1, 2, 2)), None, None, SolveOptions(0.1, 1))
        assert select(problem, "auto").name == "tpc"

    @pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    def test_forward_and_gradient_are_the_emulators(self, gaudi, dtype, grad):
        tokens = self.problem(dtype)
        weights = torch.tensor([[True] * 16 + [False] * 2, [True] * 18])
        moved = [to_hpu(t) for t in tokens]
        ours = otfuse.sinkhorn_attend(*moved, 0.1, a=to_hpu(weights), num_iters=6, grad=grad, return_plan=True)
        theirs = otfuse.sinkhorn_attend(
            *tokens, 0.1, a=weights, num_iters=6, grad=grad, return_plan=True, backend="tpc"
        )
        for name, a, b in zip(ours._fields, ours, theirs):
            assert a.device.type == "hpu" and torch.equal(a.detach().numbers, b), name
        sum((o.x.float() ** 2).mean() + (o.y.float() ** 3).mean() for o in (ours,)).backward()
        sum((o.x.float() ** 2).mean() + (o.y.float() ** 3).mean() for o in (theirs,)).backward()
        for a, b in zip(moved, tokens):
            assert torch.equal(a.grad.numbers, b.grad)
        backward = {"unroll": ["otfuse_unroll"], "implicit": ["otfuse_implicit"], "detach": []}[grad]
        forward = "otfuse_sinkhorn" if grad == "detach" else "otfuse_sinkhorn_history"
        assert gaudi.guids == [forward, *backward]

    def test_a_cost_and_many_small_ones(self, gaudi):
        cost = torch.rand(70, 4, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plan = otfuse.sinkhorn(to_hpu(cost), 0.05).plan
            assert torch.equal(plan.numbers, otfuse.sinkhorn(cost, 0.05, backend="tpc").plan)
        assert gaudi.guids == ["otfuse_small"]
        otfuse.sinkhorn(to_hpu(torch.rand(1, 9, 6)), 0.05)
        assert gaudi.guids[1:] == ["otfuse_survey", "otfuse_sinkhorn"]

    def test_what_does_not_fit_goes_to_torch(self, gaudi):
        cost = torch.rand(1, 300, 80)
        plan = otfuse.sinkhorn(to_hpu(cost), 0.5, num_iters=3).plan
        assert plan.device.type == "hpu" and gaudi.guids == []
        with pytest.raises(otfuse.BackendError, match="300 x 80 does not fit in local memory"):
            otfuse.sinkhorn(to_hpu(cost), 0.5, backend="tpc")

    def test_without_the_libraries_it_says_so(self, gaudi, monkeypatch, tmp_path):
        monkeypatch.setattr(_tpc_library, "folder", lambda: tmp_path)
        with pytest.raises(otfuse.BackendError, match=r"libotfuse_hpu\.so \(OTFUSE_BUILD_TPC=1"):
            otfuse.sinkhorn(to_hpu(torch.rand(1, 3, 3)), 0.5, backend="tpc")


class TestGraphs:
    """The products stand beside the kernels, for the graph compiler to see: none is hidden in an op of ours."""

    def test_products_around_the_kernels(self, gaudi):
        x, y = (to_hpu(t.requires_grad_()) for t in clustered_tokens(2, 18, 7, 24, seed=3))
        HpuTensor.called.clear()
        out = otfuse.sinkhorn_attend(x, y, 0.1, num_iters=5)
        (out.x.square().sum() + out.y.square().sum()).backward()
        assert products_around_kernels(HpuTensor.called) == PRODUCTS


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)
