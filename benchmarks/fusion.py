"""The whole operator as benchmarks, profile and sanitizer run it: its inputs, its answer, the check of the answer.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from torch import Tensor

import otfuse
from otfuse.testing import assert_as_accurate_as_reference, clustered_tokens, specified_attend

FORWARD = "forward"  # beside the gradient modes: no gradient at all
MODES = (FORWARD, "unroll", "implicit", "detach")

Attend = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # x, y -> x out, y out


@dataclass(frozen=True)
class Job:
    """A case in a dtype, forward alone or with the backward of a gradient mode."""

    case: Case
    mode: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.case} {self.mode} {str(self.dtype).removeprefix('torch.')}"

    @property
    def options(self) -> dict[str, Any]:
        return {"epsilon": self.case.epsilon, "num_iters": self.case.T}

    def traffic(self) -> int:
        """Bytes that must move between chip and memory, once each."""
        forward = self.case.attend_traffic(self.dtype.itemsize)
        return forward if self.mode == FORWARD else forward + self.case.backward_traffic(self.dtype.itemsize)

    def flops(self) -> int:
        forward = self.case.attend_flops()
        return forward if self.mode == FORWARD else forward + self.case.backward_flops(self.mode == "unroll")


def inputs(job: Job, device: torch.device | str) -> tuple[Tensor, ...]:
    """x, y, and the gradients that come back for both outputs (needed by the modes with a backward)."""
    case = job.case
    tokens = clustered_tokens(case.B, case.N, case.M, case.D, dtype=job.dtype, device=device)
    if job.mode == FORWARD:
        return tokens
    generator = torch.Generator().manual_seed(1)
    return *tokens, *(torch.randn(t.shape, generator=generator).to(device, job.dtype) for t in tokens)


def run(job: Job, attend: Attend, x: Tensor, y: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    """Both outputs and, with a backward, the gradients of both tokens."""
    if job.mode == FORWARD:
        with torch.no_grad():
            return tuple(attend(x, y))
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    out = attend(x, y)
    return *(t.detach() for t in out), *torch.autograd.grad(out, (x, y), grads)


def ours(job: Job, backend: str) -> Attend:
    grad = "unroll" if job.mode == FORWARD else job.mode
    return lambda x, y: otfuse.sinkhorn_attend(x, y, **job.options, grad=grad, backend=backend)[:2]


def specified(job: Job) -> Attend:
    """The specification in the dtype of the tokens; for the gradients that it does not have, the torch backend."""
    if job.mode in (FORWARD, "unroll"):
        return lambda x, y: specified_attend(x, y, **job.options)[:2]
    return ours(job, "torch")


class Judge:
    """Compares answers to a job with float64, by the rule of the tests."""

    def __init__(self, job: Job, tensors: tuple[Tensor, ...]) -> None:
        self.exact = run(job, specified(job), *(t.double() for t in tensors))
        self.reference = run(job, specified(job), *tensors)

    def check(self, answer: tuple[Tensor, ...]) -> None:
        """Raise AssertionError where an answer is off by more than twice the reference and a rounding."""
        names = ("x", "y", "gradient of x", "gradient of y")
        for name, *triple in zip(names, answer, self.reference, self.exact):
            assert_as_accurate_as_reference(*triple, what=name)

    def error(self, answer: tuple[Tensor, ...]) -> float:
        """The largest difference from float64 in any part."""
        return max(float((part.double() - exact).abs().max()) for part, exact in zip(answer, self.exact))
