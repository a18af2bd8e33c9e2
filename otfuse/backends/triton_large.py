"""Launchers beyond what stays on chip: rounds that stream an item's similarity, by the same ops as in ``triton.py``.

The path says where the similarity comes from: STORED, from memory (the cost itself, or what one launch has made of the
tokens); RECOMPUTED, from the tokens, a tile at a time, in every launch. The device code is in
``otfuse.kernels.triton.streaming``.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features, P strips of an item; lines are an item's rows and
columns, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse.backends._triton_launch import launch, on

LINES = 256  # of an item, to a program that does not look at the matrix

# BLOCK_N, BLOCK_M, num_warps, num_stages by where tiles come from and bytes of a number of the solve. A strip is read
# twice in a round, the second time from the L2 cache if the strips under way fit there: 16 rows of 4096 columns in
# float32 are 256 KiB, which 132 multiprocessors have 34 MB of. Tiles of tokens are large, for the tensor cores.
BLOCKS = {
    ("matrix", 4): (16, 256, 4, 2),
    ("matrix", 8): (16, 128, 4, 2),
    ("tokens", 4): (64, 64, 8, 2),
    ("tokens", 8): (32, 32, 8, 2),
}
FEATURES = {1: 64, 2: 64, 4: 32, 8: 16}  # BLOCK_D, by bytes of a number of the tokens
ATTENDED = {1: 64, 2: 64, 4: 64, 8: 32}  # BLOCK_F: features that a program attends to


class Blocks(NamedTuple):
    """Of the kernels that look at the matrix: a tile, and how many features of tokens at a time."""

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def blocks_of(source: str, values: torch.dtype) -> Blocks:
    """``source``: "matrix" or "tokens"; ``values``: the dtype of the tokens or the cost."""
    BLOCK_N, BLOCK_M, num_warps, num_stages = BLOCKS[source, 8 if values == torch.float64 else 4]
    return Blocks(BLOCK_N, BLOCK_M, FEATURES[values.itemsize], num_warps, num_stages)


@cache
def _kernels() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import streaming

    return streaming


class Solve:
    """A batch under way: what is streamed, and the state of the rounds.

    Every tensor that a launch here needs beyond inputs and outputs is made here: O(B (N + M)) numbers, B P M for the
    strips' parts of the sums over columns, and B N M in one case only, tokens on the path STORED.
    """

    def __init__(
        self, x: Tensor | None, y: Tensor | None, matrix: Tensor | None, a: Tensor | None, b: Tensor | None,
        cosine: bool, scale: float, precision: str,
    ) -> None:  # fmt: skip
        values = x if matrix is None else matrix
        assert values is not None
        self.x, self.y, self.matrix, self.a, self.b = x, y, matrix, a, b
        self.scale, self.precision, self.device = scale, precision, values.device
        self.B, self.N = values.shape[:2]
        self.M = y.shape[1] if y is not None else values.shape[2]
        self.D = 0 if x is None else x.shape[2]
        self.tokens = values.dtype if x is None else x.dtype
        self.dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        self.values = values
        lines = self.B, self.N + self.M
        self.weights, self.exponent, self.scaling = (self.new(*lines) for _ in range(3))
        self.items = self.new(self.B, 4)
        self.inverse = self.new(*lines) if cosine and x is not None else None
        self._weigh()

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.new_empty(shape, dtype=dtype or self.dtype)

    def blocks(self) -> Blocks:
        return blocks_of("tokens" if self.matrix is None else "matrix", self.tokens)

    def launch(self, kernel: Any, programs: tuple[int, ...], arguments: tuple[Any, ...], constants: Any) -> None:
        launch(kernel, programs, arguments, constants, self.device)

    def row_programs(self, BLOCK_N: int) -> int:
        return self.B * -(-self.N // BLOCK_N)

    def line_programs(self) -> tuple[int]:
        return (self.B * (-(-self.N // LINES) - (-self.M // LINES)),)

    def _weigh(self) -> None:
        arguments = self.a, self.b, self.weights, self.items, self.N, self.M
        self.launch(_kernels()._weights_kernel, (self.B,), arguments, {"BLOCK": 1024, "num_warps": 4})
        if self.inverse is None:
            return
        sides = (self.x, self.N, self.M, 0), (self.y, self.M, self.N, self.N)
        constants = {"BLOCK_N": 16, "BLOCK_D": 64, "num_warps": 4}
        for tokens, size, other, first in sides:
            arguments = tokens, self.weights, self.inverse, size, other, self.D, first
            self.launch(_kernels()._norms_kernel, (self.B * -(-size // 16),), arguments, constants)

    def source(self) -> tuple[Any, ...]:
        """The first arguments of every kernel that looks at the matrix: tokens or the matrix, and inverse norms."""
        if self.matrix is None:
            return self.x, self.y, None, self.inverse, self.weights
        return None, None, self.matrix, None, self.weights

    def constants(self, **more: Any) -> dict[str, Any]:
        blocks = self.blocks()
        sides = blocks._asdict()
        options = {name: sides.pop(name) for name in ("num_warps", "num_stages")}
        return {**more, "PRECISION": self.precision, **sides, **options}

    def matrices(self, plan: Tensor | None, similarity: Tensor | None) -> None:
        """Writes what is wanted of the two [B, N, M]."""
        constants = self.constants()
        programs = self.row_programs(constants["BLOCK_N"]), -(-self.M // constants["BLOCK_M"])
        arguments = (
            *self.source(), self.exponent, self.scaling, self.items, plan, similarity,
            self.N, self.M, self.D, self.M, self.scale,
        )  # fmt: skip
        self.launch(_kernels()._matrix_kernel, programs, arguments, constants)

    def store(self, similarity: Tensor) -> None:
        """From here on the similarity is streamed from here, not made of the tokens."""
        self.matrices(None, similarity)
        self.matrix = similarity

    def rounds(self, num_iters: int, tol: float, solution: Sequence[Tensor], keep: int) -> None:
        """All rounds; ``keep`` is streaming.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL."""
        f, g, error, rounds, history = solution
        history = history if keep else None
        constants = self.constants()
        P = -(-self.N // constants["BLOCK_N"])
        part, found, new_u = self.new(self.B, P, self.M), self.new(self.B, P), self.new(self.B, self.N)
        first = self.new(self.B, self.N + self.M)
        stopped = self.new(self.B, dtype=torch.int32)
        strip = (
            *self.source(), self.exponent, self.scaling, new_u, part, found, stopped,
            self.N, self.M, self.D, P, self.M, self.scale,
        )  # fmt: skip
        gathered = (
            self.weights, self.exponent, first, self.scaling, new_u, part, found, self.items, stopped, rounds, history,
            self.N, self.M, P,
        )  # fmt: skip
        lines = {"BLOCK": LINES, "num_warps": 4}
        for t in range(-1, num_iters + 1):  # the first launch looks at the range, the last at what the rows lack
            phase = {"FIRST": t < 0, "LAST": t == num_iters}
            self.launch(_kernels()._strip_kernel, (self.B * P,), (*strip, t), self.constants(**phase))
            if t < num_iters:
                options = {"FIRST": t < 0, "STOPS": tol > 0, "HISTORY": keep, **lines}
                self.launch(_kernels()._gather_kernel, self.line_programs(), (*gathered, t, num_iters, tol), options)
        arguments = (
            self.weights, self.exponent, first, self.scaling, found, self.items, f, g, error, rounds, history,
            self.N, self.M, P, num_iters, self.scale,
        )  # fmt: skip
        self.launch(_kernels()._finish_kernel, self.line_programs(), arguments, {"HISTORY": keep, **lines})

    def attend(self, barycentric: bool, x_out: Tensor, y_out: Tensor) -> None:
        N, M, width = self.N, self.M, ATTENDED[self.tokens.itemsize]
        _, _, matrix, inverse, weights = self.source()
        sides = (
            (self.x, self.y, x_out, N, M, (M, 1), (0, N)),
            (self.y, self.x, y_out, M, N, (1, M), (N, 0)),
        )
        for x, y, out, rows, columns, strides, places in sides:
            constants = self.attend_constants(BARYCENTRIC=barycentric)
            programs = self.B * -(-rows // constants["BLOCK_N"]), -(-self.D // width)
            arguments = (
                x, y, matrix, inverse, weights, self.exponent, self.scaling, self.items, out,
                rows, columns, self.D, *strides, *places, self.scale,
            )  # fmt: skip
            self.launch(_kernels()._attend_kernel, programs, arguments, constants)

    def attend_constants(self, **more: Any) -> dict[str, Any]:
        constants = self.constants(**more)
        sides = blocks_of("tokens", self.tokens)  # products on tensor cores, wherever the plan comes from
        constants |= {"BLOCK_N": sides.BLOCK_N, "BLOCK_M": sides.BLOCK_M}
        warps = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        return {**constants, "BLOCK_F": ATTENDED[self.tokens.itemsize], **warps, "num_warps": sides.num_warps}


def launch_attend_large(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, keep: int, stored: bool, precision: str,
    x_out: Tensor, y_out: Tensor, plan: Tensor, similarity: Tensor, solution: Sequence[Tensor],
) -> None:  # fmt: skip
    """Into these outputs, of which plan and similarity may be empty; the inputs are contiguous, the device current.

    ``stored``: the similarity is made once and read in every round, as it is wherever it is asked for. ``keep`` is
    streaming.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL.
    """
    with on(x.device):
        solve = Solve(x, y, None, a, b, cosine, scale, precision)
        if similarity.numel():
            solve.store(similarity)
        elif stored:
            solve.store(solve.new(solve.B, solve.N, solve.M))
        solve.rounds(num_iters, tol, solution, keep)
        if plan.numel():
            solve.matrices(plan, None)
        solve.attend(barycentric, x_out, y_out)


def launch_sinkhorn_large(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, keep: int,
    plan: Tensor, solution: Sequence[Tensor],
) -> None:  # fmt: skip
    """The same for a cost, which is itself what is streamed."""
    with on(cost.device):
        solve = Solve(None, None, cost, a, b, False, scale, "ieee")
        solve.rounds(num_iters, tol, solution, keep)
        solve.matrices(plan, None)
