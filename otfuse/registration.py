"""``torch.library.register_autograd`` as it should be for a function that users transform with ``torch.func``.

What PyTorch registers refuses to run inside ``torch.func.grad``, and in forward mode it silently gives
derivatives of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

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
