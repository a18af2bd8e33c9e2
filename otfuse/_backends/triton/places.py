"""Where the items of a batch stand: padded, packed on chip by size classes, or packed beyond the chip by blocks.

Letters: B batch, T_x and T_y tokens of all items, D features.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse._backends.triton import device
from otfuse._backends.triton.configurations import block_sizes
from otfuse._backends.triton.launch import launch
from otfuse._backends.triton.paths import LARGEST_LONG_TILE, LARGEST_TILE, LONGEST_SIDE, tile_side
from otfuse._problem import solve_dtype
from otfuse.kernels.constants import TABLE


class Padded(NamedTuple):
    """B items of N x M. Packed ones, of lengths of their own, have the same methods (``LongItems``)."""

    B: int
    N: int
    M: int

    def tokens(self) -> tuple[int, int]:
        """Of all items, on either side."""
        return self.B * self.N, self.B * self.M

    def blocks(self, rows: int, columns: int, strip: int, swapped: bool) -> tuple[int, Tensor | None]:
        """Programs for every block of so many rows and of so many columns of every item, zero of both is one an item;
        and the table of them (``kernels/triton/places.py``), which padded items do without."""
        if not rows + columns:
            return self.B, None
        N, M = (self.M, self.N) if swapped else (self.N, self.M)
        return self.B * ((-(-N // rows) if rows else 0) + (-(-M // columns) if columns else 0)), None


# Entries of a tile that is not worth a smaller one beside it; and how many programs a multiprocessor runs side by side,
# by their registers, of a tile of up to so many entries (docs/performance.md#packed-tokens): of larger ones, one.
SMALLEST_TILE = 512
SIDE_BY_SIDE = {2048: 3, 4096: 2}


class SizeClass(NamedTuple):
    """Items that one launch solves: at most ``most`` on either side, and on one of them more than ``less``."""

    tile: tuple[int, int]
    most: tuple[int, int]
    less: tuple[int, int]  # of the next smaller tile; below zero if there is none


def size_classes(longest_x: int, longest_y: int, itemsize: int, B: int, processors: int) -> list[SizeClass]:
    """The launches on chip for B items of up to these lengths, largest tile first: each has half the sides of the last.

    There is none after one whose programs all run at once: it lasts as long as its longest item, and short ones end
    before. ``itemsize``: bytes of a number of the solve; ``processors``: that the device has.
    """
    tiles = [_largest_tile(longest_x, longest_y, itemsize)]
    while _entries(tiles[-1]) > SMALLEST_TILE and processors * _side_by_side(tiles[-1]) < B:
        side_x, side_y = tiles[-1]
        tiles.append((max(16, side_x // 2), max(16, side_y // 2)))
    most = [(min(longest_x, side_x), min(longest_y, side_y)) for side_x, side_y in tiles]
    return [SizeClass(*of) for of in zip(tiles, most, [*most[1:], (-1, -1)])]


def _entries(tile: tuple[int, int]) -> int:
    return tile[0] * tile[1]


def _side_by_side(tile: tuple[int, int]) -> int:
    return next((count for entries, count in SIDE_BY_SIDE.items() if _entries(tile) <= entries), 1)


def _largest_tile(longest_x: int, longest_y: int, itemsize: int) -> tuple[int, int]:
    """That of the longest item if it fits on chip; else the longer side is halved until it does."""
    sides = [tile_side(longest_x), tile_side(longest_y)]
    while not _fits(sides[0], sides[1], itemsize):
        sides[sides[1] > sides[0]] //= 2
    return sides[0], sides[1]


def _fits(side_x: int, side_y: int, itemsize: int) -> bool:
    longest = max(side_x, side_y)
    largest = LARGEST_TILE[itemsize] if longest <= 128 else min(LARGEST_TILE[itemsize], LARGEST_LONG_TILE)
    return longest <= LONGEST_SIDE[itemsize] and side_x * side_y <= largest


class Packed(NamedTuple):
    """The arguments that every launch has: where the items are, and how long they may be."""

    x: Tensor
    y: Tensor
    cu_seqlens_x: Tensor
    cu_seqlens_y: Tensor
    a: Tensor | None
    b: Tensor | None
    longest_x: int
    longest_y: int

    @property
    def B(self) -> int:
        return self.cu_seqlens_x.shape[0] - 1

    @property
    def D(self) -> int:
        return self.x.shape[1]

    @property
    def solve_dtype(self) -> torch.dtype:
        return solve_dtype(self.x.dtype)

    def classes(self) -> list[SizeClass]:
        itemsize, processors = self.solve_dtype.itemsize, device.multiprocessors(self.x.device)
        return size_classes(self.longest_x, self.longest_y, itemsize, self.B, processors)

    def has_long(self) -> bool:
        """Whether an item may be too large for every tile on chip."""
        return self.classes()[0].most != (self.longest_x, self.longest_y)

    def on_chip(self) -> tuple[int, int]:
        """The longest that are solved on chip."""
        return self.classes()[0].most

    def tensors(self) -> tuple[Any, ...]:
        return self[:6]

    def sizes(self, of: SizeClass) -> tuple[int, ...]:
        """Counts of tokens, lengths, and those that a launch on chip solves."""
        return *self.counts(), *of.most, *of.less

    def counts(self) -> tuple[int, ...]:
        return len(self.x), len(self.y), self.longest_x, self.longest_y

    def matrix(self) -> Tensor:
        """Room for one number of every entry of every item: [T_x, longest_y]."""
        return self.x.new_empty(len(self.x), self.longest_y, dtype=self.solve_dtype)

    def blocks(self, kernel: str, tile: tuple[int, int]) -> dict[str, int]:
        return block_sizes(kernel, str(self.x.dtype).removeprefix("torch."), *tile, device.target_of(self.x.device))


MADE = {"PLACES": 64, "ITEMS": 64, "num_warps": 4}  # rows a program makes, items it looks at together


class LongItems:
    """Those of a packed batch that no tile holds, to ``streaming.Solve`` what ``Padded`` is."""

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


@cache
def _kernel() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import places

    return places._table_kernel
