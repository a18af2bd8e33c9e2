"""Packed tokens by Triton: which launches a batch takes, and the launchers behind the ops of ``otfuse.varlen_ops``.

The host knows how long the longest item is, and no more: to look at the others would stall the device. So a large batch
has a launch for every size that an item may have, and a program for every item in each, which leaves at once if another
launch solves it. The device code is in ``otfuse.kernels.triton.varlen``. Items that no tile holds are solved as those
of padded batches are beyond the chip (``_triton_varlen_long.py``).

Letters: B batch, T_x and T_y tokens of all items, D features.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse import ops, varlen_ops
from otfuse.backends._triton_configurations import block_sizes, target_of
from otfuse.backends._triton_launch import contiguous, launch, on, sent, wanted
from otfuse.backends._triton_paths import LARGEST_LONG_TILE, LARGEST_TILE, LONGEST_SIDE, tile_side
from otfuse.backends._triton_varlen_long import launch_long, launch_long_backward
from otfuse.backends.triton import (
    INTERPRETED,
    _history,
    _precision,
    launch_shape,
    memory_of,
    multiprocessors,
)
from otfuse.fused_ops import new_gradients

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
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def classes(self) -> list[SizeClass]:
        itemsize, processors = self.solve_dtype.itemsize, multiprocessors(self.x.device)
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
        return block_sizes(kernel, str(self.x.dtype).removeprefix("torch."), *tile, target_of(self.x.device))


def _packed(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int,
) -> Packed:  # fmt: skip
    x, y, cu_seqlens_x, cu_seqlens_y, a, b = contiguous(x, y, cu_seqlens_x, cu_seqlens_y, a, b)
    return Packed(x, y, cu_seqlens_x, cu_seqlens_y, a, b, longest_x, longest_y)


def launch_attend_varlen(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int, cosine: bool, barycentric: bool, scale: float, num_iters: int, tol: float,
    grad: int, history: bool, plan: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    items = _packed(x, y, a, b, cu_seqlens_x, cu_seqlens_y, longest_x, longest_y)
    outputs = varlen_ops.new_outputs(items.x, items.y, items.B, longest_x, longest_y, num_iters, grad, history, plan)
    if items.B == 0:
        return outputs
    x_out, y_out, padded_plan, *solution, kept = outputs
    matrix = items.matrix() if plan else None
    options = {"COSINE": cosine, "BARYCENTRIC": barycentric, "STOPS": tol > 0, "HISTORY": _history(grad, history)}
    with on(x.device):
        for of in items.classes():
            parts, features = _spread(items, of)
            arguments = (
                *items.tensors(), x_out, y_out, matrix, *solution, kept if history else None,
                *items.sizes(of), items.D, features, scale, num_iters, tol,
            )  # fmt: skip
            constants = {**options, "PRECISION": _precision(x.dtype), **items.blocks("forward", of.tile)}
            launch(_kernels().attend_fwd, (items.B, parts), arguments, constants, x.device)
        if items.has_long():
            made = x_out, y_out, padded_plan if plan else None, *solution, kept if history else None
            launch_long(
                items, made, cosine, barycentric, scale, num_iters, tol, options["HISTORY"], _precision(x.dtype),
                memory_of(x.device),
            )  # fmt: skip
        if matrix is not None:
            _move_matrix(items, matrix, padded_plan, solution[2])
    return outputs


def launch_attend_varlen_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int, cosine: bool, barycentric: bool, scale: float, num_iters: int, tol: float,
    grad: int, rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    items = _packed(x, y, a, b, cu_seqlens_x, cu_seqlens_y, longest_x, longest_y)
    gradients = new_gradients(items.x, items.y, items.a, items.b)
    if items.B == 0:
        return gradients
    grad_x_out, grad_y_out, grad_plan, grad_f, grad_g = sent(*grads)
    gradients_wanted = *gradients[:2], *map(wanted, gradients[2:])
    rounds, history = contiguous(rounds, history)
    options = {"COSINE": cosine, "BARYCENTRIC": barycentric, "MODE": grad, "PRECISION": _precision(x.dtype)}
    packed_grad_plan = None if grad_plan is None else items.matrix()
    with on(x.device):
        if packed_grad_plan is not None:
            _move_matrix(items, packed_grad_plan, grad_plan)
        for of in items.classes():
            parts, features = _spread(items, of)
            arguments = (
                *items.tensors(), rounds, history,
                grad_x_out, grad_y_out, packed_grad_plan, grad_f, grad_g, *gradients_wanted,
                *items.sizes(of), items.D, features, scale, num_iters,
            )  # fmt: skip
            constants = {**options, **items.blocks("backward", of.tile)}
            launch(_kernels().attend_bwd, (items.B, parts), arguments, constants, x.device)
        if items.has_long():
            launch_long_backward(
                items, (rounds, history), (grad_x_out, grad_y_out, grad_plan, grad_f, grad_g), gradients_wanted,
                cosine, barycentric, scale, num_iters, grad, _precision(x.dtype), memory_of(x.device),
            )  # fmt: skip
    return gradients


def _spread(items: Packed, of: SizeClass) -> tuple[int, int]:
    """Programs an item, and features of each; the similarity has no launch of its own."""
    token_bytes = sum(of.most) * items.D * items.x.element_size()
    return launch_shape(items.B, token_bytes, items.D, items.x.device)[:2]


def _move_matrix(items: Packed, matrix: Tensor, padded: Tensor, error: Tensor | None = None) -> None:
    """From [B, longest_x, longest_y] to where the kernels on chip have matrices of items; with their errors, back."""
    grid = (items.B, -(-items.longest_x // _MOVED["BLOCK_N"]))
    arguments = matrix, padded, error, items.cu_seqlens_x, items.cu_seqlens_y, *items.counts(), *items.on_chip()
    if padded.numel():
        launch(_kernels().matrix, grid, arguments, {"PACK": error is None, **_MOVED}, matrix.device)


_MOVED = {"BLOCK_N": 16, "BLOCK_M": 64, "num_warps": 4, "num_stages": 1}


class Kernels(NamedTuple):
    attend_fwd: Any
    attend_bwd: Any
    matrix: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import varlen

    return Kernels(varlen._varlen_fwd_kernel, varlen._varlen_bwd_kernel, varlen._varlen_matrix_kernel)


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.implement("sinkhorn_attend_varlen_triton", launch_attend_varlen, _key)
    ops.implement("sinkhorn_attend_varlen_triton_backward", launch_attend_varlen_backward, _key)
