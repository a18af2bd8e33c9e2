"""Launchers of the compiled code: one fused pass an iteration, an item at a time in cache, threads over items.

The compiled code (``kernels.py``) is cached on disk.

Letters: B batch, N rows, M columns, T iterations.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, c_int64
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from otfuse import _ops as ops
from otfuse._backends.cpu.ops import new_gradients, new_solution
from otfuse._ops import LaunchOptions
from otfuse.kernels.constants import IMPLICIT

# Matrix entries times rounds that make another thread worth it. Handing eight empty pieces to two threads took
# 0.2 ms where this was measured; 64 x 20, 50 rounds: no gain at B = 32, 1.3 times as fast at 128, 1.5 at 512.
WORK_PER_THREAD = 4_000_000

CACHE = 512 * 1024  # bytes: half of a common second-level cache


def launch_sinkhorn(values: Tensor, a: Tensor, b: Tensor, options: LaunchOptions, history: bool) -> tuple[Tensor, ...]:
    outputs = new_solution(values, options.num_iters, history)
    call = _Call(values, options.num_iters)
    inputs = (*call.addresses(values, a, b), *options[:3])
    call.over_items("solve_items", *inputs, outputs[-1].shape[1], call.addresses(*outputs))
    return outputs


def launch_sinkhorn_tokens(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    cosine: bool,
    options: LaunchOptions,
    history: bool,
) -> tuple[Tensor, ...]:
    B, N, D = x.shape
    M = y.shape[1]
    # A small item's tokens stay in cache from the products to the norms; for a large one the library is faster.
    in_cache = (N + M) * D * x.itemsize <= CACHE and min(N, M) <= 64
    similarity = x.new_empty(B, N, M) if in_cache else torch.bmm(x, y.mT)
    outputs = new_solution(similarity, options.num_iters, history)
    call = _Call(similarity, options.num_iters + D if in_cache else options.num_iters)
    tokens = (D, *call.addresses(x, y), not in_cache, cosine, *call.addresses(a, b))
    room = (*call.addresses(similarity), outputs[-1].shape[1], call.addresses(*outputs))
    call.over_items("attend_items", *tokens, *options[:3], *room)
    return similarity, *outputs


def launch_sinkhorn_backward(
    values: Tensor,
    a: Tensor,
    b: Tensor,
    options: LaunchOptions,
    plan: Tensor,
    rounds: Tensor,
    history: Tensor,
    grad_plan: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = new_gradients(values, a, b)
    call = _Call(values, 2 * options.num_iters)
    passed = call.addresses(grad_plan, grad_f, grad_g, *gradients)
    if options.grad == IMPLICIT:
        call.over_items("implicit_items", *call.addresses(plan), options.scale, passed)
    else:
        inputs = (*call.addresses(values, a, b), options.scale, *call.addresses(plan, rounds, history))
        call.over_items("unroll_items", *inputs, history.shape[1], passed)
    return gradients


ops.implement("sinkhorn_cpu", launch_sinkhorn, "CPU")
ops.implement("sinkhorn_tokens_cpu", launch_sinkhorn_tokens, "CPU")
ops.implement("sinkhorn_cpu_backward", launch_sinkhorn_backward, "CPU")


_compiled: set[tuple[str, torch.dtype]] = set()


class _Call:
    """One call of the compiled code: keeps alive what it hands over by address, and spreads items over threads."""

    def __init__(self, similarity: Tensor, rounds: int) -> None:
        self.shape = tuple(similarity.shape)
        self.dtype = similarity.dtype
        self.work = similarity.numel() * rounds
        self.alive: list[Tensor] = []
        self.stop = c_int64(0)  # read by the compiled code at every iteration; not zero: it ends early

    def addresses(self, *tensors: Tensor) -> tuple[int, ...]:
        contiguous = [tensor.contiguous() for tensor in tensors]
        self.alive += contiguous
        return tuple([tensor.data_ptr() for tensor in contiguous])

    def over_items(self, name: str, *args: Any) -> None:
        """Call ``name(first, last, stop, like, shape, *args)`` on as many threads as torch has and the work is worth.

        An item is always done by one thread in one order, so the result does not depend on how many there are.
        """
        from otfuse._backends.cpu import kernels  # numba is imported, and compiles, when something is solved

        function: Callable[..., None] = getattr(kernels, name)
        like: Any = kernels.LIKE[self.dtype.itemsize]

        def solve(first: int, last: int) -> None:
            """A thread that runs this owns the tensors through ``self``, whatever becomes of the caller."""
            function(first, last, addressof(self.stop), like, self.shape, *args)

        B = self.shape[0]
        threads = min(torch.get_num_threads(), B, self.work // WORK_PER_THREAD)
        if threads <= 1:
            solve(0, B)
            return
        if (name, self.dtype) not in _compiled:  # here, since to compile in another thread cannot be interrupted
            solve(0, 0)
            _compiled.add((name, self.dtype))
        # More pieces than threads, since items that stop early or start far apart take different times.
        pieces = min(B, 4 * threads)
        bounds = [B * piece // pieces for piece in range(pieces + 1)]
        _on_threads(threads, deque(pairwise(bounds)), solve, self.stop)


def _on_threads(threads: int, pieces: deque[tuple[int, int]], solve: Callable[[int, int], None], stop: c_int64) -> None:
    """Call ``solve`` for all pieces, and return or raise when none is being solved.

    In the caller a signal's handler may raise at any time: Ctrl+C, an alarm. Hence no lock here that an interrupted
    caller could leave locked, and nothing that is true for a moment only: to be interrupted costs the caller at most
    a message, and a message says no more than that it is time to look again.
    """
    solving: deque[None] = deque()  # an entry for each thread that may have taken a piece
    ended: SimpleQueue[None] = SimpleQueue()
    errors: list[BaseException] = []

    def take_pieces() -> None:
        while True:
            try:
                first, last = pieces.popleft()
            except IndexError:
                return
            solve(first, last)

    def work() -> None:
        solving.append(None)
        try:
            take_pieces()
        except BaseException as error:
            errors.append(error)
            cancel()
        finally:
            solving.pop()
            ended.put(None)

    def cancel() -> None:
        pieces.clear()
        stop.value = 1

    try:
        try:
            for _ in range(threads):
                _pool(os.getpid(), threads).submit(work)
        except RuntimeError:  # no new thread: the interpreter is ending, or the system has none to give
            take_pieces()
        while pieces or solving:
            ended.get()
    finally:
        cancel()
        while solving:
            try:
                ended.get()
            except BaseException:  # interrupted once more; the first exception is on its way
                continue
    if errors:
        raise errors.pop(0)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence one pool a process. The compiled code runs without the GIL."""
    return ThreadPoolExecutor(threads, thread_name_prefix="otfuse")
