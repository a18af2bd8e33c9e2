"""TPC-C kernels for Intel Gaudi: an item's kernel matrix stays in a core's local memory for all rounds.

The matrix products around the solve are ``torch.bmm`` in the same graph, for the machine's matrix engine. On a Gaudi
the built library runs behind the ops of ``ops.py``; on CPU tensors, when asked for by name, the same sources run in a
host emulator (``emulator.py``): slow, and for tests.

Letters: B batch, N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from otfuse import _attention as attention
from otfuse import _ops as ops
from otfuse._attention import Marginals
from otfuse._backends.base import Backend, Solution
from otfuse._backends.tpc import emulator
from otfuse._backends.tpc import library as built
from otfuse._backends.tpc import ops as tpc_ops
from otfuse._ops import is_transformed
from otfuse._problem import LossProblem, Problem, SinkhornOutput, dtype_name
from otfuse.kernels.constants import SCALING_RANGE

SMALL = 8  # the longest side of items that are solved a lane each

# The range of log K up to which an item can be solved by scalings alone, whatever its values: with uniform weights,
# and with weights that are passed (kernels/tpc/include/survey.h looks at an item's own).
SAFE_RANGE, SAFE_RANGE_WITH_WEIGHTS = SCALING_RANGE[4], SCALING_RANGE[4] / 2
FOLD_EVERY, FOLD_EVERY_WITH_WEIGHTS = 8, 1  # rounds, where nothing is known of the range

built.prepare()


class TpcBackend(Backend):
    name = "tpc"
    device = "hpu"

    def unavailable(self) -> list[str]:
        return built.unavailable()

    def why_not(self, problem: Problem | LossProblem) -> list[str]:
        if isinstance(problem, LossProblem) or problem.values.device.type != "cpu":
            return super().why_not(problem)
        missing = [] if emulator.COMPILER else [f"no C++ compiler for the emulator ({emulator.HOW_TO_GET_ONE})"]
        return missing + self.unsupported(problem)

    def unsupported(self, problem: Problem) -> list[str]:
        emulated = problem.values.device.type == "cpu"
        reasons = self._unknown(problem) if emulated else super().unsupported(problem)
        if problem.solve_dtype == torch.float64:
            reasons.append(f"dtype {dtype_name(torch.float64)} (has float32, bfloat16, float16)")
        _, N, M = problem.shape
        if not tpc_ops.fits(N, M, problem.options.grad):
            reasons.append(
                f'a kernel matrix of {N} x {M} does not fit in local memory with grad="{problem.options.grad}" (80 KB; '
                "64 x 256 and 128 x 128 do)"
            )
        return reasons

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        return self._solve(similarity, 1 / problem.options.epsilon, p, problem)

    def solve_cost(self, cost: Tensor, p: Marginals, problem: Problem) -> Solution:
        if cost.dtype == torch.bfloat16:  # whose differences are no bfloat16; the kernels take an item's offset off
            return self._solve(cost, -1 / problem.options.epsilon, p, problem)
        live = torch.where((p.b != 0)[:, None, :], cost.detach(), torch.inf) if p.masked else cost.detach()
        least = torch.where(p.a != 0, live.amin(2), 0)  # [B, N]
        solution = self._solve(cost - least[:, :, None], -1 / problem.options.epsilon, p, problem)
        return solution._replace(f=solution.f + least)

    def sinkhorn(self, problem: Problem) -> SinkhornOutput:
        assert problem.cost is not None
        # The kernels widen bfloat16 themselves.
        cost = problem.cost if problem.cost.dtype == torch.bfloat16 else attention.solve_precision(problem.cost)
        solution = self.solve_cost(cost, attention.marginals(problem), problem)
        return SinkhornOutput(*solution._replace(plan=solution.plan.to(problem.cost.dtype)))

    def _solve(self, values: Tensor, scale: float, p: Marginals, problem: Problem) -> Solution:
        if values.device.type == "hpu":
            _load()
        a, b = p.a, p.b
        scale, tol = _constant(scale), -1.0 if problem.options.tol is None else _constant(problem.options.tol)
        if problem.options.grad == "detach":
            values, a, b = values.detach(), a.detach(), b.detach()
        if values.shape[0] == 0:  # nothing to launch
            return Solution(values, a, b, a.new_empty(0), a.new_empty(0, dtype=torch.int32))
        differentiable = torch.is_grad_enabled() and problem.options.grad != "detach"
        wanted = differentiable and any(t.requires_grad for t in (values, a, b))
        unforeseen = differentiable and (is_compiling() or is_transformed())
        if not (wanted or unforeseen) and max(values.shape[1:]) <= SMALL:
            return _solve_small(values, a, b, scale, tol, problem)
        contiguous = (values.mT.contiguous(), a.contiguous(), b.contiguous())
        inputs = (*contiguous, _form(*contiguous, scale, problem))
        options = (scale, problem.options.num_iters, tol)
        implicit = problem.options.grad == "implicit"
        if wanted or (unforeseen and implicit):  # "sinkhorn" passes for the other: its gradient is that of unroll
            kept = tpc_ops.history_slots(problem.options.num_iters, implicit)
            op = torch.ops.otfuse_tpc.sinkhorn_history.default
            plan, f, g, report = ops.call(op, *inputs, *options, kept)[:4]
        else:
            plan, f, g, report = ops.call(torch.ops.otfuse_tpc.sinkhorn.default, *inputs, *options)
        return Solution(plan.mT, f, g, report[:, 0], _counted(report[:, 1], problem))


def _constant(number: float) -> float:
    """A number of a node, which the graph compiler builds in: with another one torch.compile begins anew.

    What it makes a symbol of would be a constant as well, and its caches would not know (docs/backends.md).
    """
    if not is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return float(guard_scalar(number))


def _solve_small(values: Tensor, a: Tensor, b: Tensor, scale: float, tol: float, problem: Problem) -> Solution:
    """An item a lane."""
    inputs = (values.permute(1, 2, 0).contiguous(), a.mT.contiguous(), b.mT.contiguous())
    fold_every = FOLD_EVERY if _is_uniform(problem) else FOLD_EVERY_WITH_WEIGHTS
    fold_every = 0 if _is_safe(problem) else fold_every
    op = torch.ops.otfuse_tpc.small.default
    plan, f, g, report = ops.call(op, *inputs, scale, problem.options.num_iters, tol, fold_every)
    return Solution(plan.permute(2, 0, 1), f.mT, g.mT, report[0], _counted(report[1], problem))


def _form(values: Tensor, a: Tensor, b: Tensor, scale: float, problem: Problem) -> Tensor:
    """How each item is to be solved: zero for scalings alone, as its own range of values allows."""
    if _is_safe(problem):
        return a.new_zeros(a.shape[0], 1)
    return torch.ops.otfuse_tpc.survey(values.detach(), a.detach(), b.detach(), scale)


def _is_uniform(problem: Problem) -> bool:
    return all(weights is None or weights.dtype == torch.bool for weights in (problem.a, problem.b))


def _is_safe(problem: Problem) -> bool:
    """Whether the range of every item is known to be small without a look at its values."""
    bound = problem.similarity_bound
    safe = SAFE_RANGE if _is_uniform(problem) else SAFE_RANGE_WITH_WEIGHTS
    return bound is not None and 2 * bound / problem.options.epsilon <= safe


def _counted(rounds: Tensor, problem: Problem) -> Tensor:
    """Rounds as the kernels count them, in floats, NaN where a weight is."""
    return torch.where(torch.isnan(rounds), problem.options.num_iters, rounds).to(torch.int32)


def _load() -> bool:
    """The built library's ops, loaded; when torch.compile traces a call, once and for all."""
    built.load()
    return True


# What torch.compiler.assume_constant_result does; that would import torch._dynamo here, and Triton with it.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _launcher(name: str) -> Callable[..., Any]:
    """A kernel in the emulator, as an op's implementation."""

    def launch(*args: Any) -> Any:
        tensors = [value.contiguous() for value in args if isinstance(value, Tensor)]
        outputs, sizes = tpc_ops.new_outputs(name, args)
        if sizes["B"]:
            dtype = "bf16" if tensors[0].dtype == torch.bfloat16 else "f32"
            kernel = emulator.kernel(f"gaudi2/{name}_{dtype}.c", ("__gaudi2__",))
            space = tpc_ops.KERNELS[name].index_space(sizes)
            kernel.run([*tensors, *outputs], args[len(tensors) :], space, len(outputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return launch


for _name in tpc_ops.KERNELS:
    tpc_ops.library.impl(_name, _launcher(_name), "CPU")
