"""The registered ops: schemas, fake kernels, derivatives, batching rules. Imports torch only.

``otfuse::sinkhorn_cpu`` solves a batch of similarities, ``otfuse::sinkhorn_tokens_cpu`` one of tokens (it makes the
similarity as well); ``otfuse::sinkhorn_cpu_backward`` is the gradient of the solve for both, and can itself be
differentiated, by way of plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otfuse import attention
from otfuse.backends import cpu
from otfuse.backends import torch as plain
from otfuse.registration import register_autograd

_OPTIONS = "float epsilon, int num_iters, float tol, bool implicit"
_SOLUTION = "Tensor plan, Tensor f, Tensor g, Tensor marginal_error, Tensor num_iters, Tensor history"

_library = torch.library.Library("otfuse", "DEF")
_library.define(f"sinkhorn_cpu(Tensor similarity, Tensor a, Tensor b, {_OPTIONS}, bool history) -> ({_SOLUTION})")
_library.define(
    f"sinkhorn_tokens_cpu(Tensor x, Tensor y, Tensor a, Tensor b, bool cosine, {_OPTIONS}, bool history) "
    f"-> (Tensor similarity, {_SOLUTION})"
)
_library.define(
    f"sinkhorn_cpu_backward(Tensor similarity, Tensor a, Tensor b, {_OPTIONS}, Tensor plan, Tensor rounds, "
    "Tensor history, Tensor grad_plan, Tensor grad_f, Tensor grad_g) -> (Tensor, Tensor, Tensor)"
)
_library.impl("sinkhorn_cpu", cpu.launch_sinkhorn, "CPU")
_library.impl("sinkhorn_tokens_cpu", cpu.launch_sinkhorn_tokens, "CPU")
_library.impl("sinkhorn_cpu_backward", cpu.launch_sinkhorn_backward, "CPU")


@torch.library.register_fake("otfuse::sinkhorn_cpu")
def _(similarity: Tensor, a: Tensor, b: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return cpu.new_outputs(similarity, options[1], options[4])


@torch.library.register_fake("otfuse::sinkhorn_tokens_cpu")
def _(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cosine: bool, *options: Any) -> tuple[Tensor, ...]:
    similarity = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    return similarity, *cpu.new_outputs(similarity, options[1], options[4])


@torch.library.register_fake("otfuse::sinkhorn_cpu_backward")
def _(similarity: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.new_gradients(similarity, a, b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    similarity, a, b, *ctx.options, _ = inputs
    _keep(ctx, (a, b), similarity, output)


def _setup_tokens_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, cosine, *ctx.options, _ = inputs
    ctx.kind = "cosine" if cosine else "dot"
    _keep(ctx, (a, b), output[0], output[1:], x, y)


def _keep(
    ctx: Any, weights: tuple[Tensor, Tensor], similarity: Tensor, solution: tuple[Tensor, ...], *tokens: Tensor
) -> None:
    plan, _, _, marginal_error, rounds, history = solution
    ctx.mark_non_differentiable(marginal_error, rounds, history)
    ctx.save_for_backward(*tokens, similarity, *weights, plan, rounds, history)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return (*_solve_gradient(ctx.saved_tensors, ctx.options, grads), *[None] * 5)


def _tokens_backward(ctx: Any, grad_similarity: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    x, y, similarity, *_ = ctx.saved_tensors
    grad, grad_a, grad_b = _solve_gradient(ctx.saved_tensors[2:], ctx.options, grads)
    grad = grad if grad_similarity is None else grad + grad_similarity
    return (*attention.similarity_gradient(grad, similarity, x, y, ctx.kind), grad_a, grad_b, *[None] * 6)


def _solve_gradient(
    saved: tuple[Tensor, ...], options: list[Any], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    similarity, a, b, plan, rounds, history = saved
    implicit = options[3]
    if not implicit and history.shape[1] == 0:  # a transform's gradient, which could not be foreseen
        plan, _, _, _, rounds, history = torch.ops.otfuse.sinkhorn_cpu(similarity, a, b, *options, True)
    incoming = [torch.zeros_like(t) if grad is None else grad for t, grad in zip((plan, a, b), grads)]
    return torch.ops.otfuse.sinkhorn_cpu_backward(similarity, a, b, *options, plan, rounds, history, *incoming)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[3:7]
    ctx.save_for_backward(*inputs[:3], *inputs[-3:])


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    epsilon, num_iters, tol, implicit = ctx.options
    if implicit:
        raise RuntimeError('grad="implicit" has first derivatives only; pass grad="unroll" to differentiate twice')
    return _second_order(ctx.saved_tensors, epsilon, num_iters, tol if tol > 0 else None, grads)


def _second_order(
    saved: tuple[Tensor, ...],
    epsilon: float,
    num_iters: int,
    tol: float | None,
    grads: tuple[Tensor | None, ...],
) -> tuple[Any, ...]:
    """Gradient of the gradient, by autograd through plain PyTorch; torch.func, so that transforms go through."""

    def solve(similarity: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        solution = plain.solve(
            lambda s, a, b: plain.scaling(s, a, b, epsilon, num_iters, tol),
            similarity,
            plain.Marginals(a, b, masked=True),
        )
        return tuple(_no_infinity(output) for output in solution[:3])

    def first(similarity: Tensor, a: Tensor, b: Tensor, *outer: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(solve, similarity, a, b)[1](outer)

    gradient, pull_back = torch.func.vjp(first, *saved)[:2]
    second = pull_back(tuple(torch.zeros_like(g) if grad is None else grad for g, grad in zip(gradient, grads)))
    return (*second[:3], *[None] * 7, *second[3:])


def _no_infinity(potential: Tensor) -> Tensor:
    """-inf at padding is a constant; a zero says the same and has no NaN in its derivatives."""
    return torch.where(torch.isinf(potential), 0, potential)


def _batched(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    """vmap by folding the extra dimension into the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        folded = []
        for value, dim in zip(args, in_dims):
            if isinstance(value, Tensor):
                spread = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
                folded.append(spread.flatten(0, 1))
            else:
                folded.append(value)
        outputs = op(*folded)
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outputs), (0,) * len(outputs)

    return rule


register_autograd(_library, "sinkhorn_cpu", _backward, setup_context=_setup_context)
register_autograd(_library, "sinkhorn_tokens_cpu", _tokens_backward, setup_context=_setup_tokens_context)
register_autograd(_library, "sinkhorn_cpu_backward", _double_backward, setup_context=_setup_backward_context)
for _name in ("sinkhorn_cpu", "sinkhorn_tokens_cpu", "sinkhorn_cpu_backward"):
    torch.library.register_vmap(f"otfuse::{_name}", _batched(getattr(torch.ops.otfuse, _name)))
