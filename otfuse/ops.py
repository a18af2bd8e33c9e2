"""The registered ops: schemas, fake kernels, derivatives, batching rules. Imports torch only.

``otfuse::sinkhorn_cpu`` solves a batch, ``otfuse::sinkhorn_cpu_backward`` is its gradient (and can itself be
differentiated, by way of plain PyTorch). A wrapper class would cost more at every call than these do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otfuse.backends import cpu
from otfuse.backends import torch as plain

_library = torch.library.Library("otfuse", "DEF")
_library.define(
    "sinkhorn_cpu(Tensor similarity, Tensor a, Tensor b, float epsilon, int num_iters, float tol, bool implicit, "
    "bool history) -> (Tensor plan, Tensor f, Tensor g, Tensor marginal_error, Tensor num_iters, Tensor u_history, "
    "Tensor v_history, Tensor forms, Tensor shifts)"
)
_library.define(
    "sinkhorn_cpu_backward(Tensor similarity, Tensor a, Tensor b, float epsilon, int num_iters, float tol, "
    "bool implicit, Tensor plan, Tensor rounds, Tensor u_history, Tensor v_history, Tensor forms, Tensor shifts, "
    "Tensor grad_plan, Tensor grad_f, Tensor grad_g) -> (Tensor, Tensor, Tensor)"
)
_library.impl("sinkhorn_cpu", cpu.launch_sinkhorn, "CPU")
_library.impl("sinkhorn_cpu_backward", cpu.launch_sinkhorn_backward, "CPU")


@torch.library.register_fake("otfuse::sinkhorn_cpu")
def _(
    similarity: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    num_iters: int,
    tol: float,
    implicit: bool,
    history: bool,
) -> tuple[Tensor, ...]:
    return cpu.new_outputs(similarity, num_iters if history else 0)


@torch.library.register_fake("otfuse::sinkhorn_cpu_backward")
def _(similarity: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.new_gradients(similarity, a, b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    similarity, a, b, *ctx.options, _ = inputs
    plan, _, _, marginal_error, rounds, *history = output
    ctx.mark_non_differentiable(marginal_error, rounds, *history)
    ctx.save_for_backward(similarity, a, b, plan, rounds, *history)


def _backward(
    ctx: Any, grad_plan: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    similarity, a, b, plan, *saved = ctx.saved_tensors
    implicit = ctx.options[3]
    if not implicit and saved[1].shape[1] == 0:  # asked for a gradient that could not be foreseen (a transform's)
        plan, _, _, _, *saved = torch.ops.otfuse.sinkhorn_cpu(similarity, a, b, *ctx.options, True)
    grads = (
        torch.zeros_like(plan) if grad_plan is None else grad_plan,
        torch.zeros_like(a) if grad_f is None else grad_f,
        torch.zeros_like(b) if grad_g is None else grad_g,
    )
    gradients = torch.ops.otfuse.sinkhorn_cpu_backward(similarity, a, b, *ctx.options, plan, *saved, *grads)
    return (*gradients, *[None] * 5)


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
    """Gradient of the gradient, by autograd through plain PyTorch."""
    with torch.enable_grad():
        values = [tensor.detach().requires_grad_() for tensor in saved]
        similarity, a, b, *outer = values
        solution = plain.solve(
            lambda s, a, b: plain.scaling(s, a, b, epsilon, num_iters, tol),
            similarity,
            plain.Marginals(a, b, masked=True),
        )
        outputs = [_no_infinity(output) for output in solution[:3]]
        first = torch.autograd.grad(outputs, values[:3], outer, create_graph=True)
        wanted = [(g, grad) for g, grad in zip(first, grads) if grad is not None]
        second = torch.autograd.grad([g for g, _ in wanted], values, [grad for _, grad in wanted], allow_unused=True)
    return (*second[:3], *[None] * 10, *second[3:])


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


torch.library.register_autograd("otfuse::sinkhorn_cpu", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "otfuse::sinkhorn_cpu_backward", _double_backward, setup_context=_setup_backward_context
)
torch.library.register_vmap("otfuse::sinkhorn_cpu", _batched(torch.ops.otfuse.sinkhorn_cpu))
torch.library.register_vmap("otfuse::sinkhorn_cpu_backward", _batched(torch.ops.otfuse.sinkhorn_cpu_backward))
