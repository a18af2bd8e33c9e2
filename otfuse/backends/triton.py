"""Triton kernels for CUDA: similarity, solver and both attends in one launch or two, an item's kernel matrix on chip.

The device code is in ``otfuse.kernels.triton``; here stand the launchers, behind the ops of ``otfuse.fused_ops``. With
``TRITON_INTERPRET=1``, set before Triton is first imported, they run on CPU tensors, when asked for by name: slow, and
for tests.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse import fused_ops, ops
from otfuse.backends import _triton_version
from otfuse.backends._triton_configurations import block_sizes, target_of
from otfuse.backends._triton_launch import contiguous, launch, model, new_like, on, sent, wanted
from otfuse.backends._triton_paths import Path, choose, tile_side
from otfuse.backends.base import Backend, is_installed
from otfuse.backends.triton_cluster import held_by
from otfuse.backends.triton_large import (
    launch_attend_large,
    launch_attend_large_backward,
    launch_sinkhorn_large,
    launch_sinkhorn_large_backward,
)
from otfuse.backends.triton_small import launch_sinkhorn_small, launch_sinkhorn_small_backward
from otfuse.fused_ops import MODES, UNROLL
from otfuse.problem import Problem, SinkhornAttendOutput, SinkhornOutput, VarlenProblem

_NO_TOKENS = {"COSINE": False, "BARYCENTRIC": False}

FEATURES = 64  # of the smallest part of an item

# Bytes of an item's tokens above which several programs share one reading of them. Predicted (docs/performance.md).
SIMILARITY_FIRST = 256 * 1024

# Triton decides the same way, from the same variable, when its kernels are first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(Backend):
    name = "triton"
    device = "cuda"
    packs = True

    def unavailable(self) -> list[str]:
        reasons = []
        if not is_installed("triton"):
            reasons.append("triton is not installed (pip install 'otfuse[cuda]')")
        else:
            reasons += _triton_version.why_too_old()
        if not INTERPRETED and not torch.cuda.is_available():
            reasons.append("torch finds no CUDA device")
        if not reasons:
            from otfuse.backends import _triton_import

            reasons += _triton_import.UNAVAILABLE
        return reasons

    def unsupported(self, problem: Problem) -> list[str]:
        if INTERPRETED and problem.values.device.type == "cpu":
            return []
        return super().unsupported(problem)

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

    def attend_varlen(self, problem: VarlenProblem) -> SinkhornAttendOutput:
        assert problem.x is not None and problem.y is not None
        inputs, history = _prepared(problem, problem.x, problem.y)
        packing = problem.cu_seqlens_x, problem.cu_seqlens_y, problem.max_seqlen_x, problem.max_seqlen_y
        kinds = problem.similarity == "cosine", problem.weights == "barycentric"
        op = torch.ops.otfuse.sinkhorn_attend_varlen_triton.default
        options = (*packing, *kinds, *_solve_options(problem, 1), history, problem.return_plan)
        x, y, plan, *solution = ops.call(op, *inputs, *options)
        return SinkhornAttendOutput(x, y, plan.to(x.dtype) if problem.return_plan else None, *solution[:4])


def _solve_options(problem: Problem, sign: int) -> tuple[Any, ...]:
    """fused_ops.SOLVE."""
    numbers = ops.numbers(sign / problem.epsilon, -1.0 if problem.tol is None else problem.tol)
    return numbers, problem.num_iters, MODES[problem.grad]


def _prepared(problem: Problem, *values: Tensor) -> tuple[tuple[Tensor | None, ...], bool]:
    """The tensors of the problem, x and y or a cost and None, and whether a backward may want a history."""
    inputs = (values[0], values[1] if len(values) == 2 else None, problem.a, problem.b)
    return inputs, torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def path_of(values: Tensor, B: int, N: int, M: int, D: int) -> Path:
    """How a batch is solved, forward and backward: the launchers here are those of ``Path.ON_CHIP``."""
    return _path(B, N, M, D, values.dtype, values.device)


@lru_cache(maxsize=4096)
def _path(B: int, N: int, M: int, D: int, dtype: torch.dtype, device: torch.device) -> Path:
    return choose(B, N, M, D, dtype, device_memory(device), held_by(device))


def held_on(path: Path, device: torch.device) -> int:
    """Entries that a cluster holds, on the path that takes one, or 0."""
    return held_by(device) if path is Path.CLUSTER else 0


@cache
def device_memory(device: torch.device) -> int:
    """``memory_of`` where no compiler looks on, which would warn of the cache."""
    return memory_of(device)


def memory_of(device: torch.device) -> int:
    """Bytes in all, whatever is in use."""
    if device.type == "cpu":  # in Triton's interpreter: a number that is the same on every machine
        return 16 << 30
    return torch.cuda.get_device_properties(device).total_memory


def launch_attend(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, grad: int, history: bool, plan: bool, similarity: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, N, D), M, dtype, device = x.shape, y.shape[1], x.dtype, x.device
    x, y, a, b = contiguous(x, y, a, b)
    models = _attend_models(B, N, M, num_iters, grad, history, plan, similarity, dtype, device)
    outputs = (torch.empty_like(x), torch.empty_like(y), *new_like(models))
    if B == 0:
        return outputs
    if (path := path_of(x, B, N, M, max(D, 1))) is not Path.ON_CHIP:  # tokens, even without features
        stored, held = path is not Path.RECOMPUTED, held_on(path, device)
        launch_attend_large(
            x, y, a, b, cosine, barycentric, scale, num_iters, tol, _history(grad, history), stored, held,
            _precision(dtype), outputs[0], outputs[1], outputs[2], outputs[3], outputs[4:],
        )  # fmt: skip
        return outputs
    shape = launch_shape(B, (N + M) * D * dtype.itemsize, D, device)
    blocks = _blocks("forward", dtype, tile_side(N), tile_side(M), device)
    options = {"COSINE": cosine, "BARYCENTRIC": barycentric, "STOPS": tol > 0, "HISTORY": _history(grad, history)}
    precision = {"PRECISION": _precision(dtype)}
    made = outputs[3] if similarity else None
    with on(device):
        if shape.similarity_first:
            made = outputs[4].new_empty(B, N, M) if made is None else made
            tiles = _blocks("similarity", dtype, min(tile_side(N), 64), min(tile_side(M), 64), device)
            grid = (B, -(-N // tiles["BLOCK_N"]), -(-M // tiles["BLOCK_M"]))
            tokens = x, y, a, b, made, N, M, D
            launch(_kernels().similarity, grid, tokens, {"COSINE": cosine, **precision, **tiles}, device)
        arguments = (
            x, y, made if shape.similarity_first else None, a, b,
            *outputs[:2], outputs[2] if plan else None, None if shape.similarity_first else made,
            *outputs[4:8], outputs[8] if history else None,
            N, M, D, shape.features, scale, num_iters, tol,
        )  # fmt: skip
        launch(_kernels().attend_fwd, (B, shape.parts), arguments, {**options, **precision, **blocks}, device)
    return outputs


@lru_cache(maxsize=4096)
def _attend_models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, plan: bool, similarity: bool,
    dtype: torch.dtype, device: torch.device,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of all outputs of a launch but x and y: as fused_ops.new_attended and new_solution."""
    solve = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = [model((B if wanted else 0, N, M), solve, device) for wanted in (plan, similarity)]
    return *matrices, *_solution_models(B, N, M, num_iters, grad, history, dtype, device)


@lru_cache(maxsize=4096)
def _solution_models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """As fused_ops.new_solution."""
    solve = torch.float64 if dtype == torch.float64 else torch.float32
    shapes, num_iters_shape = fused_ops.solution_shapes(B, N, M, num_iters, grad, history)
    f, g, error, kept = (model(shape, solve, device) for shape in shapes)
    return f, g, error, model(num_iters_shape, torch.int32, device), kept


def launch_attend_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool, scale: float,
    num_iters: int, tol: float, grad: int, rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, N, D), M = x.shape, y.shape[1]
    x, y, a, b = contiguous(x, y, a, b)
    gradients = fused_ops.new_gradients(x, y, a, b)
    if B == 0:
        return gradients
    if (path := path_of(x, B, N, M, max(D, 1))) is not Path.ON_CHIP:
        launch_attend_large_backward(
            x, y, a, b, cosine, barycentric, scale, num_iters, grad, path is not Path.RECOMPUTED,
            held_on(path, x.device), _precision(x.dtype),
            contiguous(rounds, history), sent(*grads), gradients,
        )  # fmt: skip
        return gradients
    shape = launch_shape(B, (N + M) * D * x.itemsize, D, x.device)
    blocks = _blocks("backward", x.dtype, tile_side(N), tile_side(M), x.device)
    options = {"COSINE": cosine, "BARYCENTRIC": barycentric, "MODE": grad, "PRECISION": _precision(x.dtype)}
    with on(x.device):
        arguments = (
            x, y, None, a, b, *contiguous(rounds, history), *sent(*grads),
            *gradients[:2], None, *map(wanted, gradients[2:]),
            N, M, D, shape.features, scale, num_iters,
        )  # fmt: skip
        launch(_kernels().attend_bwd, (B, shape.parts), arguments, {**options, **blocks}, x.device)
    return gradients


def launch_sinkhorn(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int, history: bool
) -> tuple[Tensor, ...]:
    B, N, M = cost.shape
    if path_of(cost, B, N, M, 0) is Path.SMALL:
        return launch_sinkhorn_small(cost, a, b, scale, num_iters, tol, grad, history)
    cost, a, b = contiguous(cost, a, b)
    models = _solution_models(B, N, M, num_iters, grad, history, cost.dtype, cost.device)
    plan, solution = torch.empty_like(cost), new_like(models)
    if B == 0:
        return plan, *solution
    if (path := path_of(cost, B, N, M, 0)) is not Path.ON_CHIP:
        held = held_on(path, cost.device)
        launch_sinkhorn_large(cost, a, b, scale, num_iters, tol, _history(grad, history), held, plan, solution)
        return plan, *solution
    blocks = _blocks("forward, cost", _solved_in(cost), tile_side(N), tile_side(M), cost.device)
    options = {**_NO_TOKENS, "STOPS": tol > 0, "HISTORY": _history(grad, history), "PRECISION": "ieee"}
    with on(cost.device):
        arguments = (
            None, None, cost, a, b, None, None, plan, None, *solution[:4],
            solution[4] if history else None, N, M, 0, 0, scale, num_iters, tol,
        )  # fmt: skip
        launch(_kernels().attend_fwd, (B, 1), arguments, {**options, **blocks}, cost.device)
    return plan, *solution


def launch_sinkhorn_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, scale: float, num_iters: int, tol: float, grad: int,
    rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, N, M = cost.shape
    if path_of(cost, B, N, M, 0) is Path.SMALL:
        return launch_sinkhorn_small_backward(cost, a, b, scale, num_iters, tol, grad, rounds, history, *grads)
    cost, a, b = contiguous(cost, a, b)
    gradients = fused_ops.new_gradients(cost, a, b)
    if B == 0:
        return gradients
    if (path := path_of(cost, B, N, M, 0)) is not Path.ON_CHIP:
        kept, held = contiguous(rounds, history), held_on(path, cost.device)
        launch_sinkhorn_large_backward(cost, a, b, scale, num_iters, grad, held, kept, sent(*grads), gradients)
        return gradients
    grad_plan, grad_f, grad_g = sent(*grads)
    blocks = _blocks("backward", _solved_in(cost), tile_side(N), tile_side(M), cost.device)
    options = {**_NO_TOKENS, "MODE": grad, "PRECISION": "ieee"}
    with on(cost.device):
        arguments = (
            None, None, cost, a, b, *contiguous(rounds, history), None, None, grad_plan, None, grad_f, grad_g,
            None, None, gradients[0], *map(wanted, gradients[1:]),
            N, M, 0, 0, scale, num_iters,
        )  # fmt: skip
        launch(_kernels().attend_bwd, (B, 1), arguments, {**options, **blocks}, cost.device)
    return gradients


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.implement("sinkhorn_attend_triton", launch_attend, _key)
    ops.implement("sinkhorn_attend_triton_backward", launch_attend_backward, _key)
    ops.implement("sinkhorn_triton", launch_sinkhorn, _key)
    ops.implement("sinkhorn_triton_backward", launch_sinkhorn_backward, _key)


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
    return _launch_shape(B, token_bytes, D, multiprocessors(device))


@lru_cache(maxsize=4096)
def _launch_shape(B: int, token_bytes: int, D: int, processors: int) -> LaunchShape:
    idle = processors // B
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


class Kernels(NamedTuple):
    similarity: Any
    attend_fwd: Any
    attend_bwd: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import attend, attend_backward

    return Kernels(attend._similarity_kernel, attend._attend_fwd_kernel, attend_backward._attend_bwd_kernel)


def _history(grad: int, history: bool) -> int:
    """attend.HISTORY_NONE, HISTORY_LAST or HISTORY_ALL."""
    return 0 if not history else 2 if grad == UNROLL else 1


def _solved_in(cost: Tensor) -> torch.dtype:
    """Costs are widened as they are read: their kernels are configured as for the dtype that they solve in."""
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=4096)
def _blocks(kernel: str, dtype: torch.dtype, BLOCK_N: int, BLOCK_M: int, device: torch.device) -> dict[str, int]:
    """Block sizes, warps and stages for a tile of a kernel on tokens of this dtype; not to be changed."""
    return block_sizes(kernel, str(dtype).removeprefix("torch."), BLOCK_N, BLOCK_M, target_of(device))


def _precision(tokens: torch.dtype) -> str:
    """Of products in float32: its own, unless torch has been told that tf32 will do."""
    return "tf32" if tokens == torch.float32 and _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    """What torch's own products on CUDA are in. Its older setting raises when read after the newer one was made."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        return matmul.allow_tf32
    return bool(matmul.fp32_precision == "tf32")
