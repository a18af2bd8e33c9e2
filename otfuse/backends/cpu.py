"""numba on a CPU: one fused pass a round, an item at a time in cache, threads over items.

The compiled code (``_cpu_kernels``) is cached on disk. ``otfuse.ops`` registers the two launchers with torch,
so that autograd, vmap, ``torch.compile`` and ``torch.export`` see one node each.

Letters: B batch, N rows, M columns, T rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from otfuse import attention
from otfuse.attention import Marginals
from otfuse.backends.base import Backend, Solution, is_installed
from otfuse.problem import Problem

# Matrix entries times rounds below which one more thread costs more than it brings: handing work over took
# some 50 µs where this was measured, in which one thread does about this many.
WORK_PER_THREAD = 400_000


class CpuBackend(Backend):
    name = "cpu"

    def unavailable(self) -> list[str]:
        return [] if is_installed("numba") else ["numba is not installed (pip install 'otfuse[cpu]')"]

    def unsupported(self, problem: Problem) -> list[str]:
        device = problem.values.device
        return [] if device.type == "cpu" else [f"the tensors are on '{device}' (needs CPU)"]

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        options, history = _options(problem, similarity, p.a, p.b)
        inputs = _detached(problem, similarity, p.a, p.b)
        return Solution(*torch.ops.otfuse.sinkhorn_cpu.default(*inputs, *options, history)[:5])

    def solve_tokens(self, x: Tensor, y: Tensor, p: Marginals, problem: Problem) -> tuple[Tensor, Solution]:
        options, history = _options(problem, x, y, p.a, p.b)
        inputs = _detached(problem, x, y, p.a, p.b)
        similarity, *outputs = torch.ops.otfuse.sinkhorn_tokens_cpu.default(
            *inputs, problem.similarity == "cosine", *options, history
        )
        if problem.grad == "detach" and torch.is_grad_enabled():
            similarity = attention.similarity(x, y, problem.similarity)  # the loss still learns through it
        return similarity, Solution(*outputs[:5])


def _options(problem: Problem, *inputs: Tensor) -> tuple[tuple[float, int, float, bool], bool]:
    """(epsilon, num_iters, tol, implicit), and whether a gradient is foreseen that needs the history."""
    tol = -1.0 if problem.tol is None else problem.tol
    history = problem.grad == "unroll" and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return (problem.epsilon, problem.num_iters, tol, problem.grad == "implicit"), history


def _detached(problem: Problem, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in inputs) if problem.grad == "detach" else inputs


def new_outputs(similarity: Tensor, num_iters: int, history: bool) -> tuple[Tensor, ...]:
    """Room for plan, f, g, marginal_error, num_iters, and the history [B, 1 + T, N + M] if wanted.

    The history is in float64: logarithms of scalings reach thousands at small epsilon, and what float32 would
    round away there is a factor on the gradient.
    """
    B, N, M = similarity.shape
    new = similarity.new_empty
    kept = 1 + num_iters if history else 0
    return (
        new((B, N, M)), new((B, N)), new((B, M)), new((B,)), new((B,), dtype=torch.int32),
        new((B, kept, N + M), dtype=torch.float64),
    )  # fmt: skip


def new_gradients(similarity: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return similarity.new_empty(similarity.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def launch_sinkhorn(
    similarity: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iters: int, tol: float, implicit: bool, history: bool
) -> tuple[Tensor, ...]:
    outputs = new_outputs(similarity, num_iters, history)
    call = _Call(similarity, num_iters)
    inputs = (*call.addresses(similarity, a, b), epsilon, num_iters, tol)
    call.over_items("solve_items", *inputs, outputs[-1].shape[1], call.addresses(*outputs))
    return outputs


def launch_sinkhorn_tokens(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    cosine: bool,
    epsilon: float,
    num_iters: int,
    tol: float,
    implicit: bool,
    history: bool,
) -> tuple[Tensor, ...]:
    products, turned = attention.token_products(x, y)
    similarity = products.new_empty(x.shape[0], x.shape[1], y.shape[1])
    outputs = new_outputs(similarity, num_iters, history)
    call = _Call(similarity, num_iters)
    tokens = (x.shape[2], *call.addresses(products), turned, *call.addresses(x, y), cosine, *call.addresses(a, b))
    room = (*call.addresses(similarity), outputs[-1].shape[1], call.addresses(*outputs))
    call.over_items("attend_items", *tokens, epsilon, num_iters, tol, *room)
    return similarity, *outputs


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
    history: Tensor,
    grad_plan: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = new_gradients(similarity, a, b)
    call = _Call(similarity, 2 * num_iters)
    passed = call.addresses(grad_plan, grad_f, grad_g, *gradients)
    if implicit:
        call.over_items("implicit_items", *call.addresses(plan), epsilon, passed)
    else:
        inputs = (*call.addresses(similarity, a, b), epsilon, *call.addresses(plan, rounds, history))
        call.over_items("unroll_items", *inputs, history.shape[1], passed)
    return gradients


class _Call:
    """One call of the compiled code: keeps alive what it hands over by address, and spreads items over threads."""

    def __init__(self, similarity: Tensor, rounds: int) -> None:
        self.shape = tuple(similarity.shape)
        self.dtype = similarity.dtype
        self.work = similarity.numel() * rounds
        self.alive: list[Tensor] = []

    def addresses(self, *tensors: Tensor) -> tuple[int, ...]:
        contiguous = [tensor.contiguous() for tensor in tensors]
        self.alive += contiguous
        return tuple([tensor.data_ptr() for tensor in contiguous])

    def over_items(self, name: str, *args: Any) -> None:
        """Call ``name(first, last, like, shape, *args)`` on as many threads as torch has and the work is worth.

        An item is always done by one thread in one order, so the result does not depend on how many there are.
        """
        from otfuse.backends import _cpu_kernels as kernels

        function: Callable[..., None] = getattr(kernels, name)
        like: Any = kernels.LIKE[self.dtype.itemsize]
        B = self.shape[0]
        threads = min(torch.get_num_threads(), B, self.work // WORK_PER_THREAD)
        if threads <= 1:
            function(0, B, like, self.shape, *args)
            return
        # More pieces than threads, since items that stop early or start far apart take different times.
        pieces = min(B, 4 * threads)
        bounds = [B * piece // pieces for piece in range(pieces + 1)]
        pool = _pool(os.getpid(), threads)
        jobs = [pool.submit(function, low, high, like, self.shape, *args) for low, high in pairwise(bounds)]
        for job in jobs:
            job.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence one pool a process. The compiled code runs without the GIL."""
    return ThreadPoolExecutor(threads, thread_name_prefix="otfuse")
