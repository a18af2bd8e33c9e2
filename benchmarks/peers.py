"""Other ways to the same plan, or the same attended tokens, at the same number of rounds, in plain PyTorch.

Those of other packages are in ``packages.py``; who takes part in which measurement is in ``field.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cases import Case
from timing import Contender
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import otfuse
from otfuse.testing import per_item_log_domain

Attended = tuple[Tensor, Tensor]
Solve = Callable[[Tensor, float, int], Tensor]  # similarity [B, N, M], epsilon, rounds -> plan
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
HEAD = 64  # features of a head of ordinary attention


def per_item(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
    return per_item_log_domain(similarity, epsilon, num_iters)


def round_by_round(one_round: Callable[..., tuple[Tensor, Tensor]]) -> Solve:
    """Plans by two logsumexp a round and nothing else, as one writes it in an afternoon; uniform weights.

    ``one_round``, from log_kernel and log_v to log_u and log_v, may be compiled.
    """

    def solve(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
        log_kernel = similarity / epsilon  # [B, N, M]
        log_v = torch.zeros_like(similarity[:, 0])
        for _ in range(num_iters):
            log_u, log_v = one_round(log_kernel, log_v)
        return torch.exp(log_kernel + log_u[:, :, None] + log_v[:, None, :])

    return solve


def log_domain_round(log_kernel: Tensor, log_v: Tensor) -> tuple[Tensor, Tensor]:
    _, N, M = log_kernel.shape
    log_u = -math.log(N) - torch.logsumexp(log_kernel + log_v[:, None, :], 2)
    return log_u, -math.log(M) - torch.logsumexp(log_kernel + log_u[:, :, None], 1)


batched_log_domain = round_by_round(log_domain_round)


def batched_scaling(cost: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The usual batched loop in PyTorch; autograd goes through it."""
    B, N, M = cost.shape
    kernel = torch.exp(-cost / epsilon)
    v = torch.ones(B, M, 1, dtype=cost.dtype, device=cost.device)
    for _ in range(num_iters):
        u = (1 / N) / torch.bmm(kernel, v)
        v = (1 / M) / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT


def cross_attention(x: Tensor, y: Tensor) -> Attended:
    """What ordinary attention costs on the same tokens, each side attending to the other, without projections."""
    return x + _multi_head(x, y), y + _multi_head(y, x)


def three_products(x: Tensor, y: Tensor) -> Attended:
    """The matrix products that no layer can do without."""
    similarity = torch.bmm(x, y.mT)
    return torch.bmm(similarity, y), torch.bmm(similarity.mT, x)


def bound(op: str, solve: Solve, case: Case) -> Callable[..., Sequence[Tensor]]:
    """Tokens to attended tokens, or a cost to its plan, in float32, with ``solve`` from similarity to plan."""

    def attend(x: Tensor, y: Tensor) -> Attended:
        wide_x, wide_y = x.float(), y.float()
        plan = solve(otfuse.similarity_matrix(wide_x, wide_y), case.epsilon, case.T)
        return torch.baddbmm(wide_x, plan, wide_y).to(x.dtype), torch.baddbmm(wide_y, plan.mT, wide_x).to(y.dtype)

    def plan(cost: Tensor) -> tuple[Tensor]:
        return (solve(-cost.float(), case.epsilon, case.T).to(cost.dtype),)

    return attend if op == "attend" else plan


def with_gradient(call: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """Forward and backward: inputs and as many gradients sent to the outputs in, gradients of the inputs out."""

    def gradients(*inputs_and_sent: Tensor) -> Sequence[Tensor]:
        inputs, sent = inputs_and_sent[: len(inputs_and_sent) // 2], inputs_and_sent[len(inputs_and_sent) // 2 :]
        # Leaves made here: those of another stream could not be waited for while a graph is captured.
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(call(*leaves), leaves, sent)

    return gradients


def _multi_head(queries: Tensor, tokens: Tensor) -> Tensor:
    head = HEAD if queries.shape[2] % HEAD == 0 else queries.shape[2]
    q, k = (t.unflatten(2, (-1, head)).transpose(1, 2) for t in (queries, tokens))  # [B, heads, tokens, head]
    return scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Compiler:
    """torch.compile with a limit on the time spent on it in all.

    On a CPU a round is compiled and called in a loop: fifty rounds written out keep a C++ compiler busy for minutes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds_left = seconds
        self._last: tuple[Any, ...] = ()  # what the compiled code at hand is for

    def contender(self, name: str, op: str, case: Case, wrap: Wrap, device: torch.device) -> Contender:
        """Compiled by its first call, backward too."""
        compiled: list[Callable[..., Any]] = []

        def call(*inputs: Tensor) -> Any:
            if not compiled:
                compiled.append(self._compiled(partial(self._make, op, case, wrap, device), inputs))
            return compiled[0](*inputs)

        return Contender(name, call, note="a round compiled" if device.type == "cpu" else "")

    def _make(self, op: str, case: Case, wrap: Wrap, device: torch.device) -> Callable[..., Any]:
        if device.type == "cpu":
            return wrap(bound(op, round_by_round(torch.compile(log_domain_round, dynamic=False)), case))
        return wrap(torch.compile(bound(op, batched_log_domain, case), dynamic=False))

    def _compiled(self, make: Callable[[], Callable[..., Any]], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        if self.seconds_left <= 0:
            raise TimeoutError("the time for compiling is spent (--compile-seconds)")
        start = time.perf_counter()
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if shapes != self._last or inputs[0].device.type != "cpu":
            torch._dynamo.reset()  # beyond a few shapes of one function it would quietly stop compiling
        self._last, compiled = shapes, make()
        try:
            compiled(*inputs)
        finally:
            self.seconds_left -= time.perf_counter() - start
        return compiled
