"""The TPC-C kernels one by one, in the host emulator, against float64.

What they must do beyond the contract tests: the same bits when frozen as when stopped, alone as in a batch, in any
order of the index space, and no more operations a round than the table says.

Letters: B batch, N rows, M columns, T rounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from otfuse._attention import Marginals
from otfuse._backends.base import Solution
from otfuse._backends.torch import solver as plain
from otfuse._backends.torch.implicit import attach_implicit_gradient
from otfuse._backends.tpc import emulator
from otfuse._problem import SolveOptions
from otfuse.testing import assert_as_accurate_as_reference, clustered_tokens, references, reordered

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="the emulator needs a C++ compiler")

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
KERNELS = ("survey", "sinkhorn", "sinkhorn_history", "unroll", "implicit", "small")
ROOT = Path(__file__).parents[1] / "otfuse" / "kernels" / "tpc"
NAN = float("nan")


class Items(NamedTuple):
    """Values [B, N, M] with weights that sum to one, and what they are multiplied by for the log kernel."""

    values: Tensor
    a: Tensor
    b: Tensor
    scale: float

    def take(self, items: Tensor | list[int] | slice) -> Items:
        return Items(self.values[items], self.a[items], self.b[items], self.scale)


class Solved(NamedTuple):
    plan: Tensor
    f: Tensor
    g: Tensor
    report: Tensor  # [B, 2]: marginal error, rounds
    form: Tensor
    history: Tensor | None


def make(
    B: int,
    N: int,
    M: int,
    epsilon: float,
    weights: str = "uniform",
    dtype: torch.dtype = torch.float32,
    cost: bool = False,
) -> Items:
    x, y = clustered_tokens(B, N, M, 16, num_topics=4, seed=N + M)
    values = torch.nn.functional.normalize(x, dim=2) @ torch.nn.functional.normalize(y, dim=2).mT
    generator = torch.Generator().manual_seed(1)

    def side(size: int) -> Tensor:
        w = torch.ones(B, size) if weights == "uniform" else torch.rand(B, size, generator=generator) + 0.1
        if weights == "masked":
            w[:, 1:] *= torch.rand(B, size - 1, generator=generator) > 0.4
        return w / w.sum(1, keepdim=True)

    sign = -1 if cost else 1
    return Items((sign * values).to(dtype), side(N), side(M), sign / epsilon)


def run(
    name: str, tensors: list[Tensor], outputs: list[Tensor], scalars: list[float], space: list[int], seed: int
) -> None:
    suffix = SUFFIX[tensors[0].dtype]
    kernel = emulator.kernel(f"gaudi2/{name}_{suffix}.c", ["__gaudi2__"])
    kernel.run([t.contiguous() for t in tensors] + outputs, scalars, space, len(outputs), seed)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def survey(items: Items, seed: int = 0) -> Tensor:
    form = empty(len(items.a), 1)
    run("survey", [items.values.mT, items.a, items.b], [form], [items.scale], [len(form)], seed)
    return form


def solve(
    items: Items, T: int, tol: float | None = None, form: Tensor | None = None, kept: int = 0, seed: int = 0
) -> Solved:
    B, N, M = items.values.shape
    form = survey(items) if form is None else form
    outputs = [empty(B, M, N, dtype=items.values.dtype), empty(B, N), empty(B, M), empty(B, 2)]
    scalars: list[float] = [items.scale, T, tol or -1.0]
    if kept:
        blocks = math.ceil(N / 64) + math.ceil(math.ceil(M / 4) / 16)
        outputs.append(empty(B, kept, 128 * blocks))
        scalars.append(kept)
    name = "sinkhorn_history" if kept else "sinkhorn"
    run(name, [items.values.mT, items.a, items.b, form], outputs, scalars, [B], seed)
    plan, f, g, report = outputs[:4]
    return Solved(plan.mT, f, g, report, form, outputs[4] if kept else None)


def solve_small(items: Items, T: int, tol: float | None = None, fold_every: int = 8, seed: int = 0) -> Solved:
    B, N, M = items.values.shape
    outputs = [empty(N, M, B, dtype=items.values.dtype), empty(N, B), empty(M, B), empty(2, B)]
    inputs = [items.values.permute(1, 2, 0), items.a.T, items.b.T]
    run("small", inputs, outputs, [items.scale, T, tol or -1.0, fold_every], [-(-B // 64)], seed)
    plan, f, g, report = outputs
    return Solved(plan.permute(2, 0, 1), f.T, g.T, report.T, empty(B, 1), None)


def specified(
    items: Items, T: int, tol: float | None = None, dtype: torch.dtype = torch.float64, order: int = 0
) -> Solution:
    sign = 1 if items.scale > 0 else -1
    solver = partial(plain.specification, options=SolveOptions(1 / abs(items.scale), T, tol))

    def solve(similarity: Tensor, a: Tensor, b: Tensor) -> Solution:
        return plain.solve(solver, similarity, Marginals(a, b, True))

    return reordered(solve, order)(sign * items.values.to(dtype), items.a.to(dtype), items.b.to(dtype))


def assert_solved(items: Items, solved: Solved, T: int, tol: float | None = None) -> None:
    exact = specified(items, T, tol)
    reference = Solution(*references(lambda order: specified(items, T, tol, torch.float32, order)))
    assert_as_accurate_as_reference(solved.plan, reference.plan, exact.plan, what="plan")
    for name in ("f", "g"):
        assert torch.equal(getattr(solved, name).isneginf(), getattr(exact, name).isneginf()), name
    sums = [s.f[..., :, None] + s.g[..., None, :] for s in (solved, reference, exact)]
    size = sum(p.masked_fill(p.isinf(), 0).abs().max() for p in (exact.f, exact.g))
    assert_as_accurate_as_reference(*sums, scale=float(size), what="f + g")
    error = [solved.report[:, 0], reference.marginal_error, exact.marginal_error]
    assert_as_accurate_as_reference(*error, scale=1.0, what="marginal error")
    assert torch.equal(solved.report[:, 1].double(), exact.num_iters.double())
    assert (solved.plan[(items.a == 0)[:, :, None] | (items.b == 0)[:, None, :]] == 0).all()


SIZES = [
    (3, 64, 20, 0.1, "uniform", 50), (2, 64, 20, 0.02, "weights", 20), (4, 20, 20, 0.05, "masked", 20),
    (2, 1, 1, 0.1, "uniform", 3), (2, 1, 7, 0.1, "weights", 5), (2, 9, 1, 0.01, "uniform", 5),
    (2, 17, 5, 0.005, "masked", 12), (2, 65, 67, 0.05, "masked", 8), (1, 64, 256, 0.1, "weights", 4),
    (1, 256, 64, 0.01, "uniform", 4), (1, 128, 128, 0.1, "uniform", 4), (1, 130, 19, 0.1, "masked", 6),
]  # fmt: skip


@pytest.mark.parametrize("other", [False, True], ids=["documented", "variant"])
@pytest.mark.parametrize("dtype", SUFFIX, ids=SUFFIX.values())
@pytest.mark.parametrize("B, N, M, epsilon, weights, T", SIZES)
def test_sinkhorn_is_as_accurate_as_the_specification(
    B: int, N: int, M: int, epsilon: float, weights: str, T: int, dtype: torch.dtype, other: bool
) -> None:
    variant: AbstractContextManager[None] = emulator.variant() if other else nullcontext()
    items = make(B, N, M, epsilon, weights, dtype, cost=N % 2 == 1)
    with variant:
        assert_solved(items, solve(items, T), T)


@pytest.mark.parametrize("dtype", SUFFIX, ids=SUFFIX.values())
@pytest.mark.parametrize(
    "B, N, M, epsilon, weights, fold_every",
    [(70, 8, 8, 0.1, "uniform", 0), (130, 4, 4, 0.01, "uniform", 8), (5, 1, 1, 0.1, "uniform", 8),
     (66, 7, 5, 0.005, "masked", 1), (64, 3, 8, 0.1, "weights", 1)],
)  # fmt: skip
def test_a_lane_an_item(
    B: int, N: int, M: int, epsilon: float, weights: str, fold_every: int, dtype: torch.dtype
) -> None:
    items = make(B, N, M, epsilon, weights, dtype, cost=N % 2 == 1)
    assert_solved(items, solve_small(items, 20, fold_every=fold_every), 20)


def test_survey_draws_the_line_where_the_cpu_backend_does() -> None:
    """A spread of log K of 40, and with the weights' own of 60."""
    values = torch.zeros(4, 3, 5)
    values[:, 1, 2] = torch.tensor([39.9, 40.1, 39.0, 39.0])
    a = torch.full((4, 3), 1 / 3)
    a[2], a[3] = torch.tensor([1.0, math.exp(-20.9), 1.0]), torch.tensor([1.0, math.exp(-21.1), 1.0])
    items = Items(values, a / a.sum(1, keepdim=True), torch.full((4, 5), 0.2), 1.0)
    form = survey(items).flatten()
    assert (form > 0).tolist() == [False, True, False, True]
    bits = -math.log2(1 / 3 * 0.2)
    assert form[1] == min(16, math.floor(70 / bits))


def test_what_ran_does_not_show() -> None:
    """The same item in both forms, where both are safe."""
    items = make(2, 33, 21, 0.06)
    scaled, absorbed = solve(items, 15, form=torch.zeros(2, 1)), solve(items, 15, form=torch.full((2, 1), 4.0))
    exact = specified(items, 15)
    for solved in (scaled, absorbed):
        assert_solved(items, solved, 15)
    assert (scaled.plan - absorbed.plan).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.plan.max()


# A matrix in local memory, the same with vectors in registers and two items at a time, a lane an item.
EVERY_FORM = pytest.mark.parametrize(
    "solver, N, M", [(solve, 8, 7), (solve, 20, 18), (solve_small, 8, 7)], ids=["tiles", "registers", "lanes"]
)


@EVERY_FORM
@pytest.mark.parametrize("epsilon, tol", [(0.2, 1e-3), (0.02, 0.1)])
def test_frozen_is_stopped(solver: Callable[..., Solved], N: int, M: int, epsilon: float, tol: float) -> None:
    """Bit for bit: an item that converged after t rounds, and the same item run for t rounds."""
    items = make(5, N, M, epsilon, "masked")
    frozen = solver(items, 60, tol)
    rounds = frozen.report[:, 1].int().tolist()
    assert min(rounds) < 60 and len(set(rounds)) > 2
    for item, t in enumerate(rounds):
        stopped = solver(items, t)
        for ours, theirs in zip(frozen[:4], stopped[:4]):
            assert torch.equal(ours[item], theirs[item])


@EVERY_FORM
def test_an_item_has_the_same_bits_everywhere(solver: Callable[..., Solved], N: int, M: int) -> None:
    """Alone, at any place, beside items that are absorbed, not finite or empty, in any order of the index space."""
    items = make(7, N, M, 0.05, "masked")
    items.values[1] *= 40  # absorbed
    items.values[3, items.a[3].argmax(), items.b[3].argmax()] = math.inf
    items.a[5], items.b[5] = 0, 0
    together = solver(items, 10, 1e-3, seed=1)
    order = torch.tensor([6, 3, 0, 1, 5, 4, 2])
    shuffled = solver(items.take(order), 10, 1e-3, seed=2)
    for item in range(7):
        alone = solver(items.take([item]), 10, 1e-3)
        for whole, other, single in zip(together[:4], shuffled[:4], alone[:4]):
            place = int((order == item).nonzero())
            assert torch.equal(whole[item].nan_to_num(), single[0].nan_to_num())
            assert torch.equal(other[place].nan_to_num(), single[0].nan_to_num())
    assert together.plan[3].isnan().all() and together.f[3].isnan().all() and together.report[3, 0].isnan()
    assert (together.plan[5] == 0).all() and together.f[5].isneginf().all() and together.g[5].isneginf().all()
    assert together.report[5].tolist() == [0, 0]
    finite = [0, 1, 2, 4, 6]
    assert_solved(items.take(finite), Solved._make(t if t is None else t[finite] for t in together), 10, 1e-3)


@pytest.mark.parametrize("solver", [solve, partial(solve_small, fold_every=1)], ids=["tiles", "lanes"])
def test_weights_whose_product_is_flushed(solver: Callable[..., Solved]) -> None:
    """1e-20 on both sides: between two folds a sum is 1e-40, below the smallest number there is."""
    items = make(3, 8, 7, 0.01, "weights")
    items.a[:, 3], items.b[:, 2] = 1e-20, 1e-20
    items = items._replace(a=items.a / items.a.sum(1, keepdim=True), b=items.b / items.b.sum(1, keepdim=True))
    assert_solved(items, solver(items, 20), 20)


def test_what_padding_holds_does_nothing() -> None:
    items = make(3, 20, 9, 0.1, "masked")
    padding = (items.a == 0)[:, :, None] | (items.b == 0)[:, None, :]
    dirty = items._replace(values=items.values.masked_fill(padding, NAN))
    for ours, theirs in zip(solve(dirty, 5)[:4], solve(items, 5)[:4]):
        assert torch.equal(ours, theirs)


def test_a_history_changes_no_bit() -> None:
    items = make(3, 64, 20, 0.05)
    for form in (0.0, 4.0):
        forms = torch.full((3, 1), form)
        for ours, theirs in zip(solve(items, 9, 1e-3, forms, kept=9)[:4], solve(items, 9, 1e-3, forms)[:4]):
            assert torch.equal(ours, theirs)


class Gradients(NamedTuple):
    values: Tensor
    a: Tensor
    b: Tensor


def backward(
    name: str, items: Items, solved: Solved, incoming: list[Tensor], option: int, members: int, seed: int = 0
) -> Gradients:
    B, N, M = items.values.shape
    assert solved.history is not None
    inputs = [items.values.mT, items.a, items.b, solved.form, solved.report, solved.history]
    inputs += [incoming[0].mT, *incoming[1:]]
    outputs = [empty(B, M, N, dtype=items.values.dtype), empty(B, N), empty(B, M)]
    run(name, inputs, outputs, [items.scale, option], [members, B] if name == "unroll" else [B], seed)
    return Gradients(outputs[0].mT, *outputs[1:])


def unroll(items: Items, solved: Solved, incoming: list[Tensor], tiles: int = 0, seed: int = 0) -> Gradients:
    columns = -(-items.b.shape[1] // 4)
    tiles = tiles or columns
    return backward("unroll", items, solved, incoming, tiles, -(-columns // tiles), seed)


def specified_gradients(
    items: Items,
    T: int,
    tol: float | None,
    incoming: list[Tensor],
    implicit: bool,
    dtype: torch.dtype = torch.float64,
    order: int = 0,
) -> Gradients:
    """By autograd; what is not determined, a constant of the implicit da and db, is taken out by ``centred``."""
    values, a, b = (t.to(dtype).clone().requires_grad_() for t in items[:3])
    sign, epsilon = (1 if items.scale > 0 else -1), 1 / abs(items.scale)
    solver = partial(plain.specification, options=SolveOptions(epsilon, T, tol))

    def solve(similarity: Tensor, a: Tensor, b: Tensor) -> Solution:
        if not implicit:
            return plain.solve(solver, similarity, Marginals(a, b, True))
        solution = plain.solve(solver, similarity.detach(), Marginals(a.detach(), b.detach(), True))
        return attach_implicit_gradient(solution, similarity, Marginals(a, b, True), epsilon)

    solution = reordered(solve, order)(sign * values, a, b)
    outputs = [torch.where(o.isinf(), 0, o) for o in solution[:3]]
    loss = torch.stack([(o * g.to(dtype)).sum() for o, g in zip(outputs, incoming)]).sum()
    return Gradients(*torch.autograd.grad(loss, (values, a, b)))


def centred(grad: Tensor, weights: Tensor) -> Tensor:
    grad = torch.where(weights == 0, 0, grad)
    mean = (weights * grad).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return torch.where(weights == 0, 0, grad - mean)


def assert_gradients(
    items: Items, ours: Gradients, T: int, tol: float | None, incoming: list[Tensor], implicit: bool = False
) -> None:
    exact = specified_gradients(items, T, tol, incoming, implicit)
    reference = Gradients(
        *references(lambda order: specified_gradients(items, T, tol, incoming, implicit, torch.float32, order))
    )
    assert_as_accurate_as_reference(ours.values, reference.values, exact.values, what="gradient of values")
    assert (ours.values[(items.a == 0)[:, :, None] | (items.b == 0)[:, None, :]] == 0).all()
    for name, weights in (("a", items.a), ("b", items.b)):
        assert (getattr(ours, name)[weights == 0] == 0).all()
        sides = [centred(getattr(g, name), weights.to(getattr(g, name).dtype)) for g in (ours, reference, exact)]
        size = float(torch.where(weights == 0, 0, getattr(exact, name)).abs().max())  # what was centred is rounded
        assert_as_accurate_as_reference(*sides, scale=size, what=f"gradient of {name}")


def incoming_for(items: Items, potentials: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    B, N, M = items.values.shape
    grads = [torch.randn(B, N, M, generator=generator).to(items.values.dtype)]
    if potentials:
        return [*grads, torch.randn(B, N, generator=generator), torch.randn(B, M, generator=generator)]
    return [*grads, items.a.clone(), items.b.clone()]  # of the dual value: what "implicit" can differentiate


@pytest.mark.parametrize("dtype", SUFFIX, ids=SUFFIX.values())
@pytest.mark.parametrize(
    "B, N, M, epsilon, weights, T, tol",
    [(2, 64, 20, 0.1, "uniform", 30, None), (2, 20, 20, 0.02, "masked", 20, None), (4, 9, 7, 0.05, "weights", 40, 1e-2),
     (2, 1, 1, 0.1, "uniform", 3, None), (1, 5, 66, 0.005, "masked", 9, None), (1, 64, 256, 0.1, "weights", 2, None)],
)  # fmt: skip
def test_unroll(
    B: int, N: int, M: int, epsilon: float, weights: str, T: int, tol: float | None, dtype: torch.dtype
) -> None:
    items = make(B, N, M, epsilon, weights, dtype, cost=N % 2 == 1)
    incoming = incoming_for(items, potentials=True)
    solved = solve(items, T, tol, kept=T)
    tiles = 1 if N * M > 10000 else -(-M // 8)  # two members an item, or as many as fit
    assert_gradients(items, unroll(items, solved, incoming, tiles), T, tol, incoming)


@pytest.mark.parametrize("dtype", SUFFIX, ids=SUFFIX.values())
@pytest.mark.parametrize(
    "B, N, M, epsilon, weights, T",
    [(2, 64, 20, 0.2, "uniform", 150), (3, 20, 20, 0.1, "masked", 200), (2, 1, 1, 0.1, "uniform", 3),
     (1, 9, 66, 0.1, "weights", 150), (1, 12, 9, 0.03, "weights", 300)],
)  # fmt: skip
def test_implicit(B: int, N: int, M: int, epsilon: float, weights: str, T: int, dtype: torch.dtype) -> None:
    items = make(B, N, M, epsilon, weights, dtype, cost=N % 2 == 1)
    incoming = incoming_for(items, potentials=False)
    solved = solve(items, T, kept=1)
    ours = backward("implicit", items, solved, incoming, min(N, M) + 20, 1)
    assert_gradients(items, ours, T, None, incoming, implicit=True)


def test_slices_of_the_unrolled_gradient_agree() -> None:
    """Bit for bit: how an item's columns are spread over members does not show."""
    items = make(2, 20, 30, 0.03, "masked")
    incoming = incoming_for(items, potentials=True)
    solved = solve(items, 8, kept=8)
    whole = unroll(items, solved, incoming)
    for tiles in (1, 3):
        for ours, theirs in zip(unroll(items, solved, incoming, tiles, seed=tiles), whole):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["unroll", "implicit"])
def test_gradients_stay_in_their_items(name: str) -> None:
    """NaN for an item that is not finite, zero for one without mass, the same bits for the others."""
    items = make(4, 9, 7, 0.1, "masked")
    clean = items.take([0, 2])
    items.values[1, items.a[1].argmax(), items.b[1].argmax()] = NAN
    items.a[3], items.b[3] = 0, 0

    def gradients(items: Items, incoming: list[Tensor]) -> Gradients:
        if name == "unroll":
            return unroll(items, solve(items, 6, kept=6), incoming)
        return backward(name, items, solve(items, 6, kept=1), incoming, 20, 1)

    incoming = incoming_for(items, potentials=True)
    together = gradients(items, incoming)
    apart = gradients(clean, [grad[[0, 2]] for grad in incoming])
    for ours, theirs in zip(together, apart):
        assert torch.equal(ours[[0, 2]], theirs)
        assert ours[1].isnan().all() and (ours[3] == 0).all()


def test_every_kernel_is_there_for_both_devices() -> None:
    """From one body each: a define or two, and an include."""
    for device in ("gaudi2", "gaudi3"):
        names = {path.stem for path in (ROOT / device).glob("*.c")}
        assert names == {f"{kernel}_{suffix}" for kernel in KERNELS for suffix in SUFFIX.values()}
        for path in (ROOT / device).glob("*.c"):
            assert re.fullmatch(r'(#define \w+\n)*#include "../include/\w+\.h"\n', path.read_text())
            assert path.read_text() == (ROOT / "gaudi2" / path.name).read_text()


def operations(N: int, M: int, T: int) -> dict[str, int]:
    kernel = emulator.kernel("gaudi2/sinkhorn_f32.c", ["__gaudi2__"], count=True)
    inputs = [torch.zeros(1, M, N), torch.full((1, N), 1 / N), torch.full((1, M), 1 / M), torch.zeros(1, 1)]
    outputs = [empty(1, M, N), empty(1, N), empty(1, M), empty(1, 2)]
    return kernel.count(inputs + outputs, [1.0, T, -1.0], [1], 4).slots


# Vector operations of a round of one item, without a tolerance. The goal for 64 x 20 is 100.
OPERATIONS = {(64, 20): 93, (20, 20): 93, (64, 64): 237, (256, 20): 331, (128, 128): 793, (64, 256): 885}


def test_operations_a_round() -> None:
    for (N, M), expected in OPERATIONS.items():
        more, less = operations(N, M, 3), operations(N, M, 2)
        assert more["vector"] - less["vector"] == expected, (N, M)
        # The rest fits beside them: a bundle has a slot of each kind.
        assert all(more[slot] - less[slot] <= expected for slot in ("load", "scalar", "store")), (N, M)
