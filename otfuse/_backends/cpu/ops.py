"""The ops of the CPU backend: schemas, fake kernels, derivatives, batching rules.

``otfuse::sinkhorn_cpu`` solves a batch of similarities or costs, ``otfuse::sinkhorn_tokens_cpu`` one of tokens (it
makes the similarity as well); ``otfuse::sinkhorn_cpu_backward`` is the gradient of the solve for both, and can itself
be differentiated, by way of plain PyTorch. ``launch.py`` registers what runs behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otfuse import _attention as attention
from otfuse._backends.torch.solver import scaling, solve
from otfuse._ops import OPTIONS, Derivatives, SecondDerivatives, library, solve_options
from otfuse.kernels.constants import IMPLICIT

SOLUTION = "Tensor plan, Tensor f, Tensor g, Tensor marginal_error, Tensor num_iters, Tensor history"

library.define(f"sinkhorn_cpu(Tensor values, Tensor a, Tensor b, {OPTIONS}, bool history) -> ({SOLUTION})")
library.define(
    f"sinkhorn_tokens_cpu(Tensor x, Tensor y, Tensor a, Tensor b, bool cosine, {OPTIONS}, bool history) "
    f"-> (Tensor similarity, {SOLUTION})"
)
library.define(
    f"sinkhorn_cpu_backward(Tensor values, Tensor a, Tensor b, {OPTIONS}, Tensor plan, Tensor rounds, "
    "Tensor history, Tensor grad_plan, Tensor grad_f, Tensor grad_g) -> (Tensor, Tensor, Tensor)"
)


def new_solution(values: Tensor, num_iters: int, history: bool) -> tuple[Tensor, ...]:
    """Room for SOLUTION; the history [B, 1 + T, N + M] has no rounds unless it is wanted.

    It is in float64: logarithms of scalings reach thousands at small epsilon, and what float32 would round away
    there is a factor on the gradient.
    """
    B, N, M = values.shape
    new = values.new_empty
    kept = 1 + num_iters if history else 0
    return (
        new((B, N, M)), new((B, N)), new((B, M)), new((B,)), new((B,), dtype=torch.int32),
        new((B, kept, N + M), dtype=torch.float64),
    )  # fmt: skip


def new_gradients(values: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of values, a and b."""
    return values.new_empty(values.shape), a.new_empty(a.shape), b.new_empty(b.shape)


@torch.library.register_fake("otfuse::sinkhorn_cpu")
def _(values: Tensor, a: Tensor, b: Tensor, numbers: Tensor, num_iters: int, *options: Any) -> tuple[Tensor, ...]:
    return new_solution(values, num_iters, options[-1])


@torch.library.register_fake("otfuse::sinkhorn_tokens_cpu")
def _(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cosine: bool, numbers: Tensor, num_iters: int, *options: Any
) -> tuple[Tensor, ...]:
    similarity = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    return similarity, *new_solution(similarity, num_iters, options[-1])


@torch.library.register_fake("otfuse::sinkhorn_cpu_backward")
def _(values: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_gradients(values, a, b)


class _Solve(Derivatives):
    """Of ``sinkhorn_cpu``."""

    name, tensors, options, outputs = "sinkhorn_cpu", 3, 3, 3

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, a, b, *ctx.options, _ = inputs
        self.save(ctx, output, values, a, b)

    def save(self, ctx: Any, solution: Sequence[Tensor], *inputs: Tensor) -> None:
        plan, _, _, marginal_error, rounds, history = solution
        ctx.mark_non_differentiable(marginal_error, rounds, history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, plan, rounds, history)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (*self.gradient(ctx.saved_tensors, ctx.options, grads), *[None] * 4)

    def gradient(
        self, saved: Sequence[Tensor], options: list[Any], grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, a, b, plan, rounds, history = saved
        if options[2] != IMPLICIT and history.shape[1] == 0:  # a transform's gradient, which could not be foreseen
            plan, _, _, _, rounds, history = torch.ops.otfuse.sinkhorn_cpu(values, a, b, *options, True)
        incoming = [torch.zeros_like(t) if grad is None else grad for t, grad in zip((plan, a, b), grads)]
        return torch.ops.otfuse.sinkhorn_cpu_backward(values, a, b, *options, plan, rounds, history, *incoming)

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        values, a, b = inputs
        assert values is not None and a is not None and b is not None
        sign, solving = options[0][0].sign(), solve_options(*options)
        p = attention.Marginals(a, b, masked=True)
        return solve(lambda s, a, b: scaling(s, a, b, solving), sign * values, p)[:3]


class _SolveTokens(_Solve):
    """Of ``sinkhorn_tokens_cpu``."""

    name = "sinkhorn_tokens_cpu"

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, a, b, cosine, *ctx.options, _ = inputs
        ctx.kind = "cosine" if cosine else "dot"
        similarity, *solution = output
        self.save(ctx, solution, x, y, similarity, a, b)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, y, *solved = ctx.saved_tensors
        grad, grad_a, grad_b = self.gradient(solved, ctx.options, grads[1:])
        grad = grad if grads[0] is None else grad + grads[0]
        return (*attention.similarity_gradient(grad, solved[0], x, y, ctx.kind), grad_a, grad_b, *[None] * 5)


for _derivatives in (_Solve(), _SolveTokens(), SecondDerivatives(_Solve())):
    _derivatives.register()
