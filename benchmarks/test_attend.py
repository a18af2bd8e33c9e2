"""``sinkhorn_attend`` in all, beside the three matrix products that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPU_CASES, Case
from torch import Tensor

import otfuse
from otfuse.testing import clustered_tokens, specified_attend

pytest.importorskip("numba", reason="the cpu backend needs numba: pip install 'otfuse[cpu]'")


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_attend(case: Case, compare: Callable[..., None]) -> None:
    x, y = clustered_tokens(case.B, case.N, case.M, case.D)
    options = {"epsilon": case.epsilon, "num_iters": case.T}
    exact = specified_attend(x.double(), y.double(), **options)
    in_float32 = specified_attend(x, y, **options)

    def products() -> tuple[Tensor, Tensor]:
        similarity = torch.bmm(x, y.mT)
        return torch.bmm(similarity, y), torch.bmm(similarity.mT, x)

    def difference(out: Any) -> float:
        if not isinstance(out, otfuse.SinkhornAttendOutput):
            return float("nan")  # the bare products are no answer to check
        return max(float((out.x - exact.x).abs().max()), float((out.y - exact.y).abs().max()))

    compare(
        f"attend {case}",
        {
            "otfuse cpu": lambda: otfuse.sinkhorn_attend(x, y, **options, backend="cpu"),
            "otfuse torch": lambda: otfuse.sinkhorn_attend(x, y, **options, backend="torch"),
            "three matrix products alone": products,
        },
        difference,
        allowed=2 * difference(in_float32) + torch.finfo(torch.float32).eps * float(exact.x.abs().max()),
    )
