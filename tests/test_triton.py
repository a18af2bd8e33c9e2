"""What only the Triton backend has: ways to launch, what launching costs, and what needs a GPU to be seen."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import padded_weights
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import device as devices
from otfuse._backends.triton.device import LaunchShape, launch_shape
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._ops import MODES, LaunchOptions
from otfuse.testing import clustered_tokens, specified_attend

CPU = torch.device("cpu")


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("B", [1, 4, 64, 65, 132, 1024])
@pytest.mark.parametrize("D", [0, 1, 63, 64, 768, 1000])
def test_parts_cover_the_features_and_no_more(monkeypatch, processors, B, D):
    monkeypatch.setattr(devices, "multiprocessors", lambda device: processors)
    shape = launch_shape(B, 84 * D * 2, D, CPU)
    assert shape.parts * shape.features >= D and (shape.parts - 1) * shape.features < max(D, 1)
    assert shape.features % 64 == 0 and shape.parts >= 1
    assert shape.parts == 1 or shape.parts * B <= processors, "no more programs than run side by side"
    assert not shape.similarity_first or shape.parts > 1


def test_large_tokens_are_read_once_by_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 132)
    assert not launch_shape(4, 84 * 768 * 2, 768, CPU).similarity_first
    assert launch_shape(4, 276 * 768 * 2, 768, CPU).similarity_first
    assert not launch_shape(256, 276 * 768 * 2, 768, CPU).similarity_first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_every_launch_shape_gives_the_answer(monkeypatch, device, dtype, grad):
    """Forward and backward, with padding, NaN in an item, early stop, and everything that can be asked for."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")
    x, y = clustered_tokens(3, 33, 20, 130, dtype=dtype, device=device)
    a, b = padded_weights(0, 3, 33, dtype).to(device), (padded_weights(1, 3, 20) != 0).to(device)
    spoilt = x.clone()
    spoilt[1, 0] = torch.nan

    def solve(shape, tokens):
        monkeypatch.setattr(backend, "launch_shape", lambda *_: shape)
        leaves = tokens.clone().requires_grad_(), y.clone().requires_grad_(), a.clone().requires_grad_()
        out = otfuse.sinkhorn_attend(
            *leaves[:2], 0.1, a=leaves[2], b=b, weights="barycentric", num_iters=20, tol=1e-3, grad=grad,
            return_plan=True, backend="triton",
        )  # fmt: skip
        loss = out.x.double().square().sum() + out.y.double().sum() + out.plan.double().square().sum()
        return tuple(t.detach() for t in (*out, *torch.autograd.grad(loss, leaves)))

    exact = specified_attend(
        x.double(), y.double(), 0.1, a=a.double(), b=b, weights="barycentric", num_iters=20, tol=1e-3
    )
    rounding = torch.finfo(dtype).eps
    shapes = LaunchShape(1, 192, False), LaunchShape(3, 64, False), LaunchShape(3, 64, True)
    for tokens in (x, spoilt):
        one, *others = (solve(shape, tokens) for shape in shapes)
        for shape, other in zip(shapes[1:], others):
            for first, second in zip(one, other):
                assert first.dtype == second.dtype
                atol = 64 * rounding * float(torch.nan_to_num(first.double(), 0, 0, 0).abs().max())
                torch.testing.assert_close(
                    first, second, rtol=0, atol=atol, equal_nan=True, msg=lambda text, shape=shape: f"{shape}: {text}"
                )
        if tokens is x:
            assert torch.equal(one[6].cpu(), exact.num_iters.cpu())
            atol = float(2 * rounding * exact.x.abs().max()) + 1e-12
            torch.testing.assert_close(one[0].double(), exact.x, rtol=0, atol=atol)
        else:
            assert one[0][1].isnan().all() and not one[0][[0, 2]].isnan().any()


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if t.numel()]
        return out


class Calls(TorchDispatchMode):
    """The names of all operations of torch that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_matrix_is_made_unless_asked_for(monkeypatch, device, mode, first):
    """Forward and backward; but for small batches of large items, whose similarity has a launch of its own."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")
    monkeypatch.setattr(backend, "launch_shape", lambda *_: LaunchShape(1, 64, first))
    x, y = clustered_tokens(2, 13, 11, 24, device=device)
    options = (None, None, True, False, LaunchOptions(10.0, 5, -1.0, MODES[mode]))
    matrix = (2, 13, 11)
    with Shapes() as shapes:
        x_out, y_out, *_, rounds, history = backend.launch_attend(x, y, *options, True, False, False)
    assert (matrix in shapes.seen) == first and (2, 13, 24) in shapes.seen
    with Shapes() as shapes:
        backend.launch_attend_backward(x, y, *options, rounds, history, x_out, y_out, None, None, None, None)
    assert matrix not in shapes.seen and (2, 13, 24) in shapes.seen
    with Shapes() as shapes:
        backend.launch_attend(x, y, *options, True, True, False)
    assert matrix in shapes.seen


@pytest.mark.parametrize("tol", [-1.0, 1e-3])
@pytest.mark.parametrize("mode", MODES)
def test_launchers_read_no_value_and_wait_for_nothing(device, mode, tol):
    """Forward and backward, early stop included: nothing but room is made, so that a graph can capture it."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")
    backend._attend_models.cache_clear()
    x, y = clustered_tokens(2, 13, 11, 24, device=device)
    a = torch.ones(2, 13, device=device)
    options = (a, None, True, True, LaunchOptions(10.0, 5, tol, MODES[mode]))
    with Calls() as calls:
        x_out, y_out, *_, rounds, history = backend.launch_attend(x, y, *options, True, True, True)
        backend.launch_attend_backward(x, y, *options, rounds, history, x_out, y_out, None, None, None, None)
    interpreters = {"copy_", "set_"} if device.type == "cpu" else set()
    assert {name.split(".")[1] for name in calls.seen} - interpreters <= {"empty", "empty_like", "new_empty", "expand"}


@pytest.mark.parametrize("current, changed", [(0, [1]), (1, [])])
def test_the_device_of_the_tensors_becomes_the_current_one(monkeypatch, current, changed):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device.index) or contextlib.nullcontext())
    with backend.on(torch.device("cuda", 1)):
        assert entered == changed


@pytest.fixture(scope="session")
def stand_in() -> dict:
    """The launchers as they run on a GPU, on a driver that has none: bound, specialised, compiled and not run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("stand_in_driver.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tile_is_compiled_once(stand_in):
    """Not for every N and M, nor for every B, epsilon or number of rounds."""
    assert (stand_in["first"], stand_in["same tile"], stand_in["next tile"]) == (1, 1, 2)


def test_one_launch_on_the_current_stream_with_numbers_unrounded(stand_in):
    assert stand_in["names"] == ["_attend_fwd_kernel"] * 8 and stand_in["streams"] == [7]
    assert stand_in["grid"] == [64, 2, 1]  # 132 processors, 64 items
    numbers = stand_in["numbers"]
    first = numbers.index(65)  # N, M, D, the features of a part, 1 / epsilon, rounds, no tolerance
    assert numbers[first : first + 7] == [65, 20, 768, 384, 10.0, 50, -1.0]


def test_an_item_is_launched_over_a_cluster(stand_in):
    """All rounds of a batch once, in four blocks an item, and its adjoint rounds."""
    assert stand_in["cluster"].count(["_rounds_kernel", [3, 1, 1]]) == 1
    assert stand_in["cluster"].count(["_adjoint_rounds_kernel", [3, 1, 1]]) == 1
    assert stand_in["blocks"] == [4, 4]


def test_another_current_stream_is_followed(stand_in):
    assert stand_in["another stream"] == 8


def test_tf32_is_compiled_in_only_where_torch_allows_it(stand_in):
    """Back again, the first kernel is launched anew, and nothing is compiled."""
    assert stand_in["tf32"] == [False, True, None]


def test_addresses_have_64_bits(stand_in):
    """An item's number does before it is multiplied by anything."""
    assert stand_in["item"] == "i64"


def test_two_launches_for_a_small_batch_of_large_items(stand_in):
    names = [name for name, _ in stand_in["small batch"]]
    assert names == ["_similarity_kernel", "_attend_fwd_kernel"]
    (_, tiles), (_, parts) = stand_in["small batch"]
    assert tiles[0] == parts[0] == 2 and parts[1] > 1


def test_packed_tokens_are_compiled_once_for_a_tile(stand_in):
    """Not for every longest item, nor for other numbers of items or of tokens; a program for every item."""
    assert stand_in["packed"] == [["_varlen_fwd_kernel", [B, 1, 1]] for B in (256, 7, 1)]
    assert stand_in["packed, compiled"] == 1


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("grad", ["unroll", "implicit", "detach"])
def test_forward_and_backward_in_a_cuda_graph(grad):
    """Captured once, replayed on other tokens: nothing waits for the device, nothing depends on values."""
    x, y = (t.cuda().requires_grad_() for t in clustered_tokens(4, 64, 20, 96))

    def step():
        out = otfuse.sinkhorn_attend(x, y, grad=grad, backend="triton")
        return (*out[:2], *torch.autograd.grad(out.x.square().sum() + out.y.sum(), (x, y)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(clustered_tokens(4, 64, 20, 96, seed=1)[0])
    graph.replay()
    for one, other in zip(captured, step()):
        assert torch.equal(one, other)


@needs_cuda
def test_the_current_stream_is_used():
    x, y = (t.cuda() for t in clustered_tokens(4, 64, 20, 96))
    expected = otfuse.sinkhorn_attend(2 * x, y, backend="triton").x
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows on another stream would read x before it is doubled
        x.mul_(2)
        out = otfuse.sinkhorn_attend(x, y, backend="triton").x
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current():
    x, y = (t.to("cuda:1") for t in clustered_tokens(4, 64, 20, 96))
    out = otfuse.sinkhorn_attend(x, y, backend="triton").x
    assert out.device == x.device and torch.equal(
        out.cpu(), otfuse.sinkhorn_attend(x.to("cuda:0"), y.to("cuda:0")).x.cpu()
    )


@needs_cuda
def test_offsets_beyond_32_bits():
    """B N D of more than 2^31: the last item is the same as alone."""
    B = 2**31 // (16 * 64) + 2
    x = torch.ones(B, 16, 64, dtype=torch.bfloat16, device="cuda")
    y = torch.ones(B, 1, 64, dtype=torch.bfloat16, device="cuda")
    x[-1], y[-1] = (t[0] for t in clustered_tokens(1, 16, 1, 64, dtype=torch.bfloat16, device="cuda"))
    out = otfuse.sinkhorn_attend(x, y, num_iters=2, backend="triton")
    alone = otfuse.sinkhorn_attend(x[-1:], y[-1:], num_iters=2, backend="triton")
    torch.testing.assert_close(out.x[-1:], alone.x)
    torch.testing.assert_close(out.y[-1:], alone.y)


@needs_cuda
def test_tf32_only_where_torch_allows_it(monkeypatch):
    x, y = (t.cuda() for t in clustered_tokens(4, 64, 20, 96))
    exact = specified_attend(x.double(), y.double()).plan
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        plan = otfuse.sinkhorn_attend(x, y, return_plan=True, backend="triton").plan
        errors.append(float((plan - exact).abs().max() / exact.max()))
    assert errors[0] < 1e-5 < errors[1] < 1e-1
