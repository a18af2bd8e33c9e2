"""numba on a CPU: one fused pass a round, an item at a time in cache, threads over items.

The compiled code (``_cpu_kernels``) is cached on disk. ``otfuse.ops`` registers the two launchers with torch,
so that autograd, vmap, ``torch.compile`` and ``torch.export`` see one node each.

Letters: B batch, N rows, M columns, T rounds.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from otfuse.attention import Marginals
from otfuse.backends.base import Backend, Solution
from otfuse.problem import Problem

# Matrix entries times rounds below which one more thread costs more than it brings: handing work over took
# some 50 µs where this was measured, in which one thread does about this many.
WORK_PER_THREAD = 400_000


class CpuBackend(Backend):
    name = "cpu"

    def unavailable(self) -> list[str]:
        missing = importlib.util.find_spec("numba") is None
        return ["numba is not installed (pip install 'otfuse[cpu]')"] if missing else []

    def unsupported(self, problem: Problem) -> list[str]:
        device = problem.values.device
        return [] if device.type == "cpu" else [f"the tensors are on '{device}' (needs CPU)"]

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        inputs = (similarity, p.a, p.b)
        if problem.grad == "detach":
            inputs = (similarity.detach(), p.a.detach(), p.b.detach())
        history = problem.grad == "unroll" and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        tol = -1.0 if problem.tol is None else problem.tol
        outputs = torch.ops.otfuse.sinkhorn_cpu(
            *inputs, problem.epsilon, problem.num_iters, tol, problem.grad == "implicit", history
        )
        return Solution(*outputs[:5])


def new_outputs(similarity: Tensor, history: int) -> tuple[Tensor, ...]:
    """Room for plan, f, g, marginal_error, num_iters, u_history, v_history, forms, shifts."""
    B, N, M = similarity.shape
    new = similarity.new_empty
    # The history is in float64: logarithms of scalings reach thousands at small epsilon, and what float32
    # would round away there is a factor on the gradient.
    return (
        new((B, N, M)), new((B, N)), new((B, M)), new((B,)), new((B,), dtype=torch.int32),
        new((B, history, N), dtype=torch.float64), new((B, history, M), dtype=torch.float64),
        new((B,), dtype=torch.int32), new((B,), dtype=torch.float64),
    )  # fmt: skip


def new_gradients(similarity: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return similarity.new_empty(similarity.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def launch_sinkhorn(
    similarity: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    num_iters: int,
    tol: float,
    implicit: bool,
    history: bool,
) -> tuple[Tensor, ...]:
    from otfuse.backends import _cpu_kernels as kernels

    outputs = new_outputs(similarity, num_iters if history else 0)
    arrays = _arrays(similarity, a, b)
    _over_items(similarity, num_iters, kernels.solve_items, *arrays, epsilon, num_iters, tol, *_arrays(*outputs))
    return outputs


def launch_sinkhorn_backward(
    similarity: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    num_iters: int,
    tol: float,
    implicit: bool,
    plan: Tensor,
    rounds: Tensor,
    u_history: Tensor,
    v_history: Tensor,
    forms: Tensor,
    shifts: Tensor,
    grad_plan: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from otfuse.backends import _cpu_kernels as kernels

    gradients = new_gradients(similarity, a, b)
    incoming = _arrays(grad_plan, grad_f, grad_g)
    if implicit:
        saved = (*_arrays(plan), epsilon, *_arrays(forms))
        _over_items(similarity, num_iters, kernels.implicit_items, *saved, *incoming, *_arrays(*gradients))
    else:
        saved = (
            *_arrays(similarity, a, b),
            epsilon,
            *_arrays(plan, forms, shifts, rounds, u_history, v_history),
        )
        _over_items(similarity, 2 * num_iters, kernels.unroll_items, *saved, *incoming, *_arrays(*gradients))
    return gradients


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


def _over_items(similarity: Tensor, rounds: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(first, last, *args)`` over the batch, on as many threads as torch has and the work is worth.

    An item is always done by one thread in one order, so the result does not depend on how many there are.
    """
    B = similarity.shape[0]
    threads = min(torch.get_num_threads(), B, similarity.numel() * rounds // WORK_PER_THREAD)
    if threads <= 1:
        function(0, B, *args)
        return
    # More pieces than threads, since items that stop early or start far apart take different times.
    pieces = min(B, 4 * threads)
    bounds = [B * piece // pieces for piece in range(pieces + 1)]
    jobs = [_pool(os.getpid(), threads).submit(function, *piece, *args) for piece in pairwise(bounds)]
    for job in jobs:
        job.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence one pool a process. The compiled code runs without the GIL."""
    return ThreadPoolExecutor(threads, thread_name_prefix="otfuse")
