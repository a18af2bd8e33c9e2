"""What all ops share: the library, Python numbers, derivatives, batching.

Derivatives are registered as ``torch.library.register_autograd`` should for functions that users transform with
``torch.func``. What PyTorch registers refuses to run inside ``torch.func.grad``, and in forward mode it silently gives
derivatives of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

from otfuse._problem import SolveOptions
from otfuse.kernels.constants import DETACH, IMPLICIT, UNROLL

# A launch on a GPU has the numbers in its kernels' parameters, and a CUDA graph that torch.compile made would stay with
# those of its first run. Torch without this tag makes no CUDA graph of what computes on the CPU as well.
WITH_NUMBERS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)

NUMBERS = ("numbers", "temperature")  # what arguments that ``numbers`` makes are called

# How an op is told to solve. numbers: scale and tol, made by ``numbers``. scale: what values are multiplied by for the
# log kernel, 1 / epsilon for similarities, -1 / epsilon for costs. tol: below zero for none. grad: of MODES.
OPTIONS = "Tensor numbers, SymInt num_iters, int grad"
MODES = {"detach": DETACH, "unroll": UNROLL, "implicit": IMPLICIT}

FIRST_DERIVATIVES_ONLY = 'grad="implicit" has first derivatives only; pass grad="unroll" to differentiate twice'

library = torch.library.Library("otfuse", "DEF")

Tensors = tuple[Tensor, ...]


def register_autograd(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Tensors], None],
) -> None:
    """Derivatives of a functional op, at whatever level of ``torch.func``'s transforms it is called.

    Args:
        library: where the op is defined.
        name: of the op, without namespace; it has one overload and no keyword-only arguments.
        backward, setup_context: as in ``torch.library.register_autograd``.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def forward(ctx: Any, *args: Any) -> Tensors:
        # A Function's forward runs under no_grad, which would keep outer transforms from recording this call.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
        setup_context(ctx, args, outputs)
        return outputs

    # Dispatching has already come down to one level: the plain autograd.Function would start at the top again.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{name}_derivative", (_SingleLevelFunction,), members)

    def kernel(*args: Any) -> Tensors:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f'{library.ns}::{name} has no forward-mode derivatives; pass backend="torch"')
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(name, kernel, "Autograd")


def is_transformed() -> bool:
    """Whether this is inside a transform of ``torch.func``, or in forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def may_differentiate(args: tuple[Any, ...]) -> bool:
    """Whether autograd or a transform may want to see a call with these arguments."""
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args)


def numbers(*values: float) -> Tensor:
    """Python numbers as an op takes them: a float64 tensor [len(values)] on the CPU.

    A number that changes between calls of a compiled function is a symbol there. As a parameter of an op it would be
    baked into the graph; in tensor arithmetic it becomes an input.
    """
    if not is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + value for value in values])


class LaunchOptions(NamedTuple):
    """OPTIONS as launchers get them."""

    scale: float
    num_iters: int
    tol: float
    grad: int


def option_arguments(options: SolveOptions, sign: int) -> tuple[Tensor, int, int]:
    """OPTIONS, for a similarity (1) or a cost (-1)."""
    tol = -1.0 if options.tol is None else options.tol
    return numbers(sign / options.epsilon, tol), options.num_iters, MODES[options.grad]


def solve_options(numbers: Tensor, num_iters: int, grad: int) -> SolveOptions:
    """OPTIONS for plain PyTorch, to which an op comes back for second derivatives."""
    if grad == IMPLICIT:
        raise RuntimeError(FIRST_DERIVATIVES_ONLY)
    scale, tol = numbers  # tensors: there may be no values yet
    return SolveOptions(1 / scale.abs(), num_iters, tol, next(name for name, mode in MODES.items() if mode == grad))


def argument_names(op: Any) -> list[str]:
    return [argument.name for argument in op.default._schema.arguments]


def implement(name: str, launch: Callable[..., Any], key: str) -> None:
    """``launch`` behind an op that takes OPTIONS; itself it takes LaunchOptions there."""
    place = argument_names(getattr(torch.ops.otfuse, name)).index("numbers")

    def run(*args: Any) -> Any:
        scale, tol = args[place].tolist()  # on the CPU: no device is waited for
        options = LaunchOptions(scale, args[place + 1], tol, args[place + 2])
        return launch(*args[:place], options, *args[place + 3 :])

    library.impl(name, run, key)


def call(op: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    """``op(*args)``, past autograd where it has nothing to record: that alone costs some 15 µs."""
    if is_compiling() or may_differentiate(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class Derivatives:
    """Derivatives of an op whose arguments are tensors, options, and whatever else; its outputs with a gradient first.

    Subclasses say how: ``setup_context`` and ``backward`` as ``torch.library.register_autograd`` has them. Those of the
    backward op, which takes the same tensors and options first and gradients of the outputs last, follow from
    ``plain``.
    """

    name: str
    tensors: int  # arguments with a gradient, or None
    options: int  # arguments that follow
    outputs: int  # with a gradient
    library = library

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        raise NotImplementedError

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs with a gradient, in plain PyTorch."""
        raise NotImplementedError

    def register(self, batch: Callable[[Any], Callable[..., Any]] | None = None) -> None:
        """With the batching rule that ``batch`` makes of an op; folding the extra dimension into the batch if None."""
        op = getattr(getattr(torch.ops, self.library.ns), self.name)
        register_autograd(self.library, self.name, self.backward, setup_context=self.setup_context)
        torch.library.register_vmap(op.default, (batch or batched)(op), lib=self.library)


class SecondDerivatives(Derivatives):
    """Those of the backward op of ``first``, by autograd through plain PyTorch."""

    def __init__(self, first: Derivatives) -> None:
        self.first, self.name, self.library = first, f"{first.name}_backward", first.library

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        of = self.first
        ctx.options, ctx.others = inputs[of.tensors : of.tensors + of.options], len(inputs) - of.tensors - of.outputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: of.tensors], *inputs[-of.outputs :])

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of, saved = self.first, ctx.saved_tensors
        inputs, incoming = saved[: of.tensors], saved[of.tensors :]
        of_inputs, of_incoming = second_order(lambda *t: of.plain(t, ctx.options), inputs, incoming, grads)
        return (*of_inputs, *[None] * ctx.others, *of_incoming)


def second_order(
    plain: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    incoming: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Derivatives of the gradient of ``plain``; by ``torch.func``, so that transforms go through.

    Args:
        plain: outputs of all ``inputs``.
        inputs: masks and None are constants.
        incoming: gradients of the outputs, or None.
        grads: gradients of the gradient of each of ``inputs``, or None.

    Returns:
        Gradients of ``inputs`` and of ``incoming``, None where there is none.
    """
    leaves = [i for i in inputs if i is not None and has_gradient(i)]
    given = [i for i in incoming if i is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)
        found = plain(*(next(left) if has_gradient(i) else i for i in inputs))
        return tuple(no_infinity(o) for o, i in zip(found, incoming) if i is not None)

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(outputs, *values[: len(leaves)])[1](values[len(leaves) :])

    outer = (g for g, i in zip(grads, inputs) if has_gradient(i))
    cotangents = tuple(torch.zeros_like(i) if g is None else g for g, i in zip(outer, leaves))
    second = iter(torch.func.vjp(gradient, *leaves, *given)[1](cotangents))
    first = [next(second) if has_gradient(i) else None for i in inputs]
    return first, [None if i is None else next(second) for i in incoming]


def has_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


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
