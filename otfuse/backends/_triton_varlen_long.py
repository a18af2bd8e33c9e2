"""Packed items that fit no tile on chip: by the kernels of padded batches beyond the chip, over the blocks of the long.

A launch has as many programs as the tokens allow long items to have blocks, and a table, made on the device, of which
block of which item each takes; those that are left over leave. So the launches are those of one padded batch, whatever
the lengths are (docs/performance.md#packed-tokens), and an item's rows are spread over the device.

Letters: B batch, T_x and T_y tokens of all items.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otfuse.backends._triton_launch import launch
from otfuse.backends._triton_paths import Path, choose
from otfuse.backends.triton_large import Adjoint, Solve

if TYPE_CHECKING:
    from otfuse.backends.triton_varlen import Packed

TABLE = 8  # of places.py: numbers a row
MADE = {"PLACES": 64, "ITEMS": 64, "num_warps": 4}  # rows a program makes, items it looks at together


class LongItems:
    """Those of a packed batch that no tile holds, to ``triton_large.Solve`` what ``Padded`` is."""

    def __init__(self, items: Packed) -> None:
        self.items = items
        self.B, self.N, self.M = items.B, items.longest_x, items.longest_y
        self.tables: dict[tuple[int, int, int, bool], tuple[int, Tensor]] = {}

    def tokens(self) -> tuple[int, int]:
        return len(self.items.x), len(self.items.y)

    def blocks(self, rows: int, columns: int, strip: int, swapped: bool) -> tuple[int, Tensor]:
        key = rows, columns, strip, swapped
        if key not in self.tables:
            self.tables[key] = self._table(*key)
        return self.tables[key]

    def most(self) -> int:
        """No more items than this are long: each has more tokens than a tile holds."""
        tokens, longest, held = self.tokens(), (self.N, self.M), self.items.on_chip()
        on_sides = (of // (most + 1) if most < long else 0 for of, long, most in zip(tokens, longest, held))
        return min(self.B, sum(on_sides))

    def num_blocks(self, rows: int, columns: int, swapped: bool) -> int:
        """No fewer than the long items have: of each the last may be all but empty."""
        if not rows + columns:
            return self.most()
        tokens = self.tokens()[::-1] if swapped else self.tokens()
        return sum((of + self.most() * (size - 1)) // size for of, size in zip(tokens, (rows, columns)) if size)

    def _table(self, rows: int, columns: int, strip: int, swapped: bool) -> tuple[int, Tensor]:
        of, side = self.items, -1 if swapped else 1
        programs = self.num_blocks(rows, columns, swapped)
        table = of.x.new_empty(programs, TABLE, dtype=torch.int32)
        ends, tokens = (of.cu_seqlens_x, of.cu_seqlens_y)[::side], self.tokens()[::side]
        sizes = *tokens, *(self.N, self.M)[::side], *of.on_chip()[::side]
        constants = {"ROWS": rows, "COLUMNS": columns, "STRIP": max(strip, 1), **MADE}
        grid = (-(-programs // MADE["PLACES"]),)
        launch(_kernel(), grid, (*ends, table, self.B, *sizes, programs), constants, of.x.device)
        return programs, table


def _source(items: Packed, memory: int) -> bool:
    """Whether the similarity is stored: as for one padded item of all rows against the longest columns."""
    return choose(1, len(items.x), items.longest_y, items.D, items.x.dtype, memory, 0) is not Path.RECOMPUTED


def launch_long(
    items: Packed, outputs: tuple[Any, ...], cosine: bool, barycentric: bool, scale: float, num_iters: int, tol: float,
    keep: int, precision: str, memory: int,
) -> None:  # fmt: skip
    """Into ``outputs``: x, y, the padded plan or None, f, g, marginal error, rounds, history or None."""
    x_out, y_out, plan, *solution = outputs
    solve = Solve(items.x, items.y, None, items.a, items.b, cosine, scale, precision, places=LongItems(items))
    if _source(items, memory):
        solve.store(items.matrix())
    solve.rounds(num_iters, tol, solution, keep)
    if plan is not None:
        solve.matrices(plan, None)
    solve.attend(barycentric, x_out, y_out)


def launch_long_backward(
    items: Packed, kept: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], gradients: tuple[Any, ...],
    cosine: bool, barycentric: bool, scale: float, num_iters: int, mode: int, precision: str, memory: int,
) -> None:  # fmt: skip
    """``grads``: of x, y, padded plan, f and g; ``gradients``: room for those of x, y, a and b, None if unwanted."""
    grad_x, grad_y, grad_plan, grad_f, grad_g = grads
    adjoint = Adjoint(
        items.x, items.y, None, items.a, items.b, cosine, scale, precision, places=LongItems(items),
        barycentric=barycentric, mode=mode, num_iters=num_iters, kept=kept,
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


@cache
def _kernel() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import places

    return places._table_kernel
