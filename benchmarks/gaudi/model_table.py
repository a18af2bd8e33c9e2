"""The Gaudi kernels: what they issue, counted in the host emulator, and the time that follows. Modelled, not measured.

    python -m benchmarks.gaudi.model_table > benchmarks/results/DATE-gaudi-modelled.md

Every kernel is run in the emulator and held against the float64 specification before its count is used.

Letters: B elements, N rows, M columns, D features, T iterations.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import otfuse
from otfuse._backends.torch import solver as plain
from otfuse._backends.tpc import emulator
from otfuse._backends.tpc import ops as tpc_ops
from otfuse._problem import SolveOptions
from otfuse.kernels.tpc import model
from otfuse.kernels.tpc.model import GAUDI2, GAUDI3, LAUNCHES_US, MACHINES, Machine, Work
from otfuse.testing import clustered_tokens

ITERATIONS = 50
COUNTED = (4, 8)  # iterations of the two runs whose difference is an iteration's
EPSILON = 0.1
MOST_ERROR = 1e-5  # of what is counted
SIZES = ((64, 20), (256, 20), (128, 128), (64, 256), (20, 20), (8, 8), (4, 4))
LAVCAP = (4, 32, 64, 256)
LANES = 64  # elements of a member of ``small``


class Counted(NamedTuple):
    """A kernel at a size."""

    kernel: str
    N: int
    M: int
    elements: int  # on a core at once: one, two whose iterations are interleaved, or a lane each
    error: float  # largest difference from float64, over the largest entry of the answer
    iteration: Work
    member: Work  # at ITERATIONS


def cosines(B: int, N: int, M: int) -> Tensor:
    """[B, N, M], of clustered tokens."""
    x, y = clustered_tokens(B, N, M, 64, seed=0)
    return otfuse.similarity_matrix(x, y)


def launch(kernel: str, inputs: Sequence[Tensor], scalars: Sequence[float]) -> tuple[tuple[Tensor, ...], Work]:
    """Outputs, and what a core issued that was given all members as one box."""
    outputs, sizes = tpc_ops.new_outputs(kernel, (*inputs, *scalars))
    space = tpc_ops.KERNELS[kernel].index_space(sizes)
    counted = emulator.kernel(f"gaudi2/{kernel}_f32.c", ("__gaudi2__",), count=True).count(
        [*inputs, *outputs], scalars, space, len(outputs), together=True
    )
    return tuple(outputs), Work(**counted.slots, chain=counted.chain, ordered=counted.ordered)


class Inputs(NamedTuple):
    """Of one member, for each kernel."""

    values: Tensor
    a: Tensor
    b: Tensor

    def solver(self) -> tuple[Tensor, ...]:
        return self.values.mT.contiguous(), self.a, self.b, self.a.new_zeros(self.a.shape[0], 1)

    def lanes(self) -> tuple[Tensor, ...]:
        return self.values.permute(1, 2, 0).contiguous(), self.a.mT.contiguous(), self.b.mT.contiguous()


def inputs(B: int, N: int, M: int) -> Inputs:
    return Inputs(cosines(B, N, M), torch.full((B, N), 1 / N), torch.full((B, M), 1 / M))


def solved_right(given: Inputs, iterations: int) -> Tensor:
    """The plan [B, N, M] of the specification, in float64."""
    values, a, b = (tensor.double() for tensor in given)
    return plain.specification(values, a, b, SolveOptions(EPSILON, iterations)).plan


def gradient_right(given: Inputs, grad_plan: Tensor, iterations: int) -> Tensor:
    values = given.values.double().requires_grad_()
    plan = plain.specification(values, given.a.double(), given.b.double(), SolveOptions(EPSILON, iterations)).plan
    return torch.autograd.grad(plan, values, grad_plan.double())[0]


def relative(answer: Tensor, right: Tensor) -> float:
    return ((answer.double() - right).abs().max() / right.abs().max()).item()


def count_solver(kernel: str, N: int, M: int, elements: int = 1) -> Counted:
    """``sinkhorn`` and ``sinkhorn_history`` for one element or two on a core, ``small`` for a member's."""
    given = inputs(elements, N, M)
    tensors = given.lanes() if kernel == "small" else given.solver()
    works, error = [], 0.0
    for iterations in COUNTED:
        scalars = [1 / EPSILON, iterations, -1.0]
        scalars += {"small": [0], "sinkhorn_history": [iterations]}.get(kernel, [])
        outputs, work = launch(kernel, tensors, scalars)
        plan = outputs[0].permute(2, 0, 1) if kernel == "small" else outputs[0].mT
        error = max(error, relative(plan, solved_right(given, iterations)))
        works.append(work)
    return counted(kernel, N, M, elements, error, works)


def count_unroll(N: int, M: int) -> Counted:
    """``unroll``, where one slice does all columns."""
    given = inputs(1, N, M)
    works, error = [], 0.0
    for iterations in COUNTED:
        options = [1 / EPSILON, iterations, -1.0, iterations]
        *_, report, history = launch("sinkhorn_history", given.solver(), options)[0]
        grad_plan = torch.randn(1, N, M, generator=torch.Generator().manual_seed(0))
        grads = (grad_plan.mT.contiguous(), torch.zeros(1, N), torch.zeros(1, M))
        tensors = (*given.solver(), report, history, *grads)
        outputs, work = launch("unroll", tensors, [1 / EPSILON, tpc_ops.unroll_slice(N, M)])
        error = max(error, relative(outputs[0].mT, gradient_right(given, grad_plan, iterations)))
        works.append(work)
    return counted("unroll", N, M, 1, error, works)


def counted(kernel: str, N: int, M: int, elements: int, error: float, works: Sequence[Work]) -> Counted:
    assert error < MOST_ERROR, f"{kernel} {N}x{M}: wrong by {error:.1e}, so it is not counted"
    fewer, more = COUNTED
    iteration = model.per_round(*works, more - fewer)
    return Counted(kernel, N, M, elements, error, iteration, model.with_rounds(works[1], more, iteration, ITERATIONS))


def all_counts() -> list[Counted]:
    found = [count_solver("sinkhorn", 64, 20, 2)]
    found += [count_solver("sinkhorn", N, M) for N, M in SIZES]
    found += [count_solver("small", N, M, LANES) for N, M in SIZES if max(N, M) <= 8]
    found += [count_solver("sinkhorn_history", 64, 20, elements) for elements in (2, 1)]
    found += [count_unroll(64, 20), count_unroll(20, 20)]
    return found


def row_of(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def counts_table(rows: Sequence[Counted]) -> str:
    lines = [
        "| kernel | N × M | elements at once | error | vector operations an iteration and element "
        "| cycles an iteration: fullest slot | longest chain | in order | least, an element | share of the issue bound "
        "| µs for them, least – in order |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        iteration, member = row.iteration, row.member
        times = (model.microseconds(cycles, 1, GAUDI2) for cycles in (member.bound, member.ordered))
        cells = [
            f"`{row.kernel}`", f"{row.N} × {row.M}", row.elements, f"{row.error:.1e}",
            f"{iteration.vector / row.elements:.1f}", f"{iteration.slots:.0f}", f"{iteration.chain:.0f}",
            f"{iteration.ordered:.0f}", f"{iteration.bound / row.elements:.1f}", f"{iteration.issue_share:.2f}",
            " – ".join(f"{time:.1f}" for time in times),
        ]  # fmt: skip
        lines.append(row_of(cells))
    return "\n".join(lines)


class Solver(NamedTuple):
    """``sinkhorn`` at one size: two elements at once on a core, and one alone."""

    two: Counted
    one: Counted

    def microseconds(self, B: int, machine: Machine) -> tuple[float, float]:
        """Of the core that has the most elements, all of them as one box: least, and in order."""
        pairs, rest = divmod(model.turns(B, machine), 2)
        work = Work(*[0] * 6).plus(self.two.member, pairs).plus(self.one.member, rest)
        bound = pairs * self.two.member.bound + rest * self.one.member.bound
        return model.microseconds(bound, 1, machine), model.microseconds(work.ordered, 1, machine)


def batches_table(solver: Solver) -> str:
    """`lavcap` on both machines."""
    lines = [
        "| machine | B | elements a core | µs, least – in order | at 1.65 – 2.0 GHz | HBM traffic, MB | its µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        for B in LAVCAP:
            least, most = solver.microseconds(B, machine)
            fast = least * machine.clock_ghz / max(model.CLOCKS_GHZ)
            slow = most * machine.clock_ghz / min(model.CLOCKS_GHZ)
            traffic = model.solve_bytes(B, solver.one.N, solver.one.M)
            cells = [
                machine.name, B, model.turns(B, machine), f"{least:.1f} – {most:.1f}", f"{fast:.1f} – {slow:.1f}",
                f"{traffic / 1e6:.2f}", f"{model.traffic_us(traffic, machine):.2f}",
            ]  # fmt: skip
            lines.append(row_of(cells))
    return "\n".join(lines)


def formulations_table(solver: Solver) -> str:
    launch_columns = " | ".join(f"µs at {cost:g} µs a launch" for cost in LAUNCHES_US)
    lines = [
        f"| B | solver | launches | MB moved | {launch_columns} |",
        "|---|---|---|---|" + "---|" * len(LAUNCHES_US),
    ]
    for B in LAVCAP:
        for of in model.formulations(B, solver.one.N, solver.one.M, ITERATIONS):
            work = solver.microseconds(B, GAUDI2)[1] if of.name == "ours" else 0.0
            times = [model.formulation_us(of, cost, GAUDI2, work) for cost in LAUNCHES_US]
            lines.append(row_of([B, of.name, of.launches, f"{of.bytes / 1e6:.2f}", *(f"{t:.0f}" for t in times)]))
    return "\n".join(lines)


def fused_table(N: int, M: int) -> str:
    """Up to which D the products would be worth taking off the matrix engine."""
    launch_columns = " | ".join(f"largest D at {cost:g} µs a launch" for cost in LAUNCHES_US)
    lines = [
        f"| B | µs of the products on the cores at D = 768 | {launch_columns} |",
        "|---|---|" + "---|" * len(LAUNCHES_US),
    ]
    for B in LAVCAP:
        products = model.microseconds(model.attend_cycles(N, M, 768), B, GAUDI2)
        largest = [model.largest_fused_features(B, N, M, cost, GAUDI2) for cost in LAUNCHES_US]
        lines.append(row_of([B, f"{products:.0f}", *largest]))
    return "\n".join(lines)


def page(rows: Sequence[Counted]) -> str:
    solver = Solver(*(row for row in rows if (row.kernel, row.N, row.M) == ("sinkhorn", 64, 20)))
    machines = "; ".join(
        f"{m.name}: {m.cores} cores at {m.clock_ghz} GHz, HBM {m.hbm_tb_per_s} TB/s, on the die {m.sram_tb_per_s} TB/s"
        for m in (GAUDI2, GAUDI3)
    )
    return f"""# The Gaudi kernels, modelled

**Modelled, not measured: no kernel has run on a Gaudi.** Operations and latencies are counted in the host emulator, on
{datetime.date.today()}, float32, {ITERATIONS} iterations (one is the difference of {COUNTED[0]} and {COUNTED[1]}),
epsilon {EPSILON}, clustered tokens, no tolerance. Written by `benchmarks/gaudi/model_table.py`; the model and its
assumptions: `kernels/tpc/model`. {machines}.
Clocks follow from published TFLOPS. Launch costs are not published: a parameter.

## What the kernels issue

Errors are the largest difference from the float64 specification over the largest entry, of the plan (at most
{COUNTED[1]} iterations), or of the gradient. Least: the longer of the fullest slot and the longest chain; in order:
the source's operations, none moved forward. Gaudi 2. No TPC compiler has seen these sources: bundles are owed. (Earlier
trials of 64 × 20 by HabanaAI/tpc_llvm, LLVM 12, -O2 -march=gaudi2, had 275 bundles an iteration for one element,
205 each for two interleaved, 160 for four side by side.)

{counts_table(rows)}

## LAVCap's batches, the solver

{batches_table(solver)}

## Beside a solver in ops of PyTorch, Gaudi 2

N × M = {solver.one.N} × {solver.one.M}. Ours in order, the others as if the graph compiler fused all that can be and
nothing but launches and traffic on the die cost time: their matrix-vector products are not charged.

{formulations_table(solver)}

## Taking the matrix products into the kernel, Gaudi 2

Three launches less, against {model.attend_cycles(64, 20, 1):.0f} cycles for each feature of an element.

{fused_table(64, 20)}
"""


if __name__ == "__main__":
    print(page(all_counts()), end="")
