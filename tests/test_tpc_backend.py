"""What stands between ``backend="tpc"`` and its kernels: which one runs when, the ops, and sizes at the limit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import padded_weights, rand, seeds
from test_accuracy import check_cost, gradients
from test_ops import Calls, tokens

import otfuse
from otfuse._backends.tpc import backend as tpc
from otfuse._backends.tpc import emulator
from otfuse._backends.tpc import ops as tpc_ops
from otfuse.testing import specified_sinkhorn

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason=f"no C++ compiler: {emulator.HOW_TO_GET_ONE}")
CPU = torch.device("cpu")


def cost(*shape, seed=0, dtype=torch.float32):
    return rand(seed, *shape, dtype=dtype)


def kernels_of(run):
    """(name, arguments) of every kernel that ran, in order."""
    with Calls() as calls:
        run()
    return [(str(f).split(".")[1], args) for f, args in calls.seen if str(f).startswith("otfuse_tpc.")]


def learn(values, **options):
    out = otfuse.sinkhorn(values.requires_grad_(), 0.1, backend="tpc", **options)
    out.plan.square().sum().backward()


def attended(epsilon, **options):
    return otfuse.sinkhorn_attend(*tokens(2, 12, 9), epsilon, backend="tpc", **options)


RUNS = {
    "a cost": (lambda: otfuse.sinkhorn(cost(2, 12, 9), 0.1, backend="tpc"), ["survey", "sinkhorn"]),
    "tokens whose range is safe": (
        lambda: attended(0.1, grad="detach"), ["sinkhorn"]),
    "tokens whose range is not": (lambda: attended(0.01, grad="detach"), ["survey", "sinkhorn"]),
    "weights make less of a range safe": (
        lambda: attended(0.07, grad="detach", a=torch.rand(2, 12)), ["survey", "sinkhorn"]),
    "masks do not": (lambda: attended(0.07, grad="detach", a=torch.rand(2, 12) > 0.2), ["sinkhorn"]),
    "a small cost": (lambda: otfuse.sinkhorn(cost(2, 8, 3), 0.1, backend="tpc"), ["small"]),
    "unroll": (lambda: learn(cost(2, 12, 9)), ["survey", "sinkhorn_history", "unroll"]),
    "implicit": (lambda: learn(cost(2, 12, 9), grad="implicit"), ["survey", "sinkhorn_history", "implicit"]),
    "a small cost with a gradient": (lambda: learn(cost(2, 3, 2)), ["survey", "sinkhorn_history", "unroll"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_which_kernels_run(name):
    run, expected = RUNS[name]
    assert [kernel for kernel, _ in kernels_of(run)] == expected


def test_bfloat16_reaches_the_kernels():
    calls = kernels_of(lambda: learn(cost(2, 12, 9, dtype=torch.bfloat16)))
    assert [args[0].dtype for _, args in calls] == [torch.bfloat16] * 3
    ((_, args),) = kernels_of(lambda: otfuse.sinkhorn(cost(2, 2, 2, dtype=torch.bfloat16), 0.1, backend="tpc"))
    assert args[0].dtype == torch.bfloat16


def test_opcheck():
    """Schemas, fake kernels and derivatives of every op, on what really reaches it.

    Of costs whose range is large: of the others a part of the history stays as it was, which opcheck takes amiss.
    """
    seen = {}
    for run in (
        lambda: learn(20 * cost(2, 12, 9)),
        lambda: learn(20 * cost(2, 12, 9), grad="implicit"),
        RUNS["a small cost"][0],
        RUNS["tokens whose range is safe"][0],
    ):
        seen |= dict(kernels_of(run))
    assert seen.keys() == tpc_ops.KERNELS.keys()
    for name, args in seen.items():
        args = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)
        op = getattr(torch.ops.otfuse_tpc, name).default
        torch.library.opcheck(op, args)
        if name in ("sinkhorn", "sinkhorn_history"):
            torch.library.opcheck(op, (args[0].clone().requires_grad_(), *args[1:]))


def largest(N=None, M=None, grad="unroll"):
    """The longest item of a given height or width that fits."""
    size = 1
    while tpc_ops.fits(N or size + 1, M or size + 1, grad):
        size += 1
    return N or size, M or size


@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
def test_largest_items_that_fit(grad):
    """Right up to the limit, forward and backward, in both forms: nothing is stored where something else lies."""
    shapes = {largest(N=1, grad=grad), largest(M=1, grad=grad), largest(grad=grad), largest(N=17, grad=grad)}
    for N, M in (*shapes, (64, 256), (128, 128)):
        for epsilon in (0.1, 0.01):
            num_iters = 3 if grad != "implicit" else 20

            def differentiate(solver, values, epsilon=epsilon, num_iters=num_iters, **options):
                leaf = values.detach().requires_grad_()
                out = solver(leaf, epsilon, num_iters=num_iters, **options)
                return (out.plan.detach(), *(gradients(out, ("plan",), (leaf,)) if grad != "detach" else ()))

            def run(values, differentiate=differentiate):
                return differentiate(otfuse.sinkhorn, values, grad=grad, backend="tpc")

            def specify(values, differentiate=differentiate):
                if grad == "implicit":
                    return differentiate(otfuse.sinkhorn, values, grad=grad, backend="torch")
                return differentiate(specified_sinkhorn, values)

            values = cost(2, N, M)
            actual, exact = run(values), specify(values.double())
            scales = (1, 8 / epsilon)  # of a plan entry: what the gradient is a difference of, coefficients up to four
            for name, scale, one, other in zip(("plan", "gradient"), scales, actual, exact):
                atol = 64 * torch.finfo(torch.float32).eps * scale * float(exact[0].max())
                message = f"{N}x{M} at {epsilon}: {name}"
                torch.testing.assert_close(one.double(), other, rtol=0, atol=atol, msg=lambda m, t=message: f"{t}: {m}")


@given(
    seed=seeds, N=st.integers(1, 8), M=st.integers(1, 8), B=st.sampled_from([1, 3, 64, 65, 130]),
    epsilon=st.sampled_from([1.0, 0.1, 0.02, 0.002]), sides=st.sampled_from(["none", "weights", "masks"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_an_item_a_lane(seed, N, M, B, epsilon, sides, dtype):
    """Items of up to 8 x 8, some 64 of them a vector."""
    a, b = padded_weights(seed, B, N, dtype), padded_weights(seed + 1, B, M, dtype)
    a, b = {"none": (None, None), "weights": (a, b), "masks": (a != 0, b != 0)}[sides]
    values = cost(B, N, M, seed=seed, dtype=dtype)
    assert [name for name, _ in kernels_of(lambda: otfuse.sinkhorn(values, epsilon, a, b, backend="tpc"))] == ["small"]
    check_cost("tpc", CPU, values, epsilon, a, b, f"{B}x{N}x{M}")


def test_a_broken_rule_is_not_passed_over(monkeypatch):
    """What a kernel does wrong comes out of the public function."""
    row = tpc_ops.KERNELS["sinkhorn"]._replace(index_space=lambda sizes: [sizes["B"] + 1])
    monkeypatch.setitem(tpc_ops.KERNELS, "sinkhorn", row)
    with pytest.raises(emulator.EmulatorError, match="TPC kernel 'sinkhorn_f32' breaks the rule 'bounds'"):
        otfuse.sinkhorn(cost(2, 12, 9), 0.1, backend="tpc")


def test_the_built_ops_are_loaded_while_a_call_is_traced(monkeypatch):
    """The first call may be a compiled one; that they are loaded once and never twice is the library's matter."""
    loaded = []
    monkeypatch.setattr(tpc.built, "load", lambda: loaded.append(True))

    def run(x):
        tpc._load()
        return x + 1

    torch._dynamo.reset()
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    assert loaded == [True]
