"""Who takes part in a measurement: our backends first, then other ways to the same answer; and why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from measured import Call, Measured, ours
from packages import LOOPS, packages
from peers import (
    Compiler,
    Solve,
    batched_log_domain,
    batched_scaling,
    bound,
    cross_attention,
    per_item,
    three_products,
    with_gradient,
)
from timing import Contender
from torch import Tensor

from otfuse._backends.select import BACKENDS
from otfuse._problem import Problem, cost_problem, token_problem

Field = tuple[list[Contender], dict[str, str]]
SIMULATED = ("triton", "tpc")  # on a CPU they run in an interpreter or an emulator
LARGEST_LOOP = 2**20  # entries of the largest batch for what is ten times slower than the rest, or compiled first
LARGEST_EAGER = 3e8  # entry-rounds: a second or two
LARGEST_SLOW = 1e9  # entry-rounds that any but the fastest take ten seconds for on a CPU
EAGER, COMPILED, PER_ITEM = (
    "log domain, eager", "log domain, torch.compile", "per-item log-domain loop",
)  # fmt: skip


def field(measured: Measured, inputs: Sequence[Tensor], compiler: Compiler, simulated: bool = False) -> Field:
    """All peers where transport is what everybody else would do too, else our own backends.

    ``simulated``: the kernels in their interpreter or emulator instead of what is fast on a CPU, to try things out.
    """
    present, absent = own(measured, inputs, simulated)
    fastest = present[0].name.removeprefix("otfuse ")
    if measured.tol is not None:
        all_rounds = Contender(f"otfuse {fastest}, all rounds", _ours(replace(measured, tol=None), fastest))
        return [*present, all_rounds], absent
    if measured.grad is not None:
        present.append(_forward_alone(measured, fastest))
    if measured.grad not in (None, "unroll"):
        return present, absent
    for peers, reasons in (written_here(measured, inputs[0].device, compiler), packages(measured, inputs[0].device)):
        present, absent = present + peers, absent | reasons
    if inputs[0].device.type == "cpu" and entry_rounds(measured) > LARGEST_SLOW:
        absent |= {peer.name: "on a CPU it would take minutes at this size" for peer in present[1:]}
        return present[:1], absent
    return present, absent


def entry_rounds(measured: Measured) -> int:
    case = measured.case
    return case.B * case.N * case.M * case.T


def own(measured: Measured, inputs: Sequence[Tensor], simulated: bool = False) -> Field:
    """The backends that run here, the fastest first."""
    present, absent, on_cpu = [], {}, inputs[0].device.type == "cpu"
    problem = _problem(measured, inputs)
    for backend in BACKENDS:
        name = f"otfuse {backend.name}"
        if reasons := backend.why_not(problem):
            absent[name] = "; ".join(reasons)
        elif on_cpu and backend.name in SIMULATED and not simulated:
            absent[name] = "on a CPU it runs in an interpreter or emulator, whose time says nothing"
        elif not (simulated and backend.name == "cpu"):
            # The implicit gradient of torch calls a library's linear solver, which may wait for the device.
            replayed = (backend.name, measured.grad) != ("torch", "implicit")
            present.append(Contender(name, _ours(measured, backend.name), replayed))
    return present, absent


def written_here(measured: Measured, device: torch.device, compiler: Compiler) -> Field:
    """The ways in plain PyTorch."""
    wrap = with_gradient if measured.grad else lambda call: call

    def contender(name: str, solve: Solve) -> Contender:
        return Contender(name, wrap(bound(measured.op, solve, measured.case)))

    case, absent = measured.case, {}
    present = []
    if device.type == "cpu" and entry_rounds(measured) > LARGEST_EAGER:
        absent[EAGER] = "on a CPU it would take seconds at this size"
    else:
        present.append(contender(EAGER, batched_log_domain))
    common = measured.dtype == torch.float32 and measured.kind == "clustered"
    if case.B * case.N * case.M <= LARGEST_LOOP and (common or device.type != "cpu"):
        present.append(compiler.contender(COMPILED, measured.op, case, wrap, device))
    else:
        absent[COMPILED] = f"compiled up to {LARGEST_LOOP} entries only, on a CPU for clustered float32, to save time"
    if measured.op == "solve":
        present.append(contender("batched scaling loop, bmm", lambda s, *options: batched_scaling(-s, *options)))
    else:
        present.append(Contender("cross-attention (sdpa), no transport", wrap(cross_attention), answers=False))
    if measured.op == "attend" and measured.grad is None:
        present.append(Contender("three matrix products alone", three_products, answers=False))
    if case.B <= LOOPS and case.B * case.N * case.M <= LARGEST_LOOP:
        present.append(contender(PER_ITEM, per_item))
    else:
        absent[PER_ITEM] = f"goes item by item: only up to B = {LOOPS} and {LARGEST_LOOP} entries"
    return present, absent


def _ours(measured: Measured, backend: str) -> Call:
    call = ours(measured, backend)
    return with_gradient(call) if measured.grad else call


def _forward_alone(measured: Measured, backend: str) -> Contender:
    """What a training step pays before its backward."""
    forward, count = ours(replace(measured, grad=None), backend), 1 if measured.op == "solve" else 2
    name = f"otfuse {backend}, forward alone"
    return Contender(name, lambda *inputs: forward(*inputs[:count]), answers=False)


def _problem(measured: Measured, inputs: Sequence[Tensor]) -> Problem:
    case, grad = measured.case, measured.grad or "unroll"
    if measured.op == "solve":
        return cost_problem(inputs[0], case.epsilon, None, None, case.T, measured.tol, grad)
    x, y = inputs[:2]
    return token_problem(x, y, case.epsilon, None, None, "cosine", case.T, measured.tol, "plan", grad, False)
