"""Launchers of the kernels that hold an item's kernel matrix on chip: tokens, costs, and their gradients.

They stand behind the ops of ``ops.py``, and pass on what other kernels solve (``paths.py``).

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse import _ops as ops
from otfuse._backends.triton import ops as fused_ops
from otfuse._backends.triton.cluster import held_by
from otfuse._backends.triton.device import blocks, device_memory, launch_shape, precision
from otfuse._backends.triton.launch import (
    INTERPRETED,
    contiguous,
    history_mode,
    launch,
    model,
    new_like,
    on,
    sent,
    wanted,
)
from otfuse._backends.triton.paths import Path, choose, tile_side
from otfuse._backends.triton.small import launch_sinkhorn_small, launch_sinkhorn_small_backward
from otfuse._backends.triton.streaming import (
    launch_attend_large,
    launch_attend_large_backward,
    launch_sinkhorn_large,
    launch_sinkhorn_large_backward,
)
from otfuse._ops import LaunchOptions
from otfuse._problem import solve_dtype

_NO_TOKENS = {"COSINE": False, "BARYCENTRIC": False}


def path_of(values: Tensor, B: int, N: int, M: int, D: int) -> Path:
    """How a batch is solved, forward and backward: the launchers here are those of ``Path.ON_CHIP``."""
    return _path(B, N, M, D, values.dtype, values.device)


@lru_cache(maxsize=4096)
def _path(B: int, N: int, M: int, D: int, dtype: torch.dtype, device: torch.device) -> Path:
    return choose(B, N, M, D, dtype, device_memory(device), held_by(device))


def held_on(path: Path, device: torch.device) -> int:
    """Entries that a cluster holds, on the path that takes one, or 0."""
    return held_by(device) if path is Path.CLUSTER else 0


def launch_attend(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool,
    options: LaunchOptions, history: bool, plan: bool, similarity: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, N, D), M, dtype, device = x.shape, y.shape[1], x.dtype, x.device
    x, y, a, b = contiguous(x, y, a, b)
    models = _attend_models(B, N, M, options.num_iters, options.grad, history, plan, similarity, dtype, device)
    outputs = (torch.empty_like(x), torch.empty_like(y), *new_like(models))
    if B == 0:
        return outputs
    if (path := path_of(x, B, N, M, max(D, 1))) is not Path.ON_CHIP:  # tokens, even without features
        stored, held = path is not Path.RECOMPUTED, held_on(path, device)
        launch_attend_large(
            x, y, a, b, cosine, barycentric, options, history_mode(options.grad, history), stored, held,
            precision(dtype), outputs[0], outputs[1], outputs[2], outputs[3], outputs[4:],
        )  # fmt: skip
        return outputs
    shape = launch_shape(B, (N + M) * D * dtype.itemsize, D, device)
    sizes = blocks("forward", dtype, tile_side(N), tile_side(M), device)
    keep = history_mode(options.grad, history)
    form = {"COSINE": cosine, "BARYCENTRIC": barycentric, "STOPS": options.tol > 0, "HISTORY": keep}
    products = {"PRECISION": precision(dtype)}
    made = outputs[3] if similarity else None
    with on(device):
        if shape.similarity_first:
            made = outputs[4].new_empty(B, N, M) if made is None else made
            tiles = blocks("similarity", dtype, min(tile_side(N), 64), min(tile_side(M), 64), device)
            grid = (B, -(-N // tiles["BLOCK_N"]), -(-M // tiles["BLOCK_M"]))
            tokens = x, y, a, b, made, N, M, D
            launch(_kernels().similarity, grid, tokens, {"COSINE": cosine, **products, **tiles}, device)
        arguments = (
            x, y, made if shape.similarity_first else None, a, b,
            *outputs[:2], outputs[2] if plan else None, None if shape.similarity_first else made,
            *outputs[4:8], outputs[8] if history else None,
            N, M, D, shape.features, *options[:3],
        )  # fmt: skip
        launch(_kernels().attend_fwd, (B, shape.parts), arguments, {**form, **products, **sizes}, device)
    return outputs


@lru_cache(maxsize=4096)
def _attend_models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, plan: bool, similarity: bool,
    dtype: torch.dtype, device: torch.device,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of all outputs of a launch but x and y: as fused_ops.new_attended and new_solution."""
    solve = solve_dtype(dtype)
    matrices = [model((B if wanted else 0, N, M), solve, device) for wanted in (plan, similarity)]
    return *matrices, *_solution_models(B, N, M, num_iters, grad, history, dtype, device)


@lru_cache(maxsize=4096)
def _solution_models(
    B: int, N: int, M: int, num_iters: int, grad: int, history: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """As fused_ops.new_solution."""
    solve = solve_dtype(dtype)
    shapes, num_iters_shape = fused_ops.solution_shapes(B, N, M, num_iters, grad, history)
    f, g, error, kept = (model(shape, solve, device) for shape in shapes)
    return f, g, error, model(num_iters_shape, torch.int32, device), kept


def launch_attend_backward(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cosine: bool, barycentric: bool,
    options: LaunchOptions, rounds: Tensor, history: Tensor, *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, N, D), M = x.shape, y.shape[1]
    x, y, a, b = contiguous(x, y, a, b)
    gradients = fused_ops.new_gradients(x, y, a, b)
    if B == 0:
        return gradients
    if (path := path_of(x, B, N, M, max(D, 1))) is not Path.ON_CHIP:
        launch_attend_large_backward(
            x, y, a, b, cosine, barycentric, options, path is not Path.RECOMPUTED,
            held_on(path, x.device), precision(x.dtype),
            contiguous(rounds, history), sent(*grads), gradients,
        )  # fmt: skip
        return gradients
    shape = launch_shape(B, (N + M) * D * x.itemsize, D, x.device)
    sizes = blocks("backward", x.dtype, tile_side(N), tile_side(M), x.device)
    form = {"COSINE": cosine, "BARYCENTRIC": barycentric, "MODE": options.grad, "PRECISION": precision(x.dtype)}
    with on(x.device):
        arguments = (
            x, y, None, a, b, *contiguous(rounds, history), *sent(*grads),
            *gradients[:2], None, *map(wanted, gradients[2:]),
            N, M, D, shape.features, *options[:2],
        )  # fmt: skip
        launch(_kernels().attend_bwd, (B, shape.parts), arguments, {**form, **sizes}, x.device)
    return gradients


def launch_sinkhorn(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions, history: bool
) -> tuple[Tensor, ...]:
    B, N, M = cost.shape
    if path_of(cost, B, N, M, 0) is Path.SMALL:
        return launch_sinkhorn_small(cost, a, b, options, history)
    cost, a, b = contiguous(cost, a, b)
    models = _solution_models(B, N, M, options.num_iters, options.grad, history, cost.dtype, cost.device)
    plan, solution = torch.empty_like(cost), new_like(models)
    if B == 0:
        return plan, *solution
    if (path := path_of(cost, B, N, M, 0)) is not Path.ON_CHIP:
        held = held_on(path, cost.device)
        launch_sinkhorn_large(cost, a, b, options, history_mode(options.grad, history), held, plan, solution)
        return plan, *solution
    sizes = blocks("forward, cost", _solved_in(cost), tile_side(N), tile_side(M), cost.device)
    keep = history_mode(options.grad, history)
    form = {**_NO_TOKENS, "STOPS": options.tol > 0, "HISTORY": keep, "PRECISION": "ieee"}
    with on(cost.device):
        arguments = (
            None, None, cost, a, b, None, None, plan, None, *solution[:4],
            solution[4] if history else None, N, M, 0, 0, *options[:3],
        )  # fmt: skip
        launch(_kernels().attend_fwd, (B, 1), arguments, {**form, **sizes}, cost.device)
    return plan, *solution


def launch_sinkhorn_backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, options: LaunchOptions, rounds: Tensor, history: Tensor,
    *grads: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, N, M = cost.shape
    if path_of(cost, B, N, M, 0) is Path.SMALL:
        return launch_sinkhorn_small_backward(cost, a, b, options, rounds, history, *grads)
    cost, a, b = contiguous(cost, a, b)
    gradients = fused_ops.new_gradients(cost, a, b)
    if B == 0:
        return gradients
    if (path := path_of(cost, B, N, M, 0)) is not Path.ON_CHIP:
        kept, held = contiguous(rounds, history), held_on(path, cost.device)
        launch_sinkhorn_large_backward(cost, a, b, options, held, kept, sent(*grads), gradients)
        return gradients
    grad_plan, grad_f, grad_g = sent(*grads)
    sizes = blocks("backward", _solved_in(cost), tile_side(N), tile_side(M), cost.device)
    form = {**_NO_TOKENS, "MODE": options.grad, "PRECISION": "ieee"}
    with on(cost.device):
        arguments = (
            None, None, cost, a, b, *contiguous(rounds, history), None, None, grad_plan, None, grad_f, grad_g,
            None, None, gradients[0], *map(wanted, gradients[1:]),
            N, M, 0, 0, *options[:2],
        )  # fmt: skip
        launch(_kernels().attend_bwd, (B, 1), arguments, {**form, **sizes}, cost.device)
    return gradients


for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
    ops.implement("sinkhorn_attend_triton", launch_attend, _key)
    ops.implement("sinkhorn_attend_triton_backward", launch_attend_backward, _key)
    ops.implement("sinkhorn_triton", launch_sinkhorn, _key)
    ops.implement("sinkhorn_triton_backward", launch_sinkhorn_backward, _key)


class Kernels(NamedTuple):
    similarity: Any
    attend_fwd: Any
    attend_bwd: Any


@cache
def _kernels() -> Kernels:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import attend, attend_backward

    return Kernels(attend._similarity_kernel, attend._attend_fwd_kernel, attend_backward._attend_bwd_kernel)


def _solved_in(cost: Tensor) -> torch.dtype:
    """Costs are widened as they are read: their kernels are configured as for the dtype that they solve in."""
    return solve_dtype(cost.dtype)
