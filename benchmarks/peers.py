"""Other ways to the same plan, on the same cost and at the same number of rounds.

A peer that is not installed is left out; ``absent`` says why. None of these is a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otfuse.testing import per_item_log_domain


def solvers(cost: Tensor, epsilon: float, num_iters: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(name -> call that returns the plans [B, N, M], name -> why it is absent)."""
    present: dict[str, Callable[[], Any]] = {
        "per-item log-domain loop": lambda: per_item_log_domain(-cost, epsilon, num_iters),
        "batched scaling loop, bmm": lambda: batched_scaling(cost, epsilon, num_iters),
    }
    absent = {}
    for name, make in (("POT ot.batch sinkhorn", _pot), ("ott-jax vmap + jit, kernel mode", _ott)):
        try:
            present[name] = make(cost, epsilon, num_iters)
        except ImportError as missing:
            absent[name] = str(missing)
    return present, absent


def batched_scaling(cost: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The usual batched loop in PyTorch; autograd goes through it."""
    B, N, M = cost.shape
    kernel = torch.exp(-cost / epsilon)
    v = torch.ones(B, M, 1, dtype=cost.dtype)
    for _ in range(num_iters):
        u = (1 / N) / torch.bmm(kernel, v)
        v = (1 / M) / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT


def _pot(cost: Tensor, epsilon: float, num_iters: int) -> Callable[[], Any]:
    from ot.batch import bregman_projection_batch

    # Its loop counts from zero and stops on the worst item of the batch; a negative tolerance runs all rounds.
    return lambda: bregman_projection_batch(torch.exp(-cost / epsilon), max_iter=num_iters, tol=-1.0)["T"]


def _ott(cost: Tensor, epsilon: float, num_iters: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    # A threshold that cannot be met and one block of iterations: exactly num_iters rounds, columns first.
    solver = Sinkhorn(
        lse_mode=False, threshold=-1.0, min_iterations=num_iters, max_iterations=num_iters, inner_iterations=num_iters
    )

    def solve(one_cost: Any) -> Any:
        return solver(LinearProblem(Geometry(cost_matrix=one_cost, epsilon=epsilon))).matrix

    compiled, on_device = jax.jit(jax.vmap(solve)), jnp.asarray(cost.numpy())
    return lambda: compiled(on_device).block_until_ready()
