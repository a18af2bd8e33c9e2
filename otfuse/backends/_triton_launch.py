"""Launching a Triton kernel that has been launched in the same way before, at a third of the host's time.

``kernel[grid](...)`` binds and specialises some forty arguments by name at every call. What comes of it depends on
their kinds only, so here the compiled kernel is remembered by those, and called by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device and stream.

    ``constants`` are the kernel's compile-time parameters, in the kernel's order at the end, and Triton's options.
    """
    key = (kernel, _device(arguments), *constants.values(), *[_kind(argument) for argument in arguments])
    known = _compiled.get(key)
    if known is None:
        # Products may be fused with sums; said here, since Triton's own default is about to change.
        compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=True)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, tail = known
    compiled[(*grid, 1, 1)](*arguments, *tail)


def _kind(argument: Any) -> Any:
    """All that Triton's specialisation looks at."""
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype,)
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument < 2**31
    return type(argument)


def _device(arguments: tuple[Any, ...]) -> torch.device:
    return next(argument.device for argument in arguments if isinstance(argument, Tensor))
