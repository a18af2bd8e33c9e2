"""The solver alone (cost given, plan out) and its gradient, beside other people's solvers, on a CPU.

Every contender is checked against the float64 specification before any is timed. Clustered tokens: random
ones converge in a few rounds and flatter everybody.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CPU_CASES, Case
from peers import batched_scaling, solvers
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, specified_sinkhorn

pytest.importorskip("numba", reason="the cpu backend needs numba: pip install 'otfuse[cpu]'")


def clustered_cost(case: Case) -> Tensor:
    return 1 - otfuse.similarity_matrix(*clustered_tokens(case.B, case.N, case.M, case.D))


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_forward(case: Case, compare: Callable[..., None]) -> None:
    cost = clustered_cost(case)
    exact = specified_sinkhorn(cost.double(), case.epsilon, num_iters=case.T).plan
    in_float32 = specified_sinkhorn(cost, case.epsilon, num_iters=case.T).plan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages deprecate at import is not ours
        others, absent = solvers(cost, case.epsilon, case.T)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: otfuse.sinkhorn(cost, case.epsilon, num_iters=case.T, backend=backend).plan

    compare(
        f"solve {case}",
        {"otfuse cpu": ours("cpu"), "otfuse torch": ours("torch"), **others},
        lambda plan: float(np.abs(np.asarray(plan) - exact.numpy()).max()),
        allowed=2 * float((in_float32 - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.max()),
        gflop=case.solve_flops() / 1e9,
        traffic_mb=case.solve_traffic() / 1e6,
        absent=absent,
    )


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_forward_and_backward(case: Case, grad: str, compare: Callable[..., None]) -> None:
    cost = clustered_cost(case)
    weight = torch.randn(cost.shape, generator=torch.Generator().manual_seed(1))

    def gradient(solve: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        leaf = cost.to(dtype, copy=True).requires_grad_()
        (solve(leaf) * weight).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def specified(cost: Tensor) -> Tensor:
        return specified_sinkhorn(cost, case.epsilon, num_iters=case.T).plan

    exact = gradient(specified, torch.float64)
    rounding = 2 * float((gradient(specified) - exact).abs().max())
    # Away from convergence the two kinds of gradient differ; by how much stands in the row.
    allowed = rounding if grad == "unroll" else float("inf")

    def ours(cost: Tensor) -> Tensor:
        return otfuse.sinkhorn(cost, case.epsilon, num_iters=case.T, grad=grad, backend="cpu").plan

    def loop(cost: Tensor) -> Tensor:
        return batched_scaling(cost, case.epsilon, case.T)

    def difference(result: Any) -> float:
        return float((result - exact).abs().max())

    compare(
        f"solve, {grad} gradient {case}",
        {f"otfuse cpu, {grad}": lambda: gradient(ours), "autograd through the batched loop": lambda: gradient(loop)},
        difference,
        allowed=allowed,
        largest_gradient=float(exact.abs().max()),
    )
