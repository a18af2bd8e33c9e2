"""Triton beyond one chip, by every path: what is streamed from memory or made anew from the tokens, and what stays on
chip over a cluster.

Small items are forced through each path, in blocks so small that an item has several strips and several steps, and is
spread over several blocks of a cluster.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import pytest
import torch
from problems import assert_accurate, assert_solution_accurate, padded_weights, rand, randn, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse._backends.torch.backend import TorchBackend
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import ops as fused_ops
from otfuse._backends.triton import paths
from otfuse._backends.triton import streaming as large
from otfuse._backends.triton.backend import TritonBackend
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._backends.triton.paths import Path
from otfuse._ops import MODES, LaunchOptions
from otfuse._problem import SinkhornAttendOutput, SinkhornOutput, SolveOptions, token_problem
from otfuse.kernels.constants import HISTORY_ALL, HISTORY_LAST
from otfuse.testing import (
    SpecificationBackend,
    clustered_tokens,
    references,
    reordered,
    specified_attend,
    specified_sinkhorn,
)

N, M, D = 20, 33, 24
PATHS = (Path.STORED, Path.CLUSTER, Path.RECOMPUTED)


@pytest.fixture
def on_path(monkeypatch, device):
    """Forces a path, in blocks of 16 x 32: two strips of two steps, two blocks of lines, four blocks of a cluster."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")
    monkeypatch.setattr(large, "BLOCKS", {key: dict.fromkeys((2, 4, 8), (16, 32, 4, 2)) for key in large.BLOCKS})
    monkeypatch.setattr(paths, "CLUSTER_PART", 512)
    monkeypatch.setattr(large, "LINES", 32 if device.type == "cpu" else large.LINES)

    def force(path: Path) -> None:
        monkeypatch.setattr(backend, "path_of", lambda *_: path)

    return force


def references_of(cost, epsilon, **options):
    """The specification in several orders."""
    return SinkhornOutput(*references(lambda order: reordered(specified_sinkhorn, order)(cost, epsilon, **options)))


@pytest.mark.parametrize("path, dtype", [
    (Path.STORED, torch.float32),
    (Path.STORED, torch.float16),
    (Path.CLUSTER, torch.float64),
    (Path.CLUSTER, torch.float32),
    (Path.CLUSTER, torch.bfloat16),
    (Path.RECOMPUTED, torch.float64),
    (Path.RECOMPUTED, torch.float32),
    (Path.RECOMPUTED, torch.bfloat16),
], ids=str)  # fmt: skip
def test_tokens_are_solved_as_specified(on_path, device, path, dtype):
    """Masks on one side, weights on the other, an item without mass, early stop; every output within the contract."""
    on_path(path)
    x, y = clustered_tokens(3, N, M, D, dtype=dtype, device=device)
    a, b = padded_weights(0, 3, N, torch.float32).to(device), (padded_weights(1, 3, M) != 0).to(device)
    a[2] = 0
    options = {"b": b, "num_iters": 7, "tol": 0.05, "weights": "barycentric"}
    out = otfuse.sinkhorn_attend(x, y, a=a, return_plan=True, backend="triton", **options)
    solve = torch.float64 if dtype == torch.float64 else torch.float32
    truth = specified_attend(x.double(), y.double(), a=a.double(), **options)
    reference = SinkhornAttendOutput(
        *references(lambda order: reordered(specified_attend, order)(x.float(), y.float(), a=a, **options))
    )
    exact = specified_attend(x.float().double(), y.float().double(), a=a.double(), **options)
    assert len(set(truth.num_iters.tolist())) > 1, "items that stop at different rounds"
    plans = [SinkhornOutput(o.plan.to(solve), *o[3:]) for o in (out, reference, exact, truth)]
    if dtype in (torch.float64, torch.float32):
        assert_solution_accurate(*plans, 0.1, str(path))
    assert torch.equal(out.num_iters, truth.num_iters)
    for name in ("x", "y", "plan"):
        actual = getattr(out, name)
        rounded = getattr(reference, name) if dtype == torch.float64 else getattr(reference, name).to(dtype)
        assert actual.dtype == dtype
        assert_accurate(actual, rounded, getattr(exact, name), getattr(truth, name), f"{path}: {name}")
    assert torch.equal(out.x[2], x[2]) and torch.equal(out.x[a == 0], x[a == 0])


@pytest.mark.parametrize(
    "dtype, epsilon",
    [(torch.float64, 0.001), (torch.float32, 0.1), (torch.float32, 0.001), (torch.bfloat16, 0.1)],
    ids=str,
)
@pytest.mark.parametrize("path", [Path.STORED, Path.CLUSTER], ids=str)
def test_costs_are_solved_as_specified(on_path, device, path, dtype, epsilon):
    """At every range: at 0.001 the log kernel spans two thousand."""
    on_path(path)
    cost = -otfuse.similarity_matrix(*clustered_tokens(2, M, N, D, device=device)).to(dtype)
    out = otfuse.sinkhorn(cost, epsilon, num_iters=8, backend="triton")
    truth = specified_sinkhorn(cost.double(), epsilon, num_iters=8)
    reference = references_of(cost.float(), epsilon, num_iters=8)
    exact = specified_sinkhorn(cost.float().double(), epsilon, num_iters=8)
    if dtype == torch.bfloat16:  # the plan is rounded once more; the rest is in float32
        assert_accurate(out.plan, reference.plan.to(dtype), exact.plan, truth.plan, "plan")
        out = out._replace(plan=reference.plan[0])
    assert_solution_accurate(out, reference, exact, truth, epsilon, f"{dtype} at {epsilon}")


@pytest.mark.parametrize("path", [Path.STORED, Path.CLUSTER], ids=str)
def test_known_answers(on_path, device, path):
    """A single token gets all weights; zero on a permutation and one elsewhere is solved in closed form."""
    on_path(path)
    b = weights(0, 2, M, torch.float64).to(device)
    out = otfuse.sinkhorn(
        torch.rand(2, 1, M, dtype=torch.float64, device=device), 0.01, b=b, num_iters=2, backend="triton"
    )
    torch.testing.assert_close(out.plan[:, 0], b / b.sum(1, keepdim=True))
    match = torch.eye(N, dtype=torch.float64, device=device).roll(3, 0)
    for epsilon in (0.5, 0.001):  # exp(-1 / 0.001) is below what float64 holds
        plan = otfuse.sinkhorn((1 - match)[None], epsilon, num_iters=3, backend="triton").plan[0]
        off = float(torch.exp(torch.tensor(-1 / epsilon, dtype=torch.float64)))
        torch.testing.assert_close(plan, (match + off * (1 - match)) / (N * (1 + (N - 1) * off)))


class Attended(NamedTuple):
    x: Tensor
    y: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor
    similarity: Tensor


def gradients(x, y, a, b, epsilon, how, grad, num_iters, order=0):
    """Of everything that has one, by tokens and weights."""
    x, y, a = (t.detach().clone().requires_grad_() for t in (x, y, a))
    plain = SpecificationBackend() if grad == "unroll" else TorchBackend()  # which has the fixed point's gradient
    solver = TritonBackend() if how == "triton" else plain

    def attend(x, y, a, b):
        problem = token_problem(x, y, a, b, SolveOptions(epsilon, num_iters, 0.02, grad), "cosine", "barycentric", True)
        out, similarity = solver.attend(problem, True)
        return Attended(out.x, out.y, out.plan, out.f, out.g, similarity)

    out = reordered(attend, order)(x, y, a, b)
    similarity = out.similarity
    generator = torch.Generator().manual_seed(5)
    loss = x.new_zeros((), dtype=torch.float64)
    outputs = (out.x, out.y, similarity) if grad == "detach" else (out.x, out.y, similarity, 20 * out.plan)
    for output in outputs:
        sent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        loss = loss + (output.double() * sent).sum()
    if grad == "unroll":
        loss = loss + torch.where(out.f.isinf(), 0, out.f).double().sin().sum()
        loss = loss + torch.where(out.g.isinf(), 0, out.g).double().cos().sum()
    return torch.autograd.grad(loss, (x, y, a))


@pytest.mark.parametrize("path, dtype, grad, epsilon", [
    (Path.STORED, torch.float32, "unroll", 0.1),
    (Path.CLUSTER, torch.float32, "unroll", 0.1),
    (Path.CLUSTER, torch.float32, "unroll", 0.005),
    (Path.CLUSTER, torch.float64, "implicit", 0.2),
    (Path.CLUSTER, torch.float64, "detach", 0.1),
    (Path.RECOMPUTED, torch.float32, "unroll", 0.005),
    (Path.RECOMPUTED, torch.float64, "unroll", 0.1),
    (Path.STORED, torch.float64, "implicit", 0.2),
    (Path.RECOMPUTED, torch.float64, "implicit", 0.2),
    (Path.RECOMPUTED, torch.float64, "detach", 0.1),
    (Path.STORED, torch.float32, "detach", 0.1),
])  # fmt: skip
def test_gradients_are_those_of_the_specification(on_path, device, path, dtype, grad, epsilon):
    """By x, y and weights, of all outputs, with padding and an item that stops early."""
    on_path(path)
    x, y = clustered_tokens(2, N, M, D, device=device)
    a, b = padded_weights(0, 2, N, torch.float32).to(device), (padded_weights(1, 2, M) != 0).to(device)
    num_iters = 12 if grad == "implicit" else 4

    def by(how, dtype, order=0):
        return gradients(x.to(dtype), y.to(dtype), a.to(dtype), b, epsilon, how, grad, num_iters, order)

    reference = references(lambda order: by("plain", torch.float32, order))
    actual, exact = by("triton", dtype), by("plain", torch.float64)
    for name, *values in zip("xya", actual, reference, exact, exact):
        assert_accurate(*values, what=f"{path} {grad}: gradient by {name}")
    assert (actual[2][a == 0] == 0).all()


def test_gradients_of_the_fixed_point_in_float32_are_as_close_as_on_chip(on_path, device):
    """By x, y and weights, where the rounds have arrived: short of that there is no fixed point to be close to."""
    x, y = clustered_tokens(1, N, M, D, device=device)
    a, b = padded_weights(0, 1, N, torch.float32).to(device), (padded_weights(1, 1, M) != 0).to(device)

    def by(backend, dtype, order=0):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, y, a)]
        options = {"b": b, "num_iters": 40, "grad": "implicit", "weights": "barycentric", "backend": backend}
        out = reordered(otfuse.sinkhorn_attend, order)(leaves[0], leaves[1], 0.2, a=leaves[2], **options)
        assert out.marginal_error.max() < 1e-6
        return torch.autograd.grad(out.x.double().sin().sum() + out.y.double().cos().sum(), leaves)

    exact = by("torch", torch.float64)
    on_path(Path.ON_CHIP)
    on_chip = references(lambda order: by("triton", torch.float32, order))
    for path in PATHS:
        on_path(path)
        for name, *values in zip("xya", by("triton", torch.float32), on_chip, exact, exact):
            assert_accurate(*values, what=f"{path}: gradient by {name}")


@pytest.mark.parametrize(
    ("path", "grad"),
    [
        (Path.STORED, "unroll"),
        (Path.CLUSTER, "unroll"),
        (Path.RECOMPUTED, "unroll"),
        (None, "unroll"),
        (Path.STORED, "implicit"),
        (Path.RECOMPUTED, "detach"),
    ],
    ids=str,
)
def test_gradients_by_the_weights_of_both_sides(on_path, device, path, grad):
    """Learned weights, padding among them, of tokens and (None) of a cost; of outputs that reach them in every way."""
    on_path(path or Path.STORED)
    x, y = clustered_tokens(2, N, M, D, dtype=torch.float64, device=device)
    a, b = (padded_weights(seed, 2, size).to(device) for seed, size in ((0, N), (1, M)))
    options = {"num_iters": 30 if grad == "implicit" else 4, "grad": grad}

    def by(backend):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, a, b)]
        weighed = {"a": leaves[2], "b": leaves[3], "backend": backend, **options}
        if path is None:
            cost = -otfuse.similarity_matrix(*leaves[:2])
            solved = otfuse.sinkhorn(cost, 0.2, **weighed)
            outputs = solved.plan, torch.where(solved.f.isinf(), 0, solved.f).sin(), cost.exp()
        else:
            outputs = otfuse.sinkhorn_attend(*leaves[:2], 0.2, weights="barycentric", **weighed)[:2]
        generator = torch.Generator().manual_seed(3)
        sent = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(device) for o in outputs]
        loss = sum((output * s).sum() for output, s in zip(outputs, sent))
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for name, one, other in zip("xyab", by("triton"), by("torch")):
        largest = float(other.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-9 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
        if name in "ab":
            assert (one[(a if name == "a" else b) == 0] == 0).all()


@pytest.mark.parametrize("path", [Path.STORED, Path.CLUSTER], ids=str)
@pytest.mark.parametrize("epsilon", [0.1, 0.001])
def test_gradients_by_a_cost(on_path, device, epsilon, path):
    on_path(path)
    x, y = clustered_tokens(2, M, N, D, device=device)
    cost, a = -otfuse.similarity_matrix(x, y), weights(0, 2, M, torch.float32).to(device)
    sent = torch.randn(2, M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)

    def by(solve, dtype, **options):
        leaves = cost.to(dtype).requires_grad_(), a.to(dtype).requires_grad_()
        plan = solve(leaves[0], epsilon, leaves[1], num_iters=6, **options).plan
        return torch.autograd.grad((plan.double() * sent).sum(), leaves)

    reference = references(lambda order: by(reordered(specified_sinkhorn, order), torch.float32))
    actual, exact = by(otfuse.sinkhorn, torch.float32, backend="triton"), by(specified_sinkhorn, torch.float64)
    for name, *values in zip(("cost", "a"), actual, reference, exact, exact):
        assert_accurate(*values, what=f"gradient by {name} at {epsilon}")


@pytest.mark.parametrize("path", [Path.STORED, Path.CLUSTER], ids=str)
def test_a_history_is_zero_where_no_round_was_run(on_path, device, path):
    """An output of an op is the same at every call."""
    on_path(path)
    cost = rand(0, 2, N, M).to(device)
    numbers = torch.tensor([-1.0, 0.5])  # -1 / epsilon, tol
    *_, rounds, history = torch.ops.otfuse.sinkhorn_triton(cost, None, None, numbers, 5, MODES["unroll"], True)
    assert (rounds < 5).all()
    assert not history[:, 2:].reshape(2, 5, N + M)[:, int(rounds.max()) :].any()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_scalings_that_leave_the_range_of_float32(on_path, device, path):
    """After some twenty rounds at epsilon 0.001: plan and gradients by the weights and the cost, or by the tokens."""
    on_path(path)
    x, y = clustered_tokens(8, N, 12, D, device=device)
    a, sent = weights(0, 8, N, torch.float32).to(device), randn(1, 8, N, 12, dtype=torch.float64).to(device)
    of_tokens = path is Path.RECOMPUTED
    inputs = (x, y, a) if of_tokens else (-otfuse.similarity_matrix(x, y), a)

    def by(solve, dtype, **options):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        plan = solve(*leaves[:-1], 0.001, a=leaves[-1], num_iters=60, **options).plan
        return plan.detach(), *torch.autograd.grad((plan.double() * sent).sum(), leaves)

    specified, solver = (
        (specified_attend, functools.partial(otfuse.sinkhorn_attend, return_plan=True)) if of_tokens
        else (specified_sinkhorn, otfuse.sinkhorn)
    )  # fmt: skip
    reference = references(lambda order: by(reordered(specified, order), torch.float32))
    actual, exact = by(solver, torch.float32, backend="triton"), by(specified, torch.float64)
    for name, *values in zip(("plan", *("xya" if of_tokens else "Ca")), actual, reference, exact, exact):
        assert_accurate(*values, what=f"{path}: {name}")


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 0), (2, 1, 5, 3), (2, 5, 1, 3), (1, 1, 1, 1), (0, 3, 4, 5)], ids=str)
def test_smallest_and_empty_items_and_any_layout_beyond_the_chip(on_path, device, path, shape):
    """No features, single tokens, no items; tokens that lie otherwise in memory; and their gradients."""
    on_path(path)
    B, rows, columns, features = shape
    values = randn(0, B, features, rows + columns).to(device).mT  # features lie far apart

    def by(backend):
        leaf = values.clone().requires_grad_()
        x, y = leaf[:, :rows], leaf[:, rows:]
        out = otfuse.sinkhorn_attend(x, y, 0.5, weights="barycentric", num_iters=3, backend=backend)
        return *out[:2], *out[3:5], *torch.autograd.grad(out.x.sin().sum() + out.y.cos().sum(), leaf)

    for one, other in zip(by("triton"), by("torch")):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_item_is_the_same_alone_and_nan_stays_in_its_item(on_path, device, path):
    """Bit for bit, forward and backward, beside a neighbour that is NaN and one that stops at once."""
    on_path(path)
    x, y = clustered_tokens(3, N, M, D, device=device)
    x[0, 3] = torch.nan
    y[2] = y[2, :1]  # all alike: solved by one round

    def solve(x, y):
        x = x.clone().requires_grad_()
        out = otfuse.sinkhorn_attend(x, y, num_iters=2, tol=1e-3, backend="triton")
        return (*(out[:2]), *out[3:], *torch.autograd.grad(out.x.square().sum() + out.y.sum(), x))

    results = solve(x, y)
    for together, alone in zip(results, solve(x[1:2], y[1:2])):
        assert torch.equal(together[1:2], alone)
        assert together[0].isnan().all() or together.dtype == torch.int32
        assert not together[1:].isnan().any()
    assert results[5].tolist() == [2, 2, 1]


class Made(TorchDispatchMode):
    """Bytes and shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shapes = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and not any(tensor is arg for arg in args):
                self.bytes += tensor.numel() * tensor.itemsize
                self.shapes.append(tuple(tensor.shape))
        return out


@pytest.fixture
def launches(monkeypatch):
    """The names of kernels that would be launched: the launchers run, on tensors without values."""
    pytest.importorskip("triton")
    names = []
    monkeypatch.setattr(large, "launch", lambda kernel, *_: names.append(kernel.__name__))
    monkeypatch.setattr(large, "on", lambda device: contextlib.nullcontext())
    return names


def run(side, D, dtype, path, grad, num_iters=50):
    """What forward and backward of one item of side² make beyond outputs: all bytes, and shapes."""
    x = torch.empty(1, side, D, dtype=dtype, device="meta")
    outputs = fused_ops.new_attended(x, x, False, False)
    solution = fused_ops.new_solution(x, side, side, num_iters, MODES[grad], True)
    source = path is not Path.RECOMPUTED, 1 << 19 if path is Path.CLUSTER else 0, "ieee"
    options = LaunchOptions(10.0, num_iters, -1.0, MODES[grad])
    keep = HISTORY_ALL if grad == "unroll" else HISTORY_LAST
    with Made() as forward:
        large.launch_attend_large(x, x, None, None, True, False, options, keep, *source, *outputs, solution)
    gradients = fused_ops.new_gradients(x, x, None, None)
    sent = (outputs[0], outputs[1], None, None, None, None)
    with Made() as backward:
        large.launch_attend_large_backward(
            x, x, None, None, True, False, options, *source,
            (solution[3], solution[4]), sent, gradients,
        )  # fmt: skip
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grad", MODES)
def test_16384_tokens_in_less_than_two_gib(launches, dtype, grad):
    """All that the launchers make beyond inputs and outputs, freed or not, and never anything N x M."""
    for made in run(16384, 64, dtype, Path.RECOMPUTED, grad):
        assert 0 < made.bytes < 2**31
        assert not [shape for shape in made.shapes if shape[-2:] == (16384, 16384)]
    forward, backward = run(4096, 64, dtype, Path.STORED, grad)
    assert [shape[-2:] for shape in forward.shapes].count((4096, 4096)) == 1, "that the measure sees a matrix"
    assert [shape[-2:] for shape in backward.shapes].count((4096, 4096)) == 2


def test_two_launches_a_round(launches):
    """And what surrounds them does not depend on the number of rounds, or on the sizes."""
    run(4096, 64, torch.float32, Path.RECOMPUTED, "unroll", 1)
    once = list(launches)
    launches.clear()
    run(512, 768, torch.float32, Path.RECOMPUTED, "unroll", 11)
    assert len(launches) == len(once) + 10 * 4
    assert launches.count("_strip_kernel") == 11 + 3 and launches.count("_adjoint_strip_kernel") == 11
    assert len(once) == 3 + 2 + 2 + 1 + 1 + 2 + 3 + 2 + 2 + 1 + 2


def test_one_launch_for_all_rounds_over_a_cluster(launches):
    """Forward and backward; what surrounds them is what surrounds streamed rounds."""
    run(512, 768, torch.float32, Path.STORED, "unroll", 50)
    streamed = list(launches)
    launches.clear()
    run(512, 768, torch.float32, Path.CLUSTER, "unroll", 50)
    assert len(launches) == len(streamed) - 2 * 50 - 2 + 1 - (2 * 50 - 1) + 1
    assert launches.count("_rounds_kernel") == launches.count("_adjoint_rounds_kernel") == 1
    assert launches.count("_strip_kernel") == 2 and launches.count("_adjoint_strip_kernel") == 0


@pytest.mark.parametrize("sizes", [(200, 130), (40, 300)], ids=str)
def test_costs_beyond_one_chip_go_over_a_cluster_by_themselves(device, sizes):
    """Nothing forced: the path, the tile and the cluster are those of the backend."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")
    cost = -otfuse.similarity_matrix(*clustered_tokens(2, *sizes, D, device=device))
    if backend.held_by(device):
        assert backend.path_of(cost, 2, *sizes, 0) is Path.CLUSTER
    out = otfuse.sinkhorn(cost, 0.1, num_iters=5, backend="triton")
    truth = specified_sinkhorn(cost.double(), 0.1, num_iters=5)
    assert_solution_accurate(out, references_of(cost, 0.1, num_iters=5), truth, truth, 0.1, str(sizes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    """N M of more than 2^31: the last row has been read, and its plan written."""
    side = 46400
    cost = torch.zeros(1, side, side, dtype=torch.bfloat16, device="cuda")
    cost[0, -1] = 1
    out = otfuse.sinkhorn(cost, 0.5, num_iters=1, backend="triton")
    assert abs(float(out.f[0, -1] - out.f[0, 0]) - 1) < 1e-4
    assert abs(float(out.plan[0, -1, -1]) * side**2 - 1) < 0.01
