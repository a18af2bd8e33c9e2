"""Packed items that fit no tile on chip: by the kernels of padded batches beyond the chip, over the blocks of the long.

A launch has as many programs as the tokens allow long items to have blocks, and a table, made on the device, of which
block of which item each takes; those that are left over leave. So the launches are those of one padded batch, whatever
the lengths are (docs/performance.md#packed-tokens), and an item's rows are spread over the device.

Letters: B batch, T_x and T_y tokens of all items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from otfuse._backends.triton.paths import Path, choose
from otfuse._backends.triton.places import LongItems, Packed
from otfuse._backends.triton.streaming import Adjoint, Solve
from otfuse._ops import LaunchOptions


def _source(items: Packed, memory: int) -> bool:
    """Whether the similarity is stored: as for one padded item of all rows against the longest columns."""
    return choose(1, len(items.x), items.longest_y, items.D, items.x.dtype, memory, 0) is not Path.RECOMPUTED


def launch_long(
    items: Packed, outputs: tuple[Any, ...], cosine: bool, barycentric: bool, options: LaunchOptions, keep: int,
    precision: str, memory: int,
) -> None:  # fmt: skip
    """Into ``outputs``: x, y, the padded plan or None, f, g, marginal error, rounds, history or None."""
    x_out, y_out, plan, *solution = outputs
    solve = Solve(items.x, items.y, None, items.a, items.b, cosine, options.scale, precision, places=LongItems(items))
    if _source(items, memory):
        solve.store(items.matrix())
    solve.rounds(options, solution, keep)
    if plan is not None:
        solve.matrices(plan, None)
    solve.attend(barycentric, x_out, y_out)


def launch_long_backward(
    items: Packed, kept: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], gradients: tuple[Any, ...],
    cosine: bool, barycentric: bool, options: LaunchOptions, precision: str, memory: int,
) -> None:  # fmt: skip
    """``grads``: of x, y, padded plan, f and g; ``gradients``: room for those of x, y, a and b, None if unwanted."""
    grad_x, grad_y, grad_plan, grad_f, grad_g = grads
    adjoint = Adjoint(
        items.x, items.y, None, items.a, items.b, cosine, options.scale, precision, places=LongItems(items),
        barycentric=barycentric, options=options, kept=kept,
        grads=(grad_x, grad_y, grad_plan, None, grad_f, grad_g),
    )  # fmt: skip
    stored = _source(items, memory)
    if stored:
        adjoint.store(items.matrix())
    adjoint.solve()
    made = items.matrix() if stored else None
    if made is not None:
        adjoint.matrix_gradient(made)
    adjoint.token_gradients(made, *gradients[:2])
    adjoint.weight_gradients(*gradients[2:])
