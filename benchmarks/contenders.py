"""Who is timed: our backends, ways to the same answer written here in plain PyTorch, other people's packages.

And why others are not. Each function of a package imports it when called, and raises ``ImportError``, or ``Unable``
with the reason, where it cannot take part. None of these packages is a dependency.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import otfuse
from benchmarks.answers import COLUMNS_FIRST, CONVERGED, ROWS_FIRST, Call, ours, with_gradient
from benchmarks.cases import Case, Workload
from otfuse._backends.select import BACKENDS
from otfuse._backends.triton.attend import INTERPRETED
from otfuse._problem import Problem, SolveOptions, cost_problem, token_problem
from otfuse.testing import per_item_log_domain

Attended = tuple[Tensor, Tensor]
Solve = Callable[[Tensor, float, int], Tensor]  # similarity [B, N, M], epsilon, iterations -> plan
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
HEAD = 64  # features of a head of ordinary attention
SIMULATED = ("triton", "tpc")  # on a CPU they run in an interpreter or an emulator
LARGEST_LOOP = 2**20  # entries of the largest batch for what is ten times slower than the rest, or compiled first
LARGEST_EAGER = 3e8  # entry-iterations: a second or two
LARGEST_SLOW = 1e9  # entry-iterations that any but the fastest take ten seconds for on a CPU
LOOPS = 32  # elements of the largest batch for what goes through it in Python
LARGEST = 2**18  # entries of the largest batch for what is slow on a CPU
CONVERGES = 2**14  # entries of the largest element that is held against the converged plan
INTERPRETED_ELEMENTS = 4  # at most, in Triton's interpreter, where nothing is timed
HYPER = (2, 4, 8, 16)  # sides of the matrices that hyper-connections have
EAGER, COMPILED, PER_ITEM = "log domain, eager", "log domain, torch.compile", "per-element log-domain loop"


@dataclass(frozen=True)
class Contender:
    """``call`` takes one copy of the inputs, as ``prepare`` made it, and returns the answer, as ``read`` finds it."""

    name: str
    call: Callable[..., Any]
    replayed: bool = True  # from a CUDA graph; False where its code looks at values on the way
    answers: bool = True  # False: it does something else, timed for comparison
    follows: str = ROWS_FIRST  # the answer that it is held against; CONVERGED where its iterations are of another kind
    note: str = ""  # what it is given, or gives, that is not as ours
    prepare: Callable[..., Sequence[Any]] = lambda *inputs: inputs  # before the clock: to the arrays of its library
    read: Callable[[Any], Sequence[Tensor]] = lambda outputs: outputs  # after the clock: to the tensors of the answer


def contenders_of(
    workload: Workload, inputs: Sequence[Tensor], compiler: Compiler, simulated: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """All peers where transport is what everybody else would do too, else our own backends.

    ``simulated``: the kernels in their interpreter or emulator instead of what is fast on a CPU, to try things out.
    """
    present, absent = our_backends(workload, inputs, simulated)
    fastest = present[0].name.removeprefix("otfuse ")
    if workload.tol is not None:
        to_the_end = Contender(f"otfuse {fastest}, all iterations", _ours(replace(workload, tol=None), fastest))
        return [*present, to_the_end], absent
    if workload.grad is not None:
        present.append(_forward_alone(workload, fastest))
    if workload.grad not in (None, "unroll"):
        return present, absent
    for peers, reasons in (written_here(workload, inputs[0].device, compiler), packages(workload, inputs[0].device)):
        present, absent = present + peers, absent | reasons
    if inputs[0].device.type == "cpu" and entry_iterations(workload) > LARGEST_SLOW:
        absent |= {peer.name: "on a CPU it would take minutes at this size" for peer in present[1:]}
        return present[:1], absent
    return present, absent


def entry_iterations(workload: Workload) -> int:
    case = workload.case
    return case.B * case.N * case.M * case.T


def our_backends(
    workload: Workload, inputs: Sequence[Tensor], simulated: bool = False
) -> tuple[list[Contender], dict[str, str]]:
    """The backends that run here, the fastest first."""
    present, absent, on_cpu = [], {}, inputs[0].device.type == "cpu"
    problem = _problem(workload, inputs)
    for backend in BACKENDS:
        name = f"otfuse {backend.name}"
        if reasons := backend.why_not(problem):
            absent[name] = "; ".join(reasons)
        elif on_cpu and backend.name in SIMULATED and not simulated:
            absent[name] = "on a CPU it runs in an interpreter or emulator, whose time says nothing"
        elif not (simulated and backend.name == "cpu"):
            # The implicit gradient of torch calls a library's linear solver, which may wait for the device.
            replayed = (backend.name, workload.grad) != ("torch", "implicit")
            present.append(Contender(name, _ours(workload, backend.name), replayed))
    return present, absent


def written_here(
    workload: Workload, device: torch.device, compiler: Compiler
) -> tuple[list[Contender], dict[str, str]]:
    """The ways in plain PyTorch."""
    wrap = with_gradient if workload.grad else lambda call: call

    def contender(name: str, solve: Solve) -> Contender:
        return Contender(name, wrap(bound(workload.op, solve, workload.case)))

    case, absent = workload.case, {}
    present = []
    if device.type == "cpu" and entry_iterations(workload) > LARGEST_EAGER:
        absent[EAGER] = "on a CPU it would take seconds at this size"
    else:
        present.append(contender(EAGER, batched_log_domain))
    common = workload.dtype == torch.float32 and workload.kind == "clustered"
    if case.B * case.N * case.M <= LARGEST_LOOP and (common or device.type != "cpu"):
        present.append(compiler.contender(COMPILED, workload.op, case, wrap, device))
    else:
        absent[COMPILED] = f"compiled up to {LARGEST_LOOP} entries only, on a CPU for clustered float32, to save time"
    if workload.op == "solve":
        present.append(contender("batched scaling loop, bmm", lambda s, *options: batched_scaling(-s, *options)))
    else:
        present.append(Contender("cross-attention (sdpa), no transport", wrap(cross_attention), answers=False))
    if workload.op == "attend" and workload.grad is None:
        present.append(Contender("three matrix products alone", three_products, answers=False))
    if case.B <= LOOPS and case.B * case.N * case.M <= LARGEST_LOOP:
        present.append(contender(PER_ITEM, per_item_log_domain))
    else:
        absent[PER_ITEM] = f"goes element by element: only up to B = {LOOPS} and {LARGEST_LOOP} entries"
    return present, absent


def _ours(workload: Workload, backend: str) -> Call:
    call = ours(workload, backend)
    return with_gradient(call) if workload.grad else call


def _forward_alone(workload: Workload, backend: str) -> Contender:
    """What a training step pays before its backward."""
    forward, count = ours(replace(workload, grad=None), backend), 1 if workload.op == "solve" else 2
    name = f"otfuse {backend}, forward alone"
    return Contender(name, lambda *inputs: forward(*inputs[:count]), answers=False)


def _problem(workload: Workload, inputs: Sequence[Tensor]) -> Problem:
    options = SolveOptions(workload.case.epsilon, workload.case.T, workload.tol, workload.grad or "unroll")
    if workload.op == "solve":
        return cost_problem(inputs[0], None, None, options)
    return token_problem(*inputs[:2], None, None, options, "cosine", "plan", False)


def iterated(iteration: Callable[..., tuple[Tensor, Tensor]]) -> Solve:
    """Plans by two logsumexp an iteration and nothing else, as one writes it in an afternoon; uniform weights.

    ``iteration``, from log_kernel and log_v to log_u and log_v, may be compiled.
    """

    def solve(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
        log_kernel = similarity / epsilon  # [B, N, M]
        log_v = torch.zeros_like(similarity[:, 0])
        for _ in range(num_iters):
            log_u, log_v = iteration(log_kernel, log_v)
        return torch.exp(log_kernel + log_u[:, :, None] + log_v[:, None, :])

    return solve


def log_domain_iteration(log_kernel: Tensor, log_v: Tensor) -> tuple[Tensor, Tensor]:
    _, N, M = log_kernel.shape
    log_u = -math.log(N) - torch.logsumexp(log_kernel + log_v[:, None, :], 2)
    return log_u, -math.log(M) - torch.logsumexp(log_kernel + log_u[:, :, None], 1)


batched_log_domain = iterated(log_domain_iteration)


def batched_scaling(cost: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """The usual batched loop in PyTorch; autograd goes through it."""
    B, N, M = cost.shape
    kernel = torch.exp(-cost / epsilon)
    v = torch.ones(B, M, 1, dtype=cost.dtype, device=cost.device)
    for _ in range(num_iters):
        u = (1 / N) / torch.bmm(kernel, v)
        v = (1 / M) / torch.bmm(kernel.mT, u)
    return u * kernel * v.mT


def cross_attention(x: Tensor, y: Tensor) -> Attended:
    """What ordinary attention costs on the same tokens, each side attending to the other, without projections."""
    return x + _multi_head(x, y), y + _multi_head(y, x)


def three_products(x: Tensor, y: Tensor) -> Attended:
    """The matrix products that no layer can do without."""
    similarity = torch.bmm(x, y.mT)
    return torch.bmm(similarity, y), torch.bmm(similarity.mT, x)


def bound(op: str, solve: Solve, case: Case) -> Callable[..., Sequence[Tensor]]:
    """Tokens to attended tokens, or a cost to its plan, in float32, with ``solve`` from similarity to plan."""

    def attend(x: Tensor, y: Tensor) -> Attended:
        wide_x, wide_y = x.float(), y.float()
        plan = solve(otfuse.similarity_matrix(wide_x, wide_y), case.epsilon, case.T)
        return torch.baddbmm(wide_x, plan, wide_y).to(x.dtype), torch.baddbmm(wide_y, plan.mT, wide_x).to(y.dtype)

    def plan(cost: Tensor) -> tuple[Tensor]:
        return (solve(-cost.float(), case.epsilon, case.T).to(cost.dtype),)

    return attend if op == "attend" else plan


def _multi_head(queries: Tensor, tokens: Tensor) -> Tensor:
    head = HEAD if queries.shape[2] % HEAD == 0 else queries.shape[2]
    q, k = (t.unflatten(2, (-1, head)).transpose(1, 2) for t in (queries, tokens))  # [B, heads, tokens, head]
    return scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Compiler:
    """torch.compile with a limit on the time spent on it in all.

    On a CPU an iteration is compiled and called in a loop: fifty written out keep a C++ compiler busy for minutes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds_left = seconds
        self._last: tuple[Any, ...] = ()  # what the compiled code at hand is for

    def contender(self, name: str, op: str, case: Case, wrap: Wrap, device: torch.device) -> Contender:
        """Compiled by its first call, backward too."""
        compiled: list[Callable[..., Any]] = []

        def call(*inputs: Tensor) -> Any:
            if not compiled:
                compiled.append(self._compiled(partial(self._make, op, case, wrap, device), inputs))
            return compiled[0](*inputs)

        return Contender(name, call, note="an iteration compiled" if device.type == "cpu" else "")

    def _make(self, op: str, case: Case, wrap: Wrap, device: torch.device) -> Callable[..., Any]:
        if device.type == "cpu":
            return wrap(bound(op, iterated(torch.compile(log_domain_iteration, dynamic=False)), case))
        return wrap(torch.compile(bound(op, batched_log_domain, case), dynamic=False))

    def _compiled(self, make: Callable[[], Callable[..., Any]], inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
        if self.seconds_left <= 0:
            raise TimeoutError("the time for compiling is spent (--compile-seconds)")
        start = time.perf_counter()
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if shapes != self._last or inputs[0].device.type != "cpu":
            torch._dynamo.reset()  # beyond a few shapes of one function it would quietly stop compiling
        self._last, compiled = shapes, make()
        try:
            compiled(*inputs)
        finally:
            self.seconds_left -= time.perf_counter() - start
        return compiled


class Unable(Exception):
    """The package is here and cannot do this."""


def packages(workload: Workload, device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """Those that take part, and why the others do not."""
    present, absent = [], {}
    for name, make in (SOLVERS if workload.op == "solve" else ATTENDERS).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other packages deprecate at import is not ours
                present.append(replace(make(workload, device), name=name))
        except (ImportError, Unable) as reason:
            absent[name] = str(reason)
    return present, absent


def pot_batch(workload: Workload, device: torch.device) -> Contender:
    from ot.batch import bregman_projection_batch

    _only(workload.grad is None, "timed without a backward only: by default its plan is a constant")

    def solve(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
        with similarity.device:  # it makes its first scalings wherever tensors are made by default
            # Its loop counts from zero and stops on the worst element of the batch; a negative tolerance runs all.
            return bregman_projection_batch(torch.exp(similarity / epsilon), max_iter=num_iters, tol=-1.0)["T"]

    return Contender("", bound(workload.op, solve, workload.case), replayed=False)


def pot_loop(workload: Workload, device: torch.device) -> Contender:
    import numpy as np
    import ot

    _only(device.type == "cpu", "its numpy form is for a CPU")
    _element_by_element(workload)
    _only(workload.grad is None, "timed without a backward only")
    case = workload.case
    a, b = (np.full(side, 1 / side, np.float32) for side in (case.N, case.M))

    def call(*costs: Any) -> Any:
        # A tolerance that cannot be met; errors are looked at every tenth iteration all the same.
        options = {"numItermax": case.T, "stopThr": -1.0, "warn": False}
        return np.stack([ot.bregman.sinkhorn_knopp(a, b, cost, case.epsilon, **options) for cost in costs])

    return Contender(
        "", call, follows=COLUMNS_FIRST, note="columns first; numpy",
        prepare=lambda cost: cost.float().numpy(), read=lambda plans: (torch.from_numpy(plans),),
    )  # fmt: skip


def geomloss(workload: Workload, device: torch.device) -> Contender:
    try:
        from geomloss.ot import solve_batch
    except ImportError as missing:
        raise ImportError(f"{missing} (solve_batch came with geomloss 0.3)") from missing

    _only(workload.grad is None, "timed without a backward only")
    case = workload.case
    _only(
        case.N * case.M <= CONVERGES, "its iterations are of another kind, and the converged plan is far at this size"
    )
    few = case.B * case.N * case.M <= LARGEST or device.type != "cpu"
    _only(few, "on a CPU it would take seconds at this size")

    def call(cost: Tensor) -> tuple[Tensor]:
        return (solve_batch(cost, reg=case.epsilon, max_iter=case.T).plan,)

    note = "symmetric iterations with annealing: held against the converged plan, from which it is still far"
    return Contender("", call, follows=CONVERGED, replayed=False, note=note)


def ott(workload: Workload, device: torch.device) -> Contender:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    _only(workload.grad is None, "timed without a backward only")
    _only(any(d.platform in (device.type, "gpu") for d in jax.devices()), f"jax has no {device.type} device here")
    _only(device.type == "cpu", "its arrays are not torch's: device events do not time it")
    case = workload.case
    # A threshold that cannot be met and one block of iterations: exactly T iterations.
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


def flash(workload: Workload, device: torch.device) -> Contender:
    """Half the squared distance of unit vectors is one minus the cosine: the same plan."""
    from flash_sinkhorn import SamplesLoss

    _only(device.type == "cuda", "it runs on CUDA only")
    _only(workload.grad is None, "timed without a backward only")
    _element_by_element(workload)
    case = workload.case
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

    return Contender("", attend, replayed=False, note="|x - y|²/2 of unit vectors; an element at a time")


def liger(workload: Workload, device: torch.device) -> Contender:
    """Sinkhorn of hyper-connections: square matrices of logits, rows that sum to one."""
    from liger_kernel.ops.mhc import mhc_split_sinkhorn_fwd

    case = workload.case
    tried_out = INTERPRETED and case.B <= INTERPRETED_ELEMENTS
    _only(device.type == "cuda" or tried_out, "it runs on CUDA only")
    _only(case.N == case.M and case.N in HYPER, f"it takes square matrices of {', '.join(map(str, HYPER))} only")
    _only(workload.dtype == torch.float32 and workload.grad is None, "timed in float32 without a backward only")
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


def _only(condition: bool, reason: str) -> None:
    if not condition:
        raise Unable(reason)


def _element_by_element(workload: Workload) -> None:
    _only(workload.case.B <= LOOPS, f"goes element by element: only up to B = {LOOPS}")


def _tokens_only(workload: Workload, device: torch.device) -> Contender:
    raise Unable("it takes tokens, not a cost: see the rows of attend")


Make = Callable[[Workload, torch.device], Contender]
SOLVERS: dict[str, Make] = {
    "POT ot.batch sinkhorn": pot_batch,
    "POT loop, numpy": pot_loop,
    "geomloss solve_batch": geomloss,
    "ott-jax vmap + jit, kernel mode": ott,
    "Liger-Kernel mHC": liger,
    "flash-sinkhorn": _tokens_only,
}
ATTENDERS: dict[str, Make] = {"POT ot.batch sinkhorn": pot_batch, "flash-sinkhorn": flash}
