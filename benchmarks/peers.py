"""Other ways to the same plan, or the same attended tokens, at the same number of rounds.

A peer that is not installed is left out; ``absent`` says why. None of these is a dependency.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Contender
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import otfuse
from otfuse.testing import per_item_log_domain, specified_attend

Attended = tuple[Tensor, Tensor]
HEAD = 64  # features of a head of ordinary attention
LOOPS = 32  # items of the largest batch for what goes through it in Python


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


class Compiler:
    """torch.compile with a limit on the time spent on it in all: fifty rounds written out are much to compile."""

    def __init__(self, seconds: float) -> None:
        self.seconds_left = seconds

    def contender(self, name: str, function: Callable[..., Any], wrap: Callable[..., Any]) -> Contender:
        """``wrap(compiled function)``, compiled by its first call, backward too."""
        compiled: list[Callable[..., Any]] = []

        def call(*inputs: Tensor) -> Any:
            if not compiled:
                compiled.append(self._compiled(function, wrap, inputs))
            return compiled[0](*inputs)

        return Contender(name, call)

    def _compiled(self, function: Callable[..., Any], wrap: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        if self.seconds_left <= 0:
            raise TimeoutError("the time for compiling is spent")
        start = time.perf_counter()
        torch._dynamo.reset()  # beyond a few shapes of one function it would quietly stop compiling
        compiled = wrap(torch.compile(function, dynamic=False))
        try:
            compiled(*inputs)
        finally:
            self.seconds_left -= time.perf_counter() - start
        return compiled


def attends(epsilon: float, num_iters: int, grad: str | None) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that take tokens x [B, N, D], y [B, M, D] and return both attended; and why others are absent."""
    present = [
        Contender("log domain, eager", log_domain_attend(epsilon, num_iters)),
        Contender("specification, float32", lambda x, y: specified_attend(x, y, epsilon, num_iters=num_iters)[:2]),
        Contender("cross-attention (sdpa), no transport", cross_attention, answers=False),
    ]
    name = "POT ot.batch sinkhorn"
    if grad is not None:
        return present, {name: "timed without a backward only: by default its plan is a constant"}
    try:
        present.append(Contender(name, _around(_pot_on_device(epsilon, num_iters)), replayed=False))
    except ImportError as missing:
        return present, {name: str(missing)}
    return present, {}


def loops(B: int, epsilon: float, num_iters: int) -> tuple[list[Contender], dict[str, str]]:
    """Those that solve an item at a time, for batches of up to LOOPS."""
    names = "per-item log-domain loop", "flash-sinkhorn, an item at a time (|x - y|²/2 of unit vectors)"
    if B > LOOPS:
        return [], dict.fromkeys(names, f"goes item by item: only up to B = {LOOPS}")
    per_item = partial(per_item_log_domain, epsilon=epsilon, num_iters=num_iters)
    present, absent = [Contender(names[0], _around(per_item))], {}
    try:
        present.append(Contender(names[1], _flash(epsilon, num_iters), replayed=False))
    except ImportError as missing:
        absent[names[1]] = str(missing)
    return present, absent


def log_domain_attend(epsilon: float, num_iters: int) -> Callable[[Tensor, Tensor], Attended]:
    return _around(partial(batched_log_domain, epsilon=epsilon, num_iters=num_iters))


def batched_log_domain(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """Plans by two logsumexp a round and nothing else, as one writes it in an afternoon; uniform weights."""
    _, N, M = similarity.shape
    log_kernel = similarity / epsilon  # [B, N, M]
    log_v = torch.zeros_like(similarity[:, 0])
    for _ in range(num_iters):
        log_u = -math.log(N) - torch.logsumexp(log_kernel + log_v[:, None, :], 2)
        log_v = -math.log(M) - torch.logsumexp(log_kernel + log_u[:, :, None], 1)
    return torch.exp(log_kernel + log_u[:, :, None] + log_v[:, None, :])


def cross_attention(x: Tensor, y: Tensor) -> Attended:
    """What ordinary attention costs on the same tokens, each side attending to the other, without projections."""
    return x + _multi_head(x, y), y + _multi_head(y, x)


def with_gradient(call: Callable[..., Attended]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Forward and backward: tokens and the gradients sent to the outputs in, gradients of the tokens out."""

    def gradients(x: Tensor, y: Tensor, *sent: Tensor) -> tuple[Tensor, Tensor]:
        # Leaves made here: those of another stream could not be waited for while a graph is captured.
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
        return torch.autograd.grad(call(*leaves), leaves, sent)

    return gradients


def _around(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Attended]:
    """Tokens to attended tokens, in float32, with ``solve`` from similarity to plan in between."""

    def attend(x: Tensor, y: Tensor) -> Attended:
        wide_x, wide_y = x.float(), y.float()
        plan = solve(otfuse.similarity_matrix(wide_x, wide_y))
        return torch.baddbmm(wide_x, plan, wide_y).to(x.dtype), torch.baddbmm(wide_y, plan.mT, wide_x).to(y.dtype)

    return attend


def _multi_head(queries: Tensor, tokens: Tensor) -> Tensor:
    head = HEAD if queries.shape[2] % HEAD == 0 else queries.shape[2]
    q, k = (t.unflatten(2, (-1, head)).transpose(1, 2) for t in (queries, tokens))  # [B, heads, tokens, head]
    return scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def _pot_on_device(epsilon: float, num_iters: int) -> Callable[[Tensor], Tensor]:
    from ot.batch import bregman_projection_batch

    def solve(similarity: Tensor) -> Tensor:
        with similarity.device:  # it makes its first scalings wherever tensors are made by default
            return bregman_projection_batch(torch.exp(similarity / epsilon), max_iter=num_iters, tol=-1.0)["T"]

    return solve


def _flash(epsilon: float, num_iters: int) -> Callable[[Tensor, Tensor], Attended]:
    """Half the squared distance of unit vectors is one minus the cosine: the same plan."""
    from flash_sinkhorn import SamplesLoss

    solver = SamplesLoss(
        backend="alternating", use_epsilon_scaling=False, eps=epsilon, n_iters=num_iters, half_cost=True, debias=False,
        potentials=True, allow_tf32=False, autotune=False,
    )  # fmt: skip

    def attend(x: Tensor, y: Tensor) -> Attended:
        f, g = solver(normalize(x.float(), dim=-1), normalize(y.float(), dim=-1))

        def plan(similarity: Tensor) -> Tensor:
            _, N, M = similarity.shape
            return torch.exp((f[:, :, None] + g[:, None, :] + similarity - 1) / epsilon) / (N * M)

        return _around(plan)(x, y)

    return attend
