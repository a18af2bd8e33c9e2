"""The ops: schemas, fake kernels, derivatives, batching rules. Imports torch and nothing of a backend.

``otfuse::sinkhorn_cpu`` solves a batch of similarities or costs, ``otfuse::sinkhorn_tokens_cpu`` one of tokens (it
makes the similarity as well); ``otfuse::sinkhorn_cpu_backward`` is the gradient of the solve for both, and can itself
be differentiated, by way of plain PyTorch. Backends register what runs behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from otfuse import attention
from otfuse.registration import may_differentiate, register_autograd

# numbers: scale and tol, made by ``numbers``. scale: what values are multiplied by for the log kernel, 1 / epsilon for
# similarities, -1 / epsilon for costs. tol: below zero for none.
OPTIONS = "Tensor numbers, SymInt num_iters, bool implicit"
SOLUTION = "Tensor plan, Tensor f, Tensor g, Tensor marginal_error, Tensor num_iters, Tensor history"

# A launch on a GPU has the numbers in its kernels' parameters, and a CUDA graph that torch.compile made would stay with
# those of its first run. Torch without this tag makes no CUDA graph of what computes on the CPU as well.
WITH_NUMBERS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)

NUMBERS = ("numbers", "temperature")  # what arguments that ``numbers`` makes are called

library = torch.library.Library("otfuse", "DEF")
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


def numbers(*values: float) -> Tensor:
    """Python numbers as an op takes them: a float64 tensor [len(values)] on the CPU.

    A number that changes between calls of a compiled function is a symbol there. As a parameter of an op it would be
    baked into the graph; in tensor arithmetic it becomes an input.
    """
    if not is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + value for value in values])


def argument_names(op: Any) -> list[str]:
    return [argument.name for argument in op.default._schema.arguments]


def implement(name: str, launch: Callable[..., Any], key: str) -> None:
    """``launch`` behind an op that takes ``numbers, num_iters``; itself it takes scale, num_iters and tol there."""
    place = argument_names(getattr(torch.ops.otfuse, name)).index("numbers")

    def run(*args: Any) -> Any:
        scale, tol = args[place].tolist()  # on the CPU: no device is waited for
        return launch(*args[:place], scale, args[place + 1], tol, *args[place + 2 :])

    library.impl(name, run, key)


def call(op: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """``op(*args)``, past autograd where it has nothing to record: that alone costs some 15 µs."""
    if is_compiling() or may_differentiate(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, a, b, *ctx.options, _ = inputs
    _keep(ctx, output, values, a, b)


def _setup_tokens_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, cosine, *ctx.options, _ = inputs
    ctx.kind = "cosine" if cosine else "dot"
    similarity, *solution = output
    _keep(ctx, solution, x, y, similarity, a, b)


def _keep(ctx: Any, solution: Sequence[Tensor], *inputs: Tensor) -> None:
    plan, _, _, marginal_error, rounds, history = solution
    ctx.mark_non_differentiable(marginal_error, rounds, history)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, plan, rounds, history)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return (*_solve_gradient(ctx.saved_tensors, ctx.options, grads), *[None] * 4)


def _tokens_backward(ctx: Any, grad_similarity: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    x, y, *solved = ctx.saved_tensors
    grad, grad_a, grad_b = _solve_gradient(solved, ctx.options, grads)
    grad = grad if grad_similarity is None else grad + grad_similarity
    return (*attention.similarity_gradient(grad, solved[0], x, y, ctx.kind), grad_a, grad_b, *[None] * 5)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[3:6]
    ctx.save_for_backward(*inputs[:3], *inputs[-3:])


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    numbers, num_iters, implicit = ctx.options
    if implicit:
        raise RuntimeError('grad="implicit" has first derivatives only; pass grad="unroll" to differentiate twice')
    second = _second_order(ctx.saved_tensors, numbers, num_iters, grads)
    return (*second[:3], *[None] * 6, *second[3:])


def _solve_gradient(
    saved: Sequence[Tensor], options: list[Any], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    values, a, b, plan, rounds, history = saved
    implicit = options[2]
    if not implicit and history.shape[1] == 0:  # a transform's gradient, which could not be foreseen
        plan, _, _, _, rounds, history = torch.ops.otfuse.sinkhorn_cpu(values, a, b, *options, True)
    incoming = [torch.zeros_like(t) if grad is None else grad for t, grad in zip((plan, a, b), grads)]
    return torch.ops.otfuse.sinkhorn_cpu_backward(values, a, b, *options, plan, rounds, history, *incoming)


def _second_order(
    saved: tuple[Tensor, ...], numbers: Tensor, num_iters: int, grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradient of the gradient, by autograd through plain PyTorch; torch.func, so that transforms go through."""
    from otfuse.backends.torch import scaling, solve

    scale, tol = numbers  # tensors: there may be no values yet
    epsilon, sign = 1 / scale.abs(), scale.sign()

    def solution(values: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        p = attention.Marginals(a, b, masked=True)
        outputs = solve(lambda s, a, b: scaling(s, a, b, epsilon, num_iters, tol), sign * values, p)
        return tuple(no_infinity(output) for output in outputs[:3])

    return second_order(solution, saved, grads)


def second_order(
    solution: Callable[..., tuple[Tensor, ...]], saved: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradient at ``saved`` (values, a, b, and gradients of the solution) of the gradient of ``solution``."""

    def gradient(values: Tensor, a: Tensor, b: Tensor, *outer: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(solution, values, a, b)[1](outer)

    return torch.func.vjp(gradient, *saved)[1](grads)


def no_infinity(potential: Tensor) -> Tensor:
    """-inf at padding is a constant; a zero says the same and has no NaN in its derivatives."""
    return torch.where(torch.isinf(potential), 0, potential)


def batched(op: Any) -> Callable[..., tuple[Any, Any]]:
    """vmap by folding the extra dimension into the batch; numbers are the same for all."""
    names = argument_names(op)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        folded = []
        for name, value, dim in zip(names, args, in_dims):
            if isinstance(value, Tensor) and name not in NUMBERS:
                spread = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
                value = spread.flatten(0, 1)
            folded.append(value)
        outputs = op(*folded)
        one = isinstance(outputs, Tensor)
        unfolded = [
            o.unflatten(0, (info.batch_size, o.shape[0] // info.batch_size)) for o in ([outputs] if one else outputs)
        ]
        return (unfolded[0], 0) if one else (tuple(unfolded), (0,) * len(unfolded))

    return rule


register_autograd(library, "sinkhorn_cpu", _backward, setup_context=_setup_context)
register_autograd(library, "sinkhorn_tokens_cpu", _tokens_backward, setup_context=_setup_tokens_context)
register_autograd(library, "sinkhorn_cpu_backward", _double_backward, setup_context=_setup_backward_context)
for _name in ("sinkhorn_cpu", "sinkhorn_tokens_cpu", "sinkhorn_cpu_backward"):
    torch.library.register_vmap(f"otfuse::{_name}", batched(getattr(torch.ops.otfuse, _name)))
