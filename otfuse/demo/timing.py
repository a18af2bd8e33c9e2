"""The time of `sinkhorn_attend` beside the loop over items that people write today."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import otfuse

BATCHES = (1, 32)
NUM_RUNS = 9


@dataclass(frozen=True)
class Timing:
    """Medians in seconds of NUM_RUNS interleaved runs."""

    batch: int
    ours: float
    loop: float


def per_item_loop(x: Tensor, y: Tensor, epsilon: float, num_iters: int) -> tuple[Tensor, Tensor]:
    """`sinkhorn_attend` the way it is written today: an item at a time, in the log domain, round by round."""
    x_out, y_out = [], []
    for x_i, y_i in zip(x, y, strict=True):
        similarity = torch.nn.functional.normalize(x_i, dim=1) @ torch.nn.functional.normalize(y_i, dim=1).mT
        log_kernel = similarity / epsilon  # [N, M]
        log_a, log_b = -math.log(len(x_i)), -math.log(len(y_i))
        log_v = log_kernel.new_zeros(len(y_i))
        for _ in range(num_iters):
            log_u = log_a - torch.logsumexp(log_kernel + log_v[None, :], dim=1)
            log_v = log_b - torch.logsumexp(log_kernel + log_u[:, None], dim=0)
        plan = torch.exp(log_kernel + log_u[:, None] + log_v[None, :])
        x_out.append(x_i + plan @ y_i)
        y_out.append(y_i + plan.mT @ x_i)
    return torch.stack(x_out), torch.stack(y_out)


@torch.no_grad()
def time_beside_loop(x: Tensor, y: Tensor, epsilon: float, num_iters: int, backend: str) -> list[Timing]:
    """Time both on x [N, D] and y [M, D], alone and as a batch of equal items."""
    timings = []
    for batch in BATCHES:
        x_batch, y_batch = x.repeat(batch, 1, 1), y.repeat(batch, 1, 1)
        ours: Callable[[], object] = partial(
            otfuse.sinkhorn_attend, x_batch, y_batch, epsilon, num_iters=num_iters, backend=backend
        )
        loop: Callable[[], object] = partial(per_item_loop, x_batch, y_batch, epsilon, num_iters)
        seconds: list[list[float]] = [[], []]
        for _ in range(2 + NUM_RUNS):
            for call, spent in zip((ours, loop), seconds, strict=True):
                spent.append(_seconds(call, x.device))
        timings.append(Timing(batch, *(statistics.median(spent[2:]) for spent in seconds)))
    return timings


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def conditions(device: torch.device) -> str:
    """Where and how the times were taken."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{device.type}, {torch.get_num_threads()} thread(s)"
    return f"{machine}, torch {torch.__version__}, float32, median of {NUM_RUNS} interleaved runs"
