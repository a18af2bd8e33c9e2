"""Many small costs: several items a program of the Triton kernel, each by itself.

Batches are no multiple of the items of a program, and mix items of both forms, with and without padding.
"""

from __future__ import annotations

import pytest
import torch
from problems import padded_weights, rand, weights

import otfuse
from otfuse import _ops as ops
from otfuse._backends.select import select
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import ops as fused_ops
from otfuse._backends.triton import small as triton_small
from otfuse._backends.triton.backend import TritonBackend
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._backends.triton.small import HELD, small_blocks
from otfuse._ops import MODES, LaunchOptions
from otfuse._problem import SinkhornOutput, SolveOptions, cost_problem
from otfuse.kernels.constants import UNROLL
from otfuse.testing import assert_as_accurate_as_reference, references, reordered, specified_sinkhorn

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="neither CUDA nor Triton's interpreter"
)
B = 37  # one program and a bit in the interpreter
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mixed(N, M, device, dtype=torch.float64, padded=True):
    """Costs of which every third has a range that no kernel in one piece holds; weights of which some are zero."""
    cost = rand(0, B, N, M)
    cost[::3] *= 40
    make = padded_weights if padded else weights
    a, b = make(1, B, N), make(2, B, M)
    return tuple(t.to(device, dtype) for t in (cost, a, b))


def solved(cost, a, b, grad="unroll", tol=None, name="triton", rounds=12):
    """All outputs, and the gradients of a function of them that no term of leaves out."""
    leaves = [t.detach().clone().requires_grad_() for t in (cost, a, b)]
    out = otfuse.sinkhorn(leaves[0], 0.1, *leaves[1:], num_iters=rounds, tol=tol, grad=grad, backend=name)
    plan = out.plan.double() * rand(3, *cost.shape).to(cost.device)
    loss = plan.sum() + sum(torch.where(torch.isinf(p), 0, p.double()).square().sum() for p in (out.f, out.g))
    return [t.detach() for t in (*out, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize(
    ("shape", "dtype", "tol"),
    [
        ((1, 1), torch.float64, None),
        ((1, 16), torch.float32, None),
        ((3, 5), torch.float64, 1e-3),
        ((4, 4), torch.float32, 1e-3),
        ((4, 4), torch.bfloat16, None),
        ((2, 8), torch.float16, 1e-2),
        ((16, 7), torch.float32, None),
        ((16, 16), torch.float64, None),
    ],
    ids=str,
)
def test_as_accurate_as_the_reference(device, shape, dtype, tol):
    """Each item stopping where the specification stops."""
    cost, a, b = mixed(*shape, device, dtype)
    out = otfuse.sinkhorn(cost, 0.1, a, b, num_iters=12, tol=tol, backend="triton")
    truth = specified_sinkhorn(cost.double(), 0.1, a.double(), b.double(), num_iters=12, tol=tol)
    assert torch.equal(out.num_iters, truth.num_iters) and out.plan.dtype == dtype
    live = torch.isfinite(truth.f)
    assert torch.equal(torch.isfinite(out.f), live)
    if dtype == torch.float64:  # log K reaches 400, and an error in it is one in the plan
        for one, other in zip(out, truth):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        return

    def specify(order):
        return reordered(specified_sinkhorn, order)(cost.float(), 0.1, a.float(), b.float(), num_iters=12, tol=tol)

    reference = SinkhornOutput(*references(specify))
    for name in ("plan", "f", "g"):
        actual, other, exact = (getattr(solution, name) for solution in (out, reference, truth))
        assert_as_accurate_as_reference(actual, other.to(actual.dtype), exact, what=f"{name} {shape} {dtype}")


@pytest.mark.parametrize(
    ("shape", "grad", "tol"),
    [
        ((3, 5), "unroll", None),
        ((4, 4), "unroll", 1e-2),
        ((16, 2), "unroll", None),
        ((1, 1), "unroll", None),
        ((4, 4), "implicit", 1e-2),
        ((5, 3), "implicit", None),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_reference(device, shape, grad, tol):
    """Of costs and weights, in both forms, stopped early or not."""
    inputs = mixed(*shape, device)
    ours = solved(*inputs, grad, tol)
    theirs = solved(*inputs, grad, tol, "torch")
    # Items of a large range have fixed points that hang by a thread: there, only the unrolled gradient is held.
    held = slice(None) if grad == "unroll" else torch.arange(B) % 3 != 0
    for one, other in zip(ours[5:], theirs[5:]):
        size = float(other[held].abs().max())
        torch.testing.assert_close(one[held], other[held], rtol=1e-7, atol=1e-9 * size + 1e-13)


@pytest.mark.parametrize(
    ("shape", "tol", "dtype"), [((4, 4), 1e-2, torch.float32), ((5, 11), None, torch.bfloat16)], ids=str
)
def test_an_item_is_the_same_bit_for_bit_wherever_it_stands(device, shape, tol, dtype):
    """Alone, at another place, among neighbours of the other form, and beside one that is NaN; and its gradients."""
    cost, a, b = mixed(*shape, device, dtype)
    whole = solved(cost, a, b, tol=tol)
    spoilt = cost.clone()
    spoilt[5, 0, 0], a[5, 0], b[5, 0] = torch.nan, 1, 1
    among = solved(spoilt, a, b, tol=tol)
    assert among[0][5].isnan().all() and among[5][5].isnan().all()
    turned = otfuse.sinkhorn(cost.flip(0), 0.1, a.flip(0), b.flip(0), num_iters=12, tol=tol, backend="triton")
    for index in (0, 1, 32):
        alone = [t[index : index + 1] for t in (cost, a, b)]
        out = otfuse.sinkhorn(alone[0], 0.1, *alone[1:], num_iters=12, tol=tol, backend="triton")
        for one, other, beside in zip(out, whole, among):
            assert torch.equal(one[0], other[index]) and torch.equal(other[index], beside[index])
        assert all(torch.equal(one[B - 1 - index], other[index]) for one, other in zip(turned, whole[:5]))
        for one, beside in zip(whole[5:], among[5:]):
            assert torch.equal(one[index], beside[index])


def test_masks_and_items_without_mass(device):
    cost, _, _ = mixed(6, 9, device, torch.float32)
    keep_x, keep_y = rand(5, B, 6).to(device) > 0.3, rand(6, B, 9).to(device) > 0.3
    keep_x[3], keep_y[:3] = False, True
    cost[:, 2][~keep_x[:, 2]] = torch.nan  # what stands at padding is nobody's
    out = otfuse.sinkhorn(cost, 0.1, keep_x, keep_y, num_iters=9, backend="triton")
    like = otfuse.sinkhorn(cost, 0.1, keep_x, keep_y, num_iters=9, backend="torch")
    for one, other in zip(out, like):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (out.plan[3] == 0).all() and out.num_iters[3] == 0 and out.f[3].isneginf().all()
    assert (out.plan[~(keep_x[:, :, None] & keep_y[:, None, :])] == 0).all()


def test_the_small_kernels_are_launched_forward_and_backward(device, monkeypatch):
    """For a cost of up to 16 on both sides; a side of 17, and tokens, stay with the others."""
    seen = []

    def launch(kernel, grid, *rest, _launch=triton_small.launch):
        seen.append((kernel.__name__, grid))
        _launch(kernel, grid, *rest)

    monkeypatch.setattr(triton_small, "launch", launch)
    cost, a, b = mixed(16, 16, device, torch.float32)
    solved(cost, a, b, rounds=2)
    assert [name for name, _ in seen] == ["_small_fwd_kernel", "_small_bwd_kernel"]
    blocks = small_blocks("small, everything", 16, 16, torch.float32, device.type == "cpu")
    assert seen[0][1] == (-(-B // blocks["ITEMS"]),)
    seen.clear()
    otfuse.sinkhorn(rand(0, 1, 4, 17, dtype=torch.float32).to(device), 0.1, num_iters=1, backend="triton")
    tokens = rand(0, 1, 4, 8, dtype=torch.float32).to(device)
    otfuse.sinkhorn_attend(tokens, tokens, num_iters=1, backend="triton")
    assert not seen


@pytest.mark.parametrize("N", range(1, 17))
def test_one_kernel_for_all_sizes_of_a_class(N):
    """What is compiled depends on the power of two above N and M, and on whether they are one."""
    blocks = {frozenset(small_blocks("small", N, M, torch.float32).items()) for M in range(1, 17)}
    assert len(blocks) <= (8 if N in (2, 4, 8, 16) else 4)
    for kernel, dtype in ((kernel, dtype) for kernel in HELD for dtype in DTYPES):
        for M in range(1, 17):
            sizes = small_blocks(kernel, N, M, dtype)
            entries = sizes["BLOCK_N"] * sizes["BLOCK_M"] * sizes["ITEMS"]
            assert sizes["BLOCK_N"] >= N and sizes["BLOCK_M"] >= M
            held = HELD[kernel][8 if dtype == torch.float64 else 4]
            assert entries // (32 * sizes["num_warps"]) <= 2 * held, "what OTHERWISE allows"


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_what_is_kept(device, grad):
    """Form, shift, and the column scalings that rounds begin with: half of what u and v of every round would be."""
    cost, _, _ = mixed(4, 6, device, torch.float32)
    mode = MODES[grad]
    *_, rounds, history = backend.launch_sinkhorn(cost, None, None, LaunchOptions(-10.0, 12, -1.0, mode), True)
    assert history.shape == (B, 2 + 6 * (11 if grad == "unroll" else 1)) and history.stride() == (1, B)
    assert torch.isfinite(history).all()
    sent = torch.ones_like(cost)
    arguments = (cost, None, None, LaunchOptions(-10.0, 12, -1.0, mode), rounds)
    one = backend.launch_sinkhorn_backward(*arguments, history, sent, None, None)
    other = backend.launch_sinkhorn_backward(*arguments, history.contiguous(), sent, None, None)
    assert torch.equal(one[0], other[0]), "a history that lies otherwise is the same history"
    *_, nothing = backend.launch_sinkhorn(cost, None, None, LaunchOptions(-10.0, 12, -1.0, mode), False)
    assert nothing.numel() == 0


def test_rounds_that_were_not_run_are_zero_in_the_history(device):
    cost, a, b = mixed(4, 4, device, torch.float32, padded=False)
    *_, rounds, history = backend.launch_sinkhorn(cost / 40, a, b, LaunchOptions(-10.0, 30, 1e-1, UNROLL), True)
    assert int(rounds.max()) < 29 and (history[:, 2 + 4 * int(rounds.max()) :] == 0).all()
    assert not history.isnan().any()


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
@pytest.mark.parametrize("tol", [-1.0, 1e-2])
def test_the_kernel_itself_keeps_zeros_of_items_without_mass(device, monkeypatch, grad, tol):
    """Of memory that holds anything, and nothing is cleared by a launch of its own."""
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: pytest.fail("a launch before the kernel's"))
    cost, a, b = mixed(3, 4, device, torch.float32, padded=False)
    a[2], b[32:] = 0, 0
    mode = MODES[grad]
    *_, rounds, history = backend.launch_sinkhorn(cost, a, b, LaunchOptions(-10.0, 6, tol, mode), True)
    assert (history[[2, *range(32, B)], 2:] == 0).all() and not history.isnan().any()
    assert (rounds[[2, *range(32, B)]] == 0).all() and (history[3, 2:] != 0).any()
    sent = torch.ones_like(cost)
    for gradient in backend.launch_sinkhorn_backward(
        cost, a, b, LaunchOptions(-10.0, 6, tol, mode), rounds, history, sent, None, None
    ):
        assert (gradient[[2, *range(32, B)]] == 0).all() and torch.isfinite(gradient).all()


def test_schema_and_fake_agree_with_the_kernels(device):
    cost, a, b = mixed(3, 4, device, torch.float32, padded=False)
    cost.requires_grad_()
    arguments = (cost[:5], a[:5], b[:5], ops.numbers(-10.0, -1.0), 4, fused_ops.UNROLL, True)
    torch.library.opcheck(
        torch.ops.otfuse.sinkhorn_triton.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


def test_auto_takes_triton_for_many_small_costs_on_cuda(monkeypatch):
    """By shape alone: a million 4 x 4 items, and every size up to 16 x 16."""
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: [])
    monkeypatch.setattr(TritonBackend, "device", "meta")  # stands for CUDA: nothing is run
    for shape in ((1_048_576, 4, 4), (65_536, 8, 8), (2, 1, 1), (3, 3, 16), (2**20, 16, 16)):
        problem = cost_problem(torch.empty(shape, device="meta"), None, None, SolveOptions(0.1, 20))
        assert select(problem, "auto").name == "triton"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    """B N M of more than 2^31: the last item is the same as alone."""
    cost = torch.zeros(2**31 // 256 + 2, 16, 16, dtype=torch.bfloat16, device="cuda")
    cost[-1] = rand(0, 16, 16).to(cost)
    out = otfuse.sinkhorn(cost, 0.1, num_iters=2, backend="triton")
    alone = otfuse.sinkhorn(cost[-1:], 0.1, num_iters=2, backend="triton")
    assert torch.equal(out.plan[-1:], alone.plan)
