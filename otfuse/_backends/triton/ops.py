"""The ops of padded tokens and of costs, each the whole operator: schemas, fake kernels, derivatives, batching rules.

``otfuse::sinkhorn_attend_triton`` takes tokens and weights as the user passed them and returns everything at once;
``otfuse::sinkhorn_triton`` is the solver for a cost. Each has a backward op, which can itself be differentiated by way
of plain PyTorch.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features, T rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from otfuse import _attention as attention
from otfuse._attention import solve_precision
from otfuse._backends.torch.backend import TorchBackend
from otfuse._backends.triton.paths import is_small
from otfuse._ops import (
    OPTIONS,
    WITH_NUMBERS,
    Derivatives,
    SecondDerivatives,
    has_gradient,
    library,
    solve_options,
)
from otfuse._problem import Problem, solve_dtype
from otfuse.kernels.constants import DETACH, LAST_ROWS, UNROLL

# history: whether to keep what the backward needs; what is not wanted comes back empty.
ATTEND = f"Tensor x, Tensor y, Tensor? a, Tensor? b, bool cosine, bool barycentric, {OPTIONS}"
COST = f"Tensor cost, Tensor? a, Tensor? b, {OPTIONS}"
SOLUTION = "Tensor f, Tensor g, Tensor marginal_error, Tensor num_iters, Tensor history"
KEPT = "Tensor num_iters_run, Tensor history"

library.define(
    f"sinkhorn_attend_triton({ATTEND}, bool history, bool plan, bool similarity) "
    f"-> (Tensor x, Tensor y, Tensor plan, Tensor similarity, {SOLUTION})",
    tags=WITH_NUMBERS,
)
library.define(
    f"sinkhorn_attend_triton_backward({ATTEND}, {KEPT}, Tensor? grad_x, Tensor? grad_y, Tensor? grad_plan, "
    "Tensor? grad_similarity, Tensor? grad_f, Tensor? grad_g) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=WITH_NUMBERS,
)
library.define(f"sinkhorn_triton({COST}, bool history) -> (Tensor plan, {SOLUTION})", tags=WITH_NUMBERS)
library.define(
    f"sinkhorn_triton_backward({COST}, {KEPT}, Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g) "
    "-> (Tensor, Tensor, Tensor)",
    tags=WITH_NUMBERS,
)


def new_solution(values: Tensor, N: int, M: int, num_iters: int, grad: int, history: bool) -> tuple[Tensor, ...]:
    """Room for SOLUTION in the solve dtype.

    The history [B, 2 + kept (N + M)] of an item holds one if it was solved in scalings, the log kernel's shift, and
    u and v of all rounds for ``unroll``, of the last for the others: their logarithms where it was not. Beyond the chip
    it is as ``streaming._finish_kernel`` has it.
    """
    dtype = solve_dtype(values.dtype)
    shapes, num_iters_shape = solution_shapes(values.shape[0], N, M, num_iters, grad, history)
    f, g, error, kept = (values.new_empty(shape, dtype=dtype) for shape in shapes)
    return f, g, error, values.new_empty(num_iters_shape, dtype=torch.int32), kept


def solution_shapes(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool
) -> tuple[tuple[tuple[int, ...], ...], tuple[int]]:
    """Of SOLUTION: of what is in the solve dtype, and of num_iters."""
    kept = 2 + history_rows(num_iters, grad) * (N + M) if history else 0
    return ((B, N), (B, M), (B,), (B, kept)), (B,)


def history_rows(num_iters: int, grad: int) -> int:
    """Of N + M numbers, in the history of an item."""
    return num_iters if grad == UNROLL else LAST_ROWS


def new_small_solution(cost: Tensor, num_iters: int, grad: int, history: bool) -> tuple[Tensor, ...]:
    """As ``new_solution``, for many small costs, whose history [B, 2 + kept M] lies items last in memory.

    It holds form and shift as there, and of v alone what a round begins with: all rounds but the first for ``unroll``,
    the last for the others. A round is made again from that sooner than the rest would be read.
    """
    B, N, M = cost.shape
    kept = small_kept(M, num_iters, grad, history)
    *solution, last = new_solution(cost, N, M, num_iters, grad, False)
    return *solution, last.new_empty(kept, B).t()


def small_kept(M: int, num_iters: int, grad: int, history: bool) -> int:
    """Numbers an item in the history of a small cost."""
    return 2 + (num_iters - 1 if grad == UNROLL else 1) * M if history else 0


def new_attended(x: Tensor, y: Tensor, plan: bool, similarity: bool) -> tuple[Tensor, ...]:
    """Room for the outputs of the attends; plan and similarity in the solve dtype, and empty unless wanted."""
    B, N, M = x.shape[0], x.shape[1], y.shape[1]
    dtype = solve_dtype(x.dtype)
    matrices = [x.new_empty((B if wanted else 0, N, M), dtype=dtype) for wanted in (plan, similarity)]
    return x.new_empty(x.shape), y.new_empty(y.shape), *matrices


def new_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Room for the gradient of each input; empty for what has none, a mask or None."""
    like = next(tensor for tensor in inputs if tensor is not None)
    return tuple(
        like.new_empty(0) if tensor is None or tensor.dtype == torch.bool else tensor.new_empty(tensor.shape)
        for tensor in inputs
    )


@torch.library.register_fake("otfuse::sinkhorn_attend_triton")
def _(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, numbers: Tensor,
    num_iters: int, grad: int, history: bool, plan: bool, similarity: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    solution = new_solution(x, x.shape[1], y.shape[1], num_iters, grad, history)
    return *new_attended(x, y, plan, similarity), *solution


@torch.library.register_fake("otfuse::sinkhorn_attend_triton_backward")
def _(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return new_gradients(x, y, a, b)


@torch.library.register_fake("otfuse::sinkhorn_triton")
def _(
    cost: Tensor, a: Tensor | None, b: Tensor | None, numbers: Tensor, num_iters: int, grad: int, history: bool
) -> tuple[Tensor, ...]:
    N, M = cost.shape[1:]
    plan = cost.new_empty(cost.shape)
    if is_small(N, M, 0):
        return plan, *new_small_solution(cost, num_iters, grad, history)
    return plan, *new_solution(cost, N, M, num_iters, grad, history)


@torch.library.register_fake("otfuse::sinkhorn_triton_backward")
def _(cost: Tensor, a: Tensor | None, b: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return new_gradients(cost, a, b)


class _Attend(Derivatives):
    """Of ``sinkhorn_attend_triton``; what is the same for a cost, :class:`_Cost` inherits."""

    name = "sinkhorn_attend_triton"
    tensors = 4  # x, y, a, b
    options = 5  # cosine, barycentric, OPTIONS
    outputs = 6  # x, y, plan, similarity, f, g
    matrices: tuple[bool, ...] = (False, False)  # neither plan nor similarity, when only the history is asked for

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[self.tensors : self.tensors + self.options]
        never = output[-3:]  # marginal_error, num_iters, history
        ctx.mark_non_differentiable(*self.constants(output, ctx.options[-1]), *never)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: self.tensors], *output[-2:])

    def constants(self, output: tuple[Tensor, ...], grad: int) -> Sequence[Tensor]:
        """A detached plan and its potentials pass no gradient on; the similarity does."""
        return (output[2], *output[4:6]) if grad == DETACH else ()

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs, kept = ctx.saved_tensors[: self.tensors], ctx.saved_tensors[self.tensors :]
        if kept[1].shape[-1] == 0:  # a transform's gradient, which could not be foreseen
            again = getattr(torch.ops.otfuse, self.name)(*inputs, *ctx.options, True, *self.matrices)
            kept = again[-2:]
        op = getattr(torch.ops.otfuse, f"{self.name}_backward")
        results = op(*inputs, *ctx.options, *kept, *grads[: self.outputs])
        nothing = [None] * (self.options + 1 + len(self.matrices))
        return (*(r if has_gradient(i) else None for i, r in zip_longest(inputs, results)), *nothing)

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        x, y, a, b = inputs
        cosine, barycentric, *solving = options
        assert x is not None and y is not None
        kinds = "cosine" if cosine else "dot", "barycentric" if barycentric else "plan"
        problem = Problem(x, y, None, a, b, solve_options(*solving), *kinds)
        out, similarity = TorchBackend().attend(problem)
        assert out.plan is not None and similarity is not None
        return out.x, out.y, out.plan, similarity, out.f, out.g


class _Cost(_Attend):
    """Of ``sinkhorn_triton``."""

    name = "sinkhorn_triton"
    tensors = 3  # cost, a, b
    options = 3  # OPTIONS
    outputs = 3  # plan, f, g
    matrices = ()

    def constants(self, output: tuple[Tensor, ...], grad: int) -> Sequence[Tensor]:
        return output[:3] if grad == DETACH else ()

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        cost, a, b = inputs
        assert cost is not None
        problem = Problem(None, None, cost, a, b, solve_options(*options))
        solution = TorchBackend().solve_cost(solve_precision(cost), attention.marginals(problem), problem)
        return solution.plan.to(cost.dtype), solution.f, solution.g


for _derivatives in (_Attend(), _Cost()):
    _derivatives.register()
    SecondDerivatives(_derivatives).register()
