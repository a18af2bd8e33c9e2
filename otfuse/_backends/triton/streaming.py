"""Launchers beyond what stays on chip: rounds that stream an item's similarity, by the same ops as in ``triton.py``.

The path says where the similarity comes from: STORED, from memory (the cost itself, or what one launch has made of the
tokens); RECOMPUTED, from the tokens, a tile at a time, in every launch. On CLUSTER it is stored too, and the rounds
are one launch (``triton_cluster.py``). The device code is in ``otfuse.kernels.triton.streaming``.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features, P strips of an item; lines are an item's rows and
columns, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse._backends.triton import cluster as triton_cluster
from otfuse._backends.triton.launch import launch, on, wanted
from otfuse._backends.triton.places import LongItems, Padded
from otfuse._ops import LaunchOptions
from otfuse._problem import solve_dtype
from otfuse.kernels.constants import DETACH, END, HISTORY_ALL, HISTORY_NONE, IMPLICIT, ROUND, START, STEP, UNROLL

LINES = 256  # of an item, to a program that does not look at the matrix
WHOLE_LINES = 1024  # at a time, of a program that goes through all of one side

# BLOCK_N, BLOCK_M, num_warps, num_stages by where tiles come from, or what is done with them, and bytes of a number of
# the tokens or cost. A strip is read twice in a round, the second time from the L2 cache if the strips under way fit
# there: 16 rows of 4096 columns in float32 are 256 KiB, which 132 multiprocessors have 34 MB of. Tiles of tokens are
# large, for the tensor cores, which also multiply plans ("attend") and what comes back ("gradient").
BLOCKS = {
    "matrix": {2: (16, 256, 8, 2), 4: (16, 256, 8, 2), 8: (16, 64, 4, 2)},
    "tokens": {2: (32, 64, 4, 2), 4: (64, 64, 8, 2), 8: (32, 32, 8, 1)},
    "attend": {2: (64, 64, 8, 2), 4: (32, 32, 4, 2), 8: (16, 32, 4, 2)},
    "gradient": {2: (32, 32, 4, 1), 4: (32, 32, 4, 1), 8: (16, 16, 4, 1)},
}
FEATURES = {2: 64, 4: 32, 8: 16}  # BLOCK_D, by bytes of a number of the tokens
ATTENDED = {2: 64, 4: 64, 8: 32}  # BLOCK_F: features that a program attends to


class Blocks(NamedTuple):
    """Of the kernels that look at the matrix: a tile, and how many features of tokens at a time."""

    BLOCK_N: int
    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def blocks_of(source: str, values: torch.dtype) -> Blocks:
    """``source``: of BLOCKS; ``values``: what the tokens, or the cost, are of."""
    BLOCK_N, BLOCK_M, num_warps, num_stages = BLOCKS[source][values.itemsize]
    return Blocks(BLOCK_N, BLOCK_M, FEATURES[values.itemsize], num_warps, num_stages)


@cache
def _kernels() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import streaming

    return streaming


@cache
def _backward() -> Any:
    from otfuse.kernels.triton import streaming_backward

    return streaming_backward


class Solve:
    """A batch under way: what is streamed, and the state of the rounds.

    What a launch needs beyond inputs and outputs is made here and in Adjoint: O(B T (N + M)) numbers, B P M for the
    strips' parts of the sums over columns, and B N M in one case only, for tokens on the paths STORED and CLUSTER. N
    and M are those of the longest item, if the items are packed (``places``).
    """

    def __init__(
        self, x: Tensor | None, y: Tensor | None, matrix: Tensor | None, a: Tensor | None, b: Tensor | None,
        cosine: bool, scale: float, precision: str, held: int = 0, *, places: Padded | LongItems | None = None,
    ) -> None:  # fmt: skip
        """``held``: how many entries a cluster holds, if that is where the rounds are solved, or 0."""
        values = x if matrix is None else matrix
        assert values is not None
        self.x, self.y, self.matrix, self.a, self.b = x, y, matrix, a, b
        self.scale, self.precision, self.device = scale, precision, values.device
        M = values.shape[-1] if y is None else y.shape[-2]
        self.places = places or Padded(values.shape[0], values.shape[1], M)
        self.B, self.N, self.M = self.places.B, self.places.N, self.places.M
        self.rows, self.columns = self.places.tokens()
        self.D = 0 if x is None else x.shape[-1]
        self.tokens = values.dtype if x is None else x.dtype
        self.dtype = solve_dtype(values.dtype)
        self.values = values
        self.cluster = triton_cluster.cluster_blocks(self.N, self.M, held) if held else None
        self.lines = self.rows + self.columns
        self.weights, self.exponent, self.scaling = (self.new(self.lines) for _ in range(3))
        self.offset = self.new(self.rows)
        self.items = self.new(self.B, 4)
        self.inverse = self.new(self.lines) if cosine and x is not None else None
        self._weigh()

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.values.new_empty(shape, dtype=dtype or self.dtype)

    def blocks(self) -> Blocks:
        return blocks_of("tokens" if self.matrix is None else "matrix", self.tokens)

    def launch(self, kernel: Any, programs: tuple[int, ...], arguments: tuple[Any, ...], constants: Any) -> None:
        if 0 not in programs:  # tokens without features
            launch(kernel, programs, arguments, constants, self.device)

    def launch_blocks(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], *others: int,
        rows: int = 0, columns: int = 0, strip: int = 0,
    ) -> None:  # fmt: skip
        """With programs for blocks of so many rows and columns, and ``others`` for each of them.

        ``strip``: rows of the strips of which a program gathers what they have found.
        """
        programs, table = self.places.blocks(rows, columns, strip or rows, constants.get("SWAPPED", False))
        self.launch(kernel, (programs, *others), (*arguments, table), constants)

    def launch_lines(self, kernel: Any, arguments: tuple[Any, ...], strip: int, **options: Any) -> None:
        """With programs for blocks of LINES rows and columns."""
        constants = {**options, "BLOCK": LINES, "num_warps": 4}
        self.launch_blocks(kernel, arguments, constants, rows=LINES, columns=LINES, strip=strip)

    def _weigh(self) -> None:
        passed = self.a, self.b, self.weights, self.items, self.N, self.M
        self.launch_blocks(_kernels()._weights_kernel, passed, {"BLOCK": WHOLE_LINES, "num_warps": 4})
        if self.inverse is None:
            return
        for tokens, size, other, swapped in ((self.x, self.N, self.M, False), (self.y, self.M, self.N, True)):
            constants = {"SWAPPED": swapped, "BLOCK_N": 16, "BLOCK_D": 64, "num_warps": 4}
            arguments = tokens, self.weights, self.inverse, size, other, self.D
            self.launch_blocks(_kernels()._norms_kernel, arguments, constants, rows=16)

    def source(self) -> tuple[Any, ...]:
        """The first arguments of every kernel that looks at the matrix: tokens or the matrix, inverse norms, weights
        and the rows' offsets."""
        if self.matrix is None:
            return self.x, self.y, None, self.inverse, self.weights, self.offset
        return None, None, self.matrix, None, self.weights, self.offset

    def constants(self, source: Any = None, **more: Any) -> dict[str, Any]:
        sides = (blocks_of(source, self.tokens) if source else self.blocks())._asdict()
        options = {name: sides.pop(name) for name in ("num_warps", "num_stages")}
        return {**more, "PRECISION": self.precision, **sides, **options}

    def matrices(self, plan: Tensor | None, similarity: Tensor | None) -> None:
        """Writes what is wanted of the two [B, N, M]."""
        constants = self.constants()
        arguments = (
            *self.source(), self.exponent, self.scaling, self.items, plan, similarity,
            self.N, self.M, self.D, self.M, self.scale,
        )  # fmt: skip
        self.launch_tiles(_kernels()._matrix_kernel, arguments, constants)

    def launch_tiles(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.launch_blocks(kernel, arguments, constants, -(-self.M // constants["BLOCK_M"]), rows=constants["BLOCK_N"])

    def store(self, similarity: Tensor) -> None:
        """From here on the similarity is streamed from here, not made of the tokens."""
        self.matrices(None, similarity)
        self.matrix = similarity

    def start(self, history: Tensor | None = None, rounds: Tensor | None = None, unrolled: int = 0) -> None:
        """The first exponents, or those of all rounds of a history, if so many are ``unrolled``; and room for what the
        strips of an item find."""
        self.strip_rows = self.blocks().BLOCK_N
        self.P = -(-self.N // self.strip_rows)
        strips = self.num_strips(self.strip_rows)
        self.part, self.found = self.new(strips, self.M), self.new(strips)
        self.new_u, self.first = self.new(self.rows), self.new(max(unrolled, 1) * self.lines)
        self.stopped = self.new(self.B, dtype=torch.int32)
        self.rounds_run = self.new(self.B, dtype=torch.int32) if rounds is None else rounds
        self.history = history
        self.strip(-1, FIRST=True, LAST=False)
        self.gather(-1, unrolled, -1.0, FIRST=True, HISTORY=HISTORY_ALL if unrolled else HISTORY_NONE)

    def num_strips(self, rows: int) -> int:
        """Of all items."""
        return self.places.blocks(rows, 0, rows, False)[0]

    def strip(self, t: int, **phase: bool) -> None:
        arguments = (
            *self.source(), self.exponent, self.scaling, self.new_u, self.part, self.found, self.stopped,
            self.N, self.M, self.D, self.M, self.scale, t,
        )  # fmt: skip
        self.launch_blocks(_kernels()._strip_kernel, arguments, self.constants(**phase), rows=self.strip_rows)

    def gather(self, t: int, num_iters: int, tol: float, FIRST: bool, HISTORY: int) -> None:
        arguments = (
            self.weights, self.exponent, self.first, self.scaling, self.new_u, self.part, self.found, self.items,
            self.stopped, self.rounds_run, self.history, self.N, self.M, self.P, t, num_iters, tol,
        )  # fmt: skip
        options = {"FIRST": FIRST, "STOPS": tol > 0, "HISTORY": HISTORY}
        self.launch_lines(_kernels()._gather_kernel, arguments, self.strip_rows, **options)

    def rounds(self, options: LaunchOptions, solution: Sequence[Tensor], keep: int) -> None:
        """All rounds; ``keep`` is streaming.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL."""
        f, g, error, rounds, history = solution
        _, num_iters, tol, _ = options
        self.start(history if keep else None, rounds)
        if self.cluster:
            passed = (
                self.matrix, self.weights, self.offset, self.items, self.first, self.exponent, self.scaling,
                f, g, error, rounds, history if keep else None, self.N, self.M, self.M, self.scale, num_iters, tol,
            )  # fmt: skip
            constants = {"STOPS": tol > 0, "HISTORY": keep, **self.cluster}
            self.launch(triton_cluster.rounds_kernel(), (self.B,), passed, constants)
            return
        for t in range(num_iters):
            self.strip(t, FIRST=False, LAST=False)
            self.gather(t, num_iters, tol, FIRST=False, HISTORY=keep)
        self.strip(num_iters, FIRST=False, LAST=True)  # what the rows lack now
        arguments = (
            self.weights, self.offset, self.exponent, self.scaling, self.found, self.items,
            f, g, error, rounds, self.history, self.N, self.M, self.P, num_iters, self.scale,
        )  # fmt: skip
        self.launch_lines(_kernels()._finish_kernel, arguments, self.strip_rows, HISTORY=keep)

    def attend(self, barycentric: bool, x_out: Tensor, y_out: Tensor) -> None:
        N, M = self.N, self.M
        _, _, matrix, inverse, weights, offset = self.source()
        sides = (
            (self.x, self.y, x_out, N, M, (M, 1), False),
            (self.y, self.x, y_out, M, N, (1, M), True),
        )
        for x, y, out, rows, columns, strides, swapped in sides:
            # Tensor cores multiply, wherever the plan comes from.
            constants = self.constants("attend", SWAPPED=swapped, BARYCENTRIC=barycentric)
            arguments = (
                x, y, matrix, inverse, weights, offset, self.exponent, self.scaling, self.items, out,
                rows, columns, self.D, *strides, self.scale,
            )  # fmt: skip
            self.launch_features(_kernels()._attend_kernel, arguments, constants)

    def launch_features(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """With programs for blocks of rows and, of each, of features."""
        width = ATTENDED[self.tokens.itemsize]
        programs = -(-self.D // width)
        self.launch_blocks(kernel, arguments, with_features(constants, width), programs, rows=constants["BLOCK_N"])


def with_features(constants: dict[str, Any], BLOCK_F: int) -> dict[str, Any]:
    """With one more block size, before the options."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    return {**constants, "BLOCK_F": BLOCK_F, **options}


def launch_attend_large(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool,
    options: LaunchOptions, keep: int, stored: bool, held: int, precision: str,
    x_out: Tensor, y_out: Tensor, plan: Tensor, similarity: Tensor, solution: Sequence[Tensor],
) -> None:  # fmt: skip
    """Into these outputs, of which plan and similarity may be empty; the inputs are contiguous.

    ``stored``: the similarity is made once and read in every round; ``held``: as for Solve. ``keep`` is
    streaming.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL.
    """
    with on(x.device):
        solve = Solve(x, y, None, a, b, cosine, options.scale, precision, held)
        if stored:
            solve.store(similarity if similarity.numel() else solve.new(solve.B, solve.N, solve.M))
        elif similarity.numel():
            solve.matrices(None, similarity)
        solve.rounds(options, solution, keep)
        if plan.numel():
            solve.matrices(plan, None)
        solve.attend(barycentric, x_out, y_out)


def launch_sinkhorn_large(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions, keep: int,
    held: int, plan: Tensor, solution: Sequence[Tensor],
) -> None:  # fmt: skip
    """The same for a cost, which is itself what is streamed."""
    with on(cost.device):
        solve = Solve(None, None, cost, a, b, False, options.scale, "ieee", held)
        solve.rounds(options, solution, keep)
        solve.matrices(plan, None)


class Adjoint(Solve):
    """The backward of a batch: gradients that come in, and the state of the adjoint rounds."""

    def __init__(self, *problem: Any, barycentric: bool, options: LaunchOptions, kept: tuple[Tensor, Tensor],
                 grads: Sequence[Tensor | None], places: Padded | LongItems | None = None) -> None:  # fmt: skip
        """``problem``: as for Solve; ``grads``: of x, y, plan, similarity, f, g, None where there is none."""
        super().__init__(*problem, places=places)
        self.barycentric, self.mode, self.num_iters = barycentric, options.grad, options.num_iters
        self.kept = kept  # rounds and history
        self.grad_x, self.grad_y, self.grad_plan, self.grad_similarity, self.grad_f, self.grad_g = grads
        self.total = self.new(self.lines) if self.mode != DETACH else None
        self.pull = self.new(self.num_iters * self.lines) if self.mode == UNROLL else None
        self.attended = self.new(self.lines) if barycentric else None

    def modes(self, **more: Any) -> dict[str, Any]:
        return {**more, "MODE": self.mode, "BARYCENTRIC": self.barycentric}

    def tokens_and_gradients(self) -> tuple[Any, ...]:
        """The first arguments of kernels in which tokens meet gradients: tokens even where the matrix is read."""
        _, _, matrix, inverse, weights, offset = self.source()
        return self.x, self.y, matrix, inverse, weights, offset, self.grad_x, self.grad_y, self.grad_plan

    def meeting(self) -> str:
        return "matrix" if self.x is None else "gradient"

    def solve(self) -> None:
        """All that ends in ``total``, ``pull`` and ``attended``."""
        # A history is relative to exponents of which the first come out as they did in the forward.
        self.start(self.kept[1], unrolled=self.num_iters if self.mode == UNROLL else 0)
        if self.mode == DETACH and not self.barycentric:
            return
        N, M, kinds = self.N, self.M, 3 if self.mode == IMPLICIT else 2 if self.barycentric else 1
        constants = self.constants(self.meeting(), **self.modes())
        strip = constants["BLOCK_N"]
        P, strips = -(-N // strip), self.num_strips(strip)
        rows, part = self.new(kinds, self.rows), self.new(kinds, strips, M)
        start, sums = self.new(self.lines), self.new(self.lines) if self.mode == IMPLICIT else None
        arguments = (
            *self.tokens_and_gradients(), *self.kept, self.first, rows, part,
            N, M, self.D, M, self.rows, self.scale, self.num_iters,
        )  # fmt: skip
        self.launch_blocks(_backward()._start_kernel, arguments, constants, rows=strip)
        arguments = (
            self.weights, self.grad_f, self.grad_g, self.kept[0], rows, part, start, self.attended, sums, self.pull,
            self.total, N, M, P, self.rows, strips, self.scale, self.num_iters,
        )  # fmt: skip
        self.launch_lines(_backward()._started_kernel, arguments, strip, **self.modes())
        if self.mode == UNROLL:
            self.unroll(start)
        elif self.mode == IMPLICIT:
            self.implicit(start, sums)

    def adjoint_strip(self, phase: int, t: int, start: Tensor, sums: Any, pull: Any, done: Any) -> None:
        arguments = (
            *self.source(), *self.kept, self.first, start, sums, pull, self.total, done, self.part,
            self.N, self.M, self.D, self.M, self.scale, self.num_iters, t,
        )  # fmt: skip
        constants = self.constants(PHASE=phase)
        self.launch_blocks(_backward()._adjoint_strip_kernel, arguments, constants, rows=self.strip_rows)

    def unroll(self, start: Tensor) -> None:
        if self.cluster:
            passed = (
                self.matrix, self.weights, self.offset, *self.kept, self.first, start, self.pull, self.total,
                self.N, self.M, self.M, self.scale, self.num_iters,
            )  # fmt: skip
            self.launch(triton_cluster.adjoint_rounds_kernel(), (self.B,), passed, self.cluster)
            return
        for t in reversed(range(self.num_iters)):
            self.adjoint_strip(ROUND, t, start, None, self.pull, None)
            if t:
                arguments = (
                    self.weights, self.kept[0], self.part, self.pull, self.total,
                    self.N, self.M, self.P, self.num_iters, t,
                )  # fmt: skip
                constants, of = {"BLOCK": LINES, "num_warps": 4}, {"columns": LINES, "strip": self.strip_rows}
                self.launch_blocks(_backward()._adjoint_gather_kernel, arguments, constants, **of)

    def implicit(self, start: Tensor, sums: Any) -> None:
        numbers = self.new(self.B, 4)
        mapped, residual, direction = (self.new(self.columns) for _ in range(3))
        done = self.new(self.B, dtype=torch.int32)
        arguments = (
            start, sums, self.part, mapped, residual, direction, self.total, numbers, done, self.N, self.M, self.P,
        )  # fmt: skip
        for step in range(1 + num_steps(self.M, self.num_iters)):
            self.adjoint_strip(STEP if step else START, 0, start, sums, direction, done)
            constants = {"FIRST": step == 0, "BLOCK": LINES, "num_warps": 4}
            self.launch_blocks(_backward()._gradients_kernel, arguments, constants, strip=self.strip_rows)
        self.adjoint_strip(END, 0, start, sums, self.total, done)

    def matrix_gradient(self, grad: Tensor) -> None:
        """Writes the gradient of the similarity or the cost [B, N, M]."""
        arguments = (
            *self.tokens_and_gradients(), *self.kept, self.first, self.pull, self.total, grad,
            self.N, self.M, self.D, self.M, self.scale, self.num_iters,
        )  # fmt: skip
        constants = self.constants(self.meeting(), **self.modes())
        self.launch_tiles(_backward()._matrix_gradient_kernel, arguments, constants)

    def token_gradients(self, grad: Tensor | None, *outputs: Tensor) -> None:
        """Of x and y; from the gradient of the similarity, or where that is None from its tiles, made on the way."""
        _, _, matrix, _, weights, offset = self.source()
        N, M = self.N, self.M
        sides = (
            (self.x, self.y, self.grad_x, self.grad_y, outputs[0], N, M, (M, 1), False),
            (self.y, self.x, self.grad_y, self.grad_x, outputs[1], M, N, (1, M), True),
        )
        for x, y, grad_x, grad_y, out, rows, columns, strides, swapped in sides:
            constants = self.constants(
                "gradient", **self.modes(SWAPPED=swapped, COSINE=self.inverse is not None)
            )  # fmt: skip
            arguments = (
                x, y, matrix, self.inverse, weights, offset, grad_x, grad_y, self.grad_plan, self.grad_similarity,
                *self.kept, self.first, self.pull, self.total, grad, out,
                rows, columns, self.D, *strides, self.scale, self.num_iters,
            )  # fmt: skip
            self.launch_features(_backward()._pull_kernel, arguments, constants)

    def weight_gradients(self, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
        sides = (grad_a, self.a, self.N, self.M, False), (grad_b, self.b, self.M, self.N, True)
        for grad, passed, size, other, swapped in sides:
            if grad is None:
                continue
            state = passed, self.weights, self.items, self.kept[1], self.total, self.attended
            arguments = *state, grad, size, other, self.num_iters
            constants = {"SWAPPED": swapped, "MODE": self.mode, "BLOCK": WHOLE_LINES, "num_warps": 4}
            self.launch_blocks(_backward()._weight_gradient_kernel, arguments, constants)


def num_steps(M: int, num_iters: int) -> int:
    """Steps of conjugate gradients that are launched at most: an item leaves when it is done.

    On chip it may take 4 M + 50; but each takes two launches here, and what 50 rounds have brought near its fixed
    point needs far fewer (docs/performance.md#beyond-the-chip).
    """
    return min(4 * M + 50, 50 + 2 * num_iters)


def launch_attend_large_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool,
    options: LaunchOptions, stored: bool, held: int, precision: str, kept: tuple[Tensor, Tensor],
    grads: Sequence[Tensor | None], gradients: Sequence[Tensor],
) -> None:  # fmt: skip
    """Into ``gradients`` of x, y, a, b, of which the last two may be empty. ``kept``: rounds and history."""
    with on(x.device):
        adjoint = Adjoint(
            x, y, None, a, b, cosine, options.scale, precision, held,
            barycentric=barycentric, options=options, kept=kept, grads=grads,
        )  # fmt: skip
        made = None
        if stored:
            adjoint.store(adjoint.new(adjoint.B, adjoint.N, adjoint.M))
        adjoint.solve()
        if stored:
            made = adjoint.new(adjoint.B, adjoint.N, adjoint.M)
            adjoint.matrix_gradient(made)
        adjoint.token_gradients(made, *gradients[:2])
        adjoint.weight_gradients(*map(wanted, gradients[2:]))


def launch_sinkhorn_large_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions,
    held: int, kept: tuple[Tensor, Tensor], grads: Sequence[Tensor | None], gradients: Sequence[Tensor],
) -> None:  # fmt: skip
    """The same into the gradients of the cost, a, b; ``grads``: of the plan, f, g."""
    grad_plan, grad_f, grad_g = grads
    with on(cost.device):
        adjoint = Adjoint(
            None, None, cost, a, b, False, options.scale, "ieee", held, barycentric=False, options=options,
            kept=kept, grads=(None, None, grad_plan, None, grad_f, grad_g),
        )  # fmt: skip
        adjoint.solve()
        adjoint.matrix_gradient(gradients[0])
        adjoint.weight_gradients(*map(wanted, gradients[1:]))
