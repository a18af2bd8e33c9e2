"""Launching: what a compiled kernel is remembered by, what results are made after, and that a call never waits.

Each way through the launchers is taken forward and backward, on sizes that the interpreter stands.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import rand
from test_ops import Calls, reads_values

import otfuse
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import device as devices
from otfuse._backends.triton import launch as launching
from otfuse._backends.triton import loss as triton_loss
from otfuse._backends.triton import places
from otfuse._backends.triton import small as triton_small
from otfuse._backends.triton import streaming as triton_large
from otfuse._backends.triton import varlen as triton_varlen
from otfuse._backends.triton.cluster import HELD
from otfuse._backends.triton.device import LaunchShape
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._backends.triton.paths import Path
from otfuse._ops import MODES, LaunchOptions
from otfuse.testing import clustered_tokens

needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="neither CUDA nor Triton's interpreter"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def arguments() -> list[Any]:
    """One of each kind that Triton may look at: addresses, numbers, nothing."""
    room = torch.zeros(64, dtype=torch.float32)
    room = room[(-room.data_ptr() % 64) // 4 :]
    tensors = [room, room[4:], room[1:], room[:0], room.to(torch.bfloat16)[1:], room.to(torch.int32), room.bool()]
    numbers = [-1, 0, 1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, 2**40]
    return [*tensors, None, 0.5, 1.0, 16.0, *numbers]


@pytest.mark.parametrize("specialised", [True, False])
def test_what_triton_would_compile_apart_is_remembered_apart(specialised):
    """A kernel that was compiled for other alignments, or for one, would read elsewhere."""
    triton = pytest.importorskip("triton")
    jit, compiler = triton.runtime.jit, triton.backends.compiler
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip(f"Triton {triton.__version__} specialises in another place")

    def triton_kind(argument):
        return jit.native_specialize_impl(compiler.BaseBackend, argument, False, specialised, True)

    found = [(launching._kinds([argument])[0], triton_kind(argument)) for argument in arguments()]
    for (ours, theirs), (others, other_theirs) in itertools.combinations(found, 2):
        assert ours != others or theirs == other_theirs
    assert len({str(ours) for ours, _ in found}) < len(found), "some are alike"


def test_on_amd_a_kernel_that_reaches_31_bits_is_not_used_beyond(monkeypatch):
    """Triton compiles tensors of less than 2 GiB for offsets of 32 bits there."""
    monkeypatch.setattr(launching, "ON_AMD", True)
    small, large = torch.empty(4), torch.empty(2**29, device="meta")
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 16)
    assert launching._kinds([small])[0] != launching._kinds([large])[0]
    monkeypatch.setattr(launching, "ON_AMD", False)
    assert launching._kinds([small])[0] == launching._kinds([large])[0]


@pytest.mark.parametrize("shape", [(), (3, 4), (2, 0, 5), (0,)])
def test_models_hold_no_memory(shape):
    """One made while a graph is captured would keep the graph's own memory, which torch.compile refuses."""
    made = launching.model(shape, torch.float32, torch.device("cpu"))
    assert made.untyped_storage().nbytes() == 0
    (like,) = launching.new_like([made])
    assert like.shape == shape and like.is_contiguous() and like.untyped_storage().nbytes() == 4 * like.numel()


@pytest.mark.parametrize(
    ("newer", "older", "tf32"),
    [("tf32", None, True), ("ieee", None, False), ("none", None, False), (None, True, True), (None, False, False)],
)
def test_tf32_as_torch_was_told_by_either_setting(monkeypatch, newer, older, tf32):
    """The older one raises once the newer one has been used, and earlier torch has no other."""

    class Matmul:
        def __getattr__(self, name):
            if name == "fp32_precision" and newer is not None:
                return newer
            if name == "allow_tf32" and older is not None:
                return older
            raise RuntimeError(name) if name == "allow_tf32" else AttributeError(name)

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert devices.precision(torch.float32) == ("tf32" if tf32 else "ieee")
    assert devices.precision(torch.bfloat16) == devices.precision(torch.float64) == "ieee"


SOLVE = (10.0, 3, 1e-3)  # scale, rounds, tol


def attend(monkeypatch, device, path, mode, first=False):
    monkeypatch.setattr(backend, "path_of", lambda *_: path)
    monkeypatch.setattr(backend, "launch_shape", lambda *_: LaunchShape(1, 64, first))
    x, y = clustered_tokens(2, 18, 11, 24, device=device)
    options = (torch.ones(2, 18, device=device), None, True, True, LaunchOptions(*SOLVE, mode))

    def run():
        x_out, y_out, plan, similarity, f, g, _, *kept = backend.launch_attend(x, y, *options, True, True, True)
        return backend.launch_attend_backward(x, y, *options, *kept, x_out, y_out, plan, similarity, f, g)

    return run


def solve(monkeypatch, device, path, mode, side=18):
    monkeypatch.setattr(backend, "path_of", lambda *_: path)
    cost = rand(0, 2, side, 9, dtype=torch.float32).to(device)
    options = (None, torch.ones(2, 9, device=device), LaunchOptions(*SOLVE, mode))

    def run():
        plan, f, g, _, *kept = backend.launch_sinkhorn(cost, *options, True)
        return backend.launch_sinkhorn_backward(cost, *options, *kept, plan, f, g)

    return run


def packed(monkeypatch, device, tile, mode):
    monkeypatch.setattr(places, "_largest_tile", lambda *_: tile)
    x, y = (t.flatten(0, 1) for t in clustered_tokens(1, 25, 23, 24, device=device))
    ends = (torch.tensor(e, dtype=torch.int32, device=device) for e in ([0, 20, 20, 25], [0, 18, 19, 23]))
    options = (
        torch.ones(25, device=device),
        None,
        *ends,
        20,
        18,
        True,
        True,
        LaunchOptions(*SOLVE, mode),
    )

    def run():
        x_out, y_out, plan, f, g, _, *kept = triton_varlen.launch_attend_varlen(x, y, *options, True, True)
        return triton_varlen.launch_attend_varlen_backward(x, y, *options, *kept, x_out, y_out, plan, f, g)

    return run


def loss(monkeypatch, device, _, mode):
    plan = rand(0, 2, 18, 11, dtype=torch.float32).to(device)
    options = (None, None, 0.1, mode, mode % 2, True)

    def run():
        terms, normaliser, _ = triton_loss.launch_alignment_loss(plan, plan, *options)
        return triton_loss.launch_alignment_loss_backward(plan, plan, *options, normaliser, terms)

    return run


WAYS: dict[str, tuple[Callable[..., Any], Any]] = {
    "on chip": (attend, Path.ON_CHIP),
    "on chip, similarity first": (lambda *a: attend(*a, first=True), Path.ON_CHIP),
    "on chip, cost": (solve, Path.ON_CHIP),
    "many small": (lambda *a: solve(*a, side=4), Path.SMALL),
    "over a cluster": (attend, Path.CLUSTER),
    "stored": (attend, Path.STORED),
    "recomputed": (attend, Path.RECOMPUTED),
    "stored, cost": (solve, Path.STORED),
    "packed": (packed, (32, 32)),
    "packed, beyond the chip": (packed, (16, 16)),
    "loss": (loss, None),
}


@pytest.fixture(params=[f"{way}-{mode}" for way in WAYS for mode in MODES])
def run(request, monkeypatch, device):
    """Forward and backward on one of the ways, by one of the gradient modes."""
    way, mode = request.param.rsplit("-", 1)
    make, how = WAYS[way]
    return make(monkeypatch, device, how, MODES[mode])


@needs_triton
def test_no_value_is_read_on_any_way(run):
    """Forward and backward, weights and early stop included: a graph can capture it, nobody waits."""
    with Calls() as calls:
        gradients = run()
    assert [str(func) for func, args in calls.seen if reads_values(func, args)] == []
    to_host = [func for func, _ in calls.seen if "_to_copy" in str(func) or "to.device" in str(func)]
    assert not to_host and calls.seen
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.fixture
def grids(monkeypatch):
    """Of what would be launched on an H100, by tensors without values."""
    pytest.importorskip("triton")
    seen = []
    for module in (backend, triton_large, triton_small, triton_loss):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_: seen.append((kernel.__name__, grid)))
        monkeypatch.setattr(module, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(devices, "memory_of", lambda device: 80 << 30)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(devices, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(backend, "held_by", lambda device: HELD["sm_90"])
    for cached in (backend._path, devices.device_memory, devices.blocks):
        cached.cache_clear()
    return seen


@pytest.mark.parametrize("grad", ["unroll", "implicit"])
@pytest.mark.parametrize(
    "shape",
    [(1, 16384, 16384, 768), (1, 16384, 16384, 16), (1, 2**20, 300, 64), (8, 1, 2**20, 64), (2**22, 4, 4, 8),
     (1, 256, 16, 2**20), (2**20, 16, 16, 0), (1, 16384, 16384, 0), (2**27, 2, 2, 0), (3, 1, 2**20, 0)],
    ids=str,
)  # fmt: skip
def test_no_grid_is_larger_than_a_device_takes(grids, shape, grad):
    """2^31 - 1 programs along the first dimension and 65535 along the others; Triton multiplies them in 32 bits, and
    launches nothing where that overflows."""
    B, N, M, D = shape
    options = (LaunchOptions(*SOLVE[:2], -1.0, MODES[grad]),)
    if D:
        x, y = (torch.empty(B, side, D, dtype=torch.bfloat16, device="meta") for side in (N, M))
        out = backend.launch_attend(x, y, None, None, True, False, *options, True, False, False)
        sent = (*out[:2], None, None, *out[4:6])
        backend.launch_attend_backward(x, y, None, None, True, False, *options, *out[-2:], *sent)
    else:
        cost = torch.empty(B, N, M, dtype=torch.bfloat16, device="meta")
        plan, *out = backend.launch_sinkhorn(cost, None, None, *options, True)
        backend.launch_sinkhorn_backward(cost, None, None, *options, *out[-2:], plan, *out[:2])
    assert len(grids) > 1
    for name, grid in grids:
        assert 0 < math.prod(grid) < 2**31 and max(grid[1:], default=1) < 2**16, (name, grid)


@needs_cuda
def test_every_way_in_a_cuda_graph(run):
    """Captured once on a stream of its own, replayed: as when it is launched."""
    expected = [gradient.clone() for gradient in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for gradient in captured:
        gradient.fill_(torch.nan)
    graph.replay()
    for one, other in zip(captured, expected):
        assert torch.equal(one, other)


@needs_cuda
def test_compiled_with_cuda_graphs(device):
    """The very first call is made inside the graph's memory pool, in which nothing of ours may stay."""
    for cached in (backend._attend_models, backend._solution_models, launching.model):
        cached.cache_clear()
    x, y = (t.requires_grad_() for t in clustered_tokens(2, 21, 11, 24, device=device))

    def run(x, y):
        return otfuse.sinkhorn_attend(x, y, num_iters=3, backend="triton").x

    compiled = torch.compile(run, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x, y).clone()
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    plain = run(x, y)
    torch.testing.assert_close((out, gradient), (plain, torch.autograd.grad(plain.square().sum(), x)[0]))


@needs_cuda
def test_offsets_beyond_32_bits(monkeypatch):
    """Tokens times features of more than 2^31: the last item is the same as alone, and so is its gradient.

    One after the other: each takes some 15 GB, and tests may run side by side.
    """
    B = 2**31 // (16 * 64) + 2
    last = tuple(t.clone() for t in clustered_tokens(1, 16, 1, 64, dtype=torch.bfloat16, device="cuda"))
    all_x, all_y = (torch.ones(B, n, 64, dtype=torch.bfloat16, device="cuda") for n in (16, 1))
    all_x[-1:], all_y[-1:] = last

    def results(x, y, solve):
        leaves = [t.requires_grad_() for t in (x, y)]
        out = solve(*leaves)
        gradients = torch.autograd.grad(out, leaves, [t.detach() for t in out])
        return [t.flatten(0, -2)[-n:].clone() for t, n in zip((*out, *gradients), (16, 1) * 2)]

    def padded(x, y):
        return otfuse.sinkhorn_attend(x, y, num_iters=1, backend="triton")[:2]

    def packed(x, y):
        ends = torch.arange(len(x) + 1, dtype=torch.int32, device="cuda")
        tokens = x.flatten(0, 1), y.flatten(0, 1)
        return otfuse.sinkhorn_attend_varlen(*tokens, 16 * ends, ends, 16, 1, num_iters=1, backend="triton")[:2]

    for call, path in ((padded, Path.STORED), (padded, Path.RECOMPUTED), (packed, Path.ON_CHIP)):
        monkeypatch.setattr(backend, "path_of", lambda *_, path=path: path)
        for one, other in zip(results(all_x, all_y, call), results(*last, call)):
            torch.testing.assert_close(one, other, msg=lambda text, path=path: f"{path}: {text}")
