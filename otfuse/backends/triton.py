"""Triton kernels for CUDA: similarity, solver and both attends in one launch or two, an item's kernel matrix on chip.

The device code is in ``otfuse.kernels.triton``; here stand the launchers, behind the ops of ``otfuse.fused_ops``. With
``TRITON_INTERPRET=1``, set before Triton is first imported, they run on CPU tensors, when asked for by name: slow, and
for tests.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse import fused_ops, ops
from otfuse.backends._triton_configurations import block_sizes, target_of
from otfuse.backends._triton_launch import launch
from otfuse.backends.base import Backend, is_installed
from otfuse.fused_ops import MODES, UNROLL
from otfuse.problem import Problem, SinkhornAttendOutput, SinkhornOutput

# Entries of the largest tile that stays on chip, both sides rounded up to a power of two of at least 16.
LARGEST_TILE = {8: 8192, 4: 16384}  # by bytes of an entry of the solve

# What keeps the blocks of tokens, beside the tile, within the shared memory of every GPU: the longest side, by bytes of
# an entry, and the entries where tokens are float16, whose products need the plan in two parts of float32. (The worst
# cases are the thin tiles in kernels/triton/resources.json.)
LONGEST_SIDE = {8: 256, 4: 512}
LARGEST_TILE_FLOAT16 = 8192

FEATURES = 64  # of the smallest part of an item

# Bytes of an item's tokens above which several programs share one reading of them. Predicted (docs/performance.md).
SIMILARITY_FIRST = 256 * 1024

# Triton decides the same way, from the same variable, when its kernels are first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(Backend):
    name = "triton"
    device = "cuda"

    def unavailable(self) -> list[str]:
        reasons = []
        if not is_installed("triton"):
            reasons.append("triton is not installed (pip install 'otfuse[cuda]')")
        if not INTERPRETED and not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        reasons = []
        if not (INTERPRETED and problem.values.device.type == "cpu"):
            reasons += super().unsupported(problem)
        _, N, M = problem.shape
        size = problem.solve_dtype.itemsize
        tokens, largest = problem.x is not None, LARGEST_TILE[size]
        dtype = str(problem.solve_dtype).removeprefix("torch.")
        if tokens and problem.values.dtype == torch.float16:
            largest, dtype = LARGEST_TILE_FLOAT16, "float16"
        sides = tile_side(N), tile_side(M)
        if sides[0] * sides[1] > largest:
            reasons.append(
                f"a kernel matrix of {N} x {M} does not fit on chip (at most {largest} entries in {dtype}, "
                "N and M each rounded up to a power of two, at least 16)"
            )
        elif tokens and max(sides) > LONGEST_SIDE[size]:
            reasons.append(
                f"tokens of {N} x {M} do not fit on chip (at most {LONGEST_SIDE[size]} on either side in {dtype})"
            )
        return reasons

    def sinkhorn(self, problem: Problem) -> SinkhornOutput:
        assert problem.cost is not None
        inputs, history = _prepared(problem, problem.cost)
        cost, _, a, b = inputs
        op = torch.ops.otfuse.sinkhorn_triton.default
        return SinkhornOutput(*ops.call(op, cost, a, b, *_solve_options(problem, -1), history)[:5])

    def attend(self, problem: Problem, similarity: bool = False) -> tuple[SinkhornAttendOutput, Tensor | None]:
        assert problem.x is not None and problem.y is not None
        inputs, history = _prepared(problem, problem.x, problem.y)
        wanted = (history, problem.return_plan, similarity)
        kinds = problem.similarity == "cosine", problem.weights == "barycentric"
        op = torch.ops.otfuse.sinkhorn_attend_triton.default
        x, y, plan, made, *solution = ops.call(op, *inputs, *kinds, *_solve_options(problem, 1), *wanted)
        out = SinkhornAttendOutput(x, y, plan if problem.return_plan else None, *solution[:4])
        return out, made if similarity else None


def _solve_options(problem: Problem, sign: int) -> tuple[Any, ...]:
    """fused_ops.SOLVE."""
    tol = -1.0 if problem.tol is None else problem.tol
    return sign / problem.epsilon, problem.num_iters, tol, MODES[problem.grad]


def _prepared(problem: Problem, *values: Tensor) -> tuple[tuple[Tensor | None, ...], bool]:
    """The tensors of the problem, x and y or a cost and None, and whether a backward may want a history."""
    inputs = (values[0], values[1] if len(values) == 2 else None, problem.a, problem.b)
    return inputs, torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def tile_side(size: int) -> int:
    """The power of two that holds ``size``; products on tensor cores want at least 16."""
    side = 16
    while side < size:  # comparisons, which torch.compile can guard on
        side *= 2
    return side


def launch_attend(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, grad: int, history: bool, plan: bool, similarity: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from otfuse.kernels.triton import attend

    (B, N, D), M = x.shape, y.shape[1]
    x, y, a, b = _contiguous(x, y, a, b)
    outputs = fused_ops.new_attended(x, y, plan, similarity)
    solution = fused_ops.new_solution(x, N, M, num_iters, grad, history)
    if B == 0:
        return *outputs, *solution
    shape = launch_shape(B, (N + M) * D * x.itemsize, D, x.device)
    blocks = _blocks("forward", x, tile_side(N), tile_side(M))
    made = outputs[3]
    with _on(x.device):
        if shape.similarity_first:
            made = solution[0].new_empty(B, N, M)
            tiles = _blocks("similarity", x, min(tile_side(N), 64), min(tile_side(M), 64))
            grid = (B, -(-N // tiles["BLOCK_N"]), -(-M // tiles["BLOCK_M"]))
            tokens = x, y, a, b, made, N, M, D
            launch(attend._similarity_kernel, grid, tokens, COSINE=cosine, PRECISION=_precision(x), **tiles)
        arguments = (
            x, y, made if shape.similarity_first else None, a, b,
            *outputs[:2], _wanted(outputs[2]), None if shape.similarity_first else _wanted(outputs[3]),
            *solution[:4], *map(_wanted, solution[4:]),
            N, M, D, shape.features, scale, num_iters, tol,
        )  # fmt: skip
        launch(
            attend._attend_fwd_kernel, (B, shape.parts), arguments, COSINE=cosine, BARYCENTRIC=barycentric,
            STOPS=tol > 0, HISTORY=_history(grad, history), PRECISION=_precision(x), **blocks,
        )  # fmt: skip
    return *outputs[:3], made if similarity else outputs[3], *solution


def launch_attend_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, grad: int, rounds: Tensor, history: Tensor, state: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from otfuse.kernels.triton import attend_backward

    (B, N, D), M = x.shape, y.shape[1]
    x, y, a, b = _contiguous(x, y, a, b)
    gradients = fused_ops.new_gradients(x, y, a, b)
    if B == 0:
        return gradients
    shape = launch_shape(B, (N + M) * D * x.itemsize, D, x.device)
    with _on(x.device):
        arguments = (
            x, y, None, a, b, *_contiguous(rounds, history, state), *_sent(*grads),
            *gradients[:2], None, *map(_wanted, gradients[2:]),
            N, M, D, shape.features, scale, num_iters,
        )  # fmt: skip
        launch(
            attend_backward._attend_bwd_kernel, (B, shape.parts), arguments, COSINE=cosine, BARYCENTRIC=barycentric,
            MODE=grad, PRECISION=_precision(x), **_blocks("backward", x, tile_side(N), tile_side(M)),
        )  # fmt: skip
    return gradients


def launch_sinkhorn(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int, history: bool
) -> tuple[Tensor, ...]:
    from otfuse.kernels.triton import attend

    B, N, M = cost.shape
    cost, a, b = _contiguous(cost, a, b)
    plan, solution = torch.empty_like(cost), fused_ops.new_solution(cost, N, M, num_iters, grad, history)
    if B == 0:
        return plan, *solution
    with _on(cost.device):
        arguments = (
            None, None, cost, a, b, None, None, plan, None, *solution[:4], *map(_wanted, solution[4:]),
            N, M, 0, 0, scale, num_iters, tol,
        )  # fmt: skip
        launch(
            attend._attend_fwd_kernel, (B, 1), arguments, COSINE=False, BARYCENTRIC=False,
            STOPS=tol > 0, HISTORY=_history(grad, history), PRECISION="ieee",
            **_blocks("forward", cost, tile_side(N), tile_side(M), tokens=False),
        )  # fmt: skip
    return plan, *solution


def launch_sinkhorn_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int,
    rounds: Tensor, history: Tensor, state: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    from otfuse.kernels.triton import attend_backward

    B, N, M = cost.shape
    cost, a, b = _contiguous(cost, a, b)
    gradients = fused_ops.new_gradients(cost, a, b)
    if B == 0:
        return gradients
    grad_plan, grad_f, grad_g = _sent(*grads)
    with _on(cost.device):
        arguments = (
            None, None, cost, a, b, *_contiguous(rounds, history, state), None, None, grad_plan, None, grad_f, grad_g,
            None, None, gradients[0], *map(_wanted, gradients[1:]),
            N, M, 0, 0, scale, num_iters,
        )  # fmt: skip
        launch(
            attend_backward._attend_bwd_kernel, (B, 1), arguments, COSINE=False, BARYCENTRIC=False,
            MODE=grad, PRECISION="ieee", **_blocks("backward", cost, tile_side(N), tile_side(M), tokens=False),
        )  # fmt: skip
    return gradients


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.library.impl("sinkhorn_attend_triton", launch_attend, _key)
    ops.library.impl("sinkhorn_attend_triton_backward", launch_attend_backward, _key)
    ops.library.impl("sinkhorn_triton", launch_sinkhorn, _key)
    ops.library.impl("sinkhorn_triton_backward", launch_sinkhorn_backward, _key)


class LaunchShape(NamedTuple):
    """How a batch is spread over the programs of one launch."""

    parts: int  # programs an item: each solves it, and attends to its own features
    features: int  # of a part; a multiple of 64
    similarity_first: bool  # by a launch of its own, to be read by every part


def launch_shape(B: int, token_bytes: int, D: int, device: torch.device) -> LaunchShape:
    """One program an item where there are enough items to fill the device; below, several.

    ``token_bytes`` is what an item's tokens weigh. To make the similarity again in every part costs one
    multiprocessor's reading of them; to make it first costs a launch, and room for [B, N, M].
    """
    idle = multiprocessors(device) // B
    parts = max(1, min(idle, -(-D // FEATURES)))
    features = -(-D // (parts * FEATURES)) * FEATURES if D else 0
    parts = max(1, -(-D // features)) if D else 1
    return LaunchShape(parts, features, parts > 1 and token_bytes > SIMILARITY_FIRST)


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that the device runs side by side, at one each."""
    if device.type == "cpu":  # Triton's interpreter runs one after the other
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _history(grad: int, history: bool) -> int:
    """attend.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL."""
    return 0 if not history else 2 if grad == UNROLL else 1


def _blocks(kernel: str, values: Tensor, BLOCK_N: int, BLOCK_M: int, tokens: bool = True) -> dict[str, int]:
    """Block sizes, warps and stages for a tile of a kernel on these tokens; or costs, which are widened at once."""
    dtype = values.dtype if tokens or values.dtype == torch.float64 else torch.float32
    name = str(dtype).removeprefix("torch.")
    return block_sizes(kernel, name, BLOCK_N, BLOCK_M, target_of(values.device))


def _precision(tokens: Tensor) -> str:
    """Of products in float32: its own, unless torch has been told that tf32 will do."""
    return "tf32" if tokens.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple([None if tensor is None else tensor.contiguous() for tensor in tensors])


def _sent(*grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients for the kernel; those of outputs that were not wanted are empty."""
    return _contiguous(*[None if grad is None else _wanted(grad) for grad in grads])


def _wanted(tensor: Tensor) -> Tensor | None:
    """None for the kernel where there is no room for an output."""
    return tensor if tensor.numel() else None


def _on(device: torch.device) -> Any:
    """Triton launches on torch's current device: make it the tensors'. To change it costs more than to ask."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
