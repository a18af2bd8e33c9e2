"""Launching a Triton kernel that has been launched in the same way before, at a fraction of the host's time.

``kernel[grid](...)`` binds and specialises some forty arguments by name at every call. What comes of it depends on
their kinds only, so here the compiled kernel is remembered by those, and called by position. Room for results is made
after models that are remembered too: ``torch.empty_like`` has nothing to parse.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from otfuse.kernels.constants import HISTORY_ALL, HISTORY_LAST, HISTORY_NONE, UNROLL

# Triton decides the same way, from the same variable, when its kernels are first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

ON_AMD = torch.version.hip is not None  # where Triton looks at one thing more: whether a tensor is below 2 GiB


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], device: torch.device
) -> None:
    """``kernel[grid](*arguments, **constants)`` on this device, which is the current one, and the current stream.

    ``constants`` are the kernel's compile-time parameters, in the kernel's order at the end, and Triton's options.
    """
    kinds, values = _kinds(arguments)
    key = (kernel, device, *constants.values(), *kinds)
    found = _compiled.get(key)
    if found is not None:
        compiled, tail = found
        compiled[(*grid, 1, 1)](*values, *tail)
        return
    # Products may be fused with sums; said here, since Triton's own default is about to change.
    compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=True)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kinds(arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """All that Triton's specialisation looks at, and the arguments, tensors as their addresses."""
    kinds: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        value = argument
        if argument is None or isinstance(argument, float):
            kinds.append(None if argument is None else float)
        elif isinstance(argument, int):  # one, and what 32 bits do not hold, are seldom passed
            kinds.append(argument % 16 == 0 if 1 < argument < 2**31 else (argument,))
        else:
            value = argument.data_ptr()
            kinds.append(argument.dtype if value % 16 == 0 else (argument.dtype,))
            if ON_AMD:
                kinds.append(argument.untyped_storage().nbytes() < 2**31)
        values.append(value)
    return kinds, values


def new_like(models: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised tensors of these shapes, dtypes and devices."""
    return [torch.empty_like(model) for model in models]


@lru_cache(maxsize=4096)
def model(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes no room: it outlives the memory pool of a CUDA graph, if it is made in one."""
    tensor = torch.empty((), dtype=dtype, device=device).expand(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple([None if tensor is None else tensor.contiguous() for tensor in tensors])


def sent(*grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients for the kernel; those of outputs that were not wanted are empty."""
    return contiguous(*[None if grad is None else wanted(grad) for grad in grads])


def wanted(tensor: Tensor) -> Tensor | None:
    """None for the kernel where there is no room for an output."""
    return tensor if tensor.numel() else None


def history_mode(grad: int, history: bool) -> int:
    """The kernels' HISTORY_NONE, HISTORY_LAST or HISTORY_ALL."""
    return HISTORY_NONE if not history else HISTORY_ALL if grad == UNROLL else HISTORY_LAST


_CURRENT = contextlib.nullcontext()


def on(device: torch.device) -> Any:
    """Triton launches on torch's current device: make it the tensors'. To change it costs more than to ask."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(device)
