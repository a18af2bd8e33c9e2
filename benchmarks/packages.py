"""Other people's packages as contenders, from cost to plan or from tokens to attended tokens.

Each function imports its package when called, and raises ``ImportError``, or ``Unable`` with the reason, where it
cannot take part. None of these packages is a dependency.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from measured import Measured
from peers import Attended, bound
from timing import COLUMNS_FIRST, CONVERGED, Contender
from torch import Tensor
from torch.nn.functional import normalize

LOOPS = 32  # items of the largest batch for what goes through it in Python
LARGEST = 2**18  # entries of the largest batch for what is slow on a CPU
CONVERGES = 2**14  # entries of the largest item that is held against the end of the way
INTERPRETED_ITEMS = 4  # at most, in Triton's interpreter, where nothing is timed
HYPER = (2, 4, 8, 16)  # sides of the matrices that hyper-connections have


class Unable(Exception):
    """The package is here and cannot do this."""


def packages(measured: Measured, device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """Those that take part, and why the others do not."""
    present, absent = [], {}
    for name, make in (SOLVERS if measured.op == "solve" else ATTENDERS).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other packages deprecate at import is not ours
                present.append(replace(make(measured, device), name=name))
        except (ImportError, Unable) as reason:
            absent[name] = str(reason)
    return present, absent


def pot_batch(measured: Measured, device: torch.device) -> Contender:
    from ot.batch import bregman_projection_batch

    _only(measured.grad is None, "timed without a backward only: by default its plan is a constant")

    def solve(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
        with similarity.device:  # it makes its first scalings wherever tensors are made by default
            # Its loop counts from zero and stops on the worst item of the batch; a negative tolerance runs all rounds.
            return bregman_projection_batch(torch.exp(similarity / epsilon), max_iter=num_iters, tol=-1.0)["T"]

    return Contender("", bound(measured.op, solve, measured.case), replayed=False)


def pot_loop(measured: Measured, device: torch.device) -> Contender:
    import numpy as np
    import ot

    _only(device.type == "cpu", "its numpy form is for a CPU")
    _item_by_item(measured)
    _only(measured.grad is None, "timed without a backward only")
    case = measured.case
    a, b = (np.full(side, 1 / side, np.float32) for side in (case.N, case.M))

    def call(*costs: Any) -> Any:
        # A tolerance that cannot be met; errors are looked at every tenth round all the same.
        options = {"numItermax": case.T, "stopThr": -1.0, "warn": False}
        return np.stack([ot.bregman.sinkhorn_knopp(a, b, cost, case.epsilon, **options) for cost in costs])

    return Contender(
        "", call, follows=COLUMNS_FIRST, note="columns first; numpy",
        prepare=lambda cost: cost.float().numpy(), read=lambda plans: (torch.from_numpy(plans),),
    )  # fmt: skip


def geomloss(measured: Measured, device: torch.device) -> Contender:
    try:
        from geomloss.ot import solve_batch
    except ImportError as missing:
        raise ImportError(f"{missing} (solve_batch came with geomloss 0.3)") from missing

    _only(measured.grad is None, "timed without a backward only")
    case = measured.case
    _only(case.N * case.M <= CONVERGES, "its rounds are of another kind, and the end of the way is far at this size")
    few = case.B * case.N * case.M <= LARGEST or device.type != "cpu"
    _only(few, "on a CPU it would take seconds at this size")

    def call(cost: Tensor) -> tuple[Tensor]:
        return (solve_batch(cost, reg=case.epsilon, max_iter=case.T).plan,)

    note = "symmetric rounds with annealing: held against the converged plan, from which it is still far"
    return Contender("", call, follows=CONVERGED, replayed=False, note=note)


def ott(measured: Measured, device: torch.device) -> Contender:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    _only(measured.grad is None, "timed without a backward only")
    _only(any(d.platform in (device.type, "gpu") for d in jax.devices()), f"jax has no {device.type} device here")
    _only(device.type == "cpu", "its arrays are not torch's: device events do not time it")
    case = measured.case
    # A threshold that cannot be met and one block of iterations: exactly T rounds.
    solver = Sinkhorn(
        lse_mode=False, threshold=-1.0, min_iterations=case.T, max_iterations=case.T, inner_iterations=case.T
    )

    def solve(cost: Any) -> Any:
        return solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=case.epsilon))).matrix

    compiled = jax.jit(jax.vmap(solve))

    return Contender(
        "", lambda cost: compiled(cost).block_until_ready(), follows=COLUMNS_FIRST, note="columns first",
        prepare=lambda cost: (jnp.asarray(cost.float().numpy()),),
        read=lambda plan: (torch.from_numpy(np.array(plan)),),
    )  # fmt: skip


def flash(measured: Measured, device: torch.device) -> Contender:
    """Half the squared distance of unit vectors is one minus the cosine: the same plan."""
    from flash_sinkhorn import SamplesLoss

    _only(device.type == "cuda", "it runs on CUDA only")
    _only(measured.grad is None, "timed without a backward only")
    _item_by_item(measured)
    case = measured.case
    solver = SamplesLoss(
        backend="alternating", use_epsilon_scaling=False, eps=case.epsilon, n_iters=case.T, half_cost=True,
        debias=False, potentials=True, allow_tf32=False, autotune=False,
    )  # fmt: skip

    def attend(x: Tensor, y: Tensor) -> Attended:
        f, g = solver(normalize(x.float(), dim=-1), normalize(y.float(), dim=-1))

        def plan(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
            _, N, M = similarity.shape
            return torch.exp((f[:, :, None] + g[:, None, :] + similarity - 1) / epsilon) / (N * M)

        return bound("attend", plan, case)(x, y)

    return Contender("", attend, replayed=False, note="|x - y|²/2 of unit vectors; an item at a time")


def liger(measured: Measured, device: torch.device) -> Contender:
    """Sinkhorn of hyper-connections: square matrices of logits, rows that sum to one."""
    from liger_kernel.ops.mhc import mhc_split_sinkhorn_fwd

    case = measured.case
    tried_out = _interpreted() and case.B <= INTERPRETED_ITEMS
    _only(device.type == "cuda" or tried_out, "it runs on CUDA only")
    _only(case.N == case.M and case.N in HYPER, f"it takes square matrices of {', '.join(map(str, HYPER))} only")
    _only(measured.dtype == torch.float32 and measured.grad is None, "timed in float32 without a backward only")
    side = case.N
    size = side * side + 2 * side
    zeros, one = torch.zeros(size, device=device), torch.ones(1, device=device)
    options = {"tmax": case.T, "pre_eps": 0.0, "sinkhorn_eps": 0.0, "post_mult": 1.0}

    def prepare(cost: Tensor) -> Sequence[Tensor]:
        others = cost.new_zeros(len(cost), 2 * side)  # its two other outputs are functions of these
        return (torch.cat((others, -cost.flatten(1) / case.epsilon), 1).contiguous(),)

    def call(mixed: Tensor) -> Tensor:
        return mhc_split_sinkhorn_fwd(mixed, zeros, one, one, one, **options)[2]

    note = "logits, not a cost; rows of its plan sum to one; it makes two more small outputs"
    return Contender("", call, prepare=prepare, read=lambda plan: (plan / side,), note=note)


def _interpreted() -> bool:
    from otfuse._backends.triton.attend import INTERPRETED

    return INTERPRETED


def _only(condition: bool, reason: str) -> None:
    if not condition:
        raise Unable(reason)


def _item_by_item(measured: Measured) -> None:
    _only(measured.case.B <= LOOPS, f"goes item by item: only up to B = {LOOPS}")


def _tokens_only(measured: Measured, device: torch.device) -> Contender:
    raise Unable("it takes tokens, not a cost: see the rows of attend")


Make = Callable[[Measured, torch.device], Contender]
POT, FLASH = "POT ot.batch sinkhorn", "flash-sinkhorn"
SOLVERS: dict[str, Make] = {
    POT: pot_batch,
    "POT loop, numpy": pot_loop,
    "geomloss solve_batch": geomloss,
    "ott-jax vmap + jit, kernel mode": ott,
    "Liger-Kernel mHC": liger,
    FLASH: _tokens_only,
}
ATTENDERS: dict[str, Make] = {POT: pot_batch, FLASH: flash}
