"""Packed tokens in Triton: which launches a batch takes, items beyond a tile, and that nothing is padded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import few_roundings, is_interpreted, padded_weights, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse._backends.triton import attend as dense
from otfuse._backends.triton import device as devices
from otfuse._backends.triton import places
from otfuse._backends.triton import streaming as large
from otfuse._backends.triton import varlen as packed
from otfuse._backends.triton import varlen_streaming as long_launches
from otfuse._backends.triton.paths import Path
from otfuse._backends.triton.places import size_classes
from otfuse._ops import MODES, LaunchOptions
from otfuse.kernels.constants import TABLE

D = 6


@pytest.fixture(autouse=True)
def _somewhere_to_run():
    if not (dense.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("neither CUDA nor Triton's interpreter")


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def batch(lengths_x: Sequence[int], lengths_y: Sequence[int], device: torch.device, D: int = D, **to: Any) -> dict:
    x, y = (randn(seed, sum(n), D).to(device, **to) for seed, n in ((0, lengths_x), (1, lengths_y)))
    return {
        "x": x, "y": y, "cu_seqlens_x": offsets(lengths_x, device), "cu_seqlens_y": offsets(lengths_y, device),
        "max_seqlen_x": max(lengths_x), "max_seqlen_y": max(lengths_y),
    }  # fmt: skip


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, grid and constants of every launch for packed tokens."""
    seen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    launch = packed.launch

    def record(kernel, grid, arguments, constants, device):
        seen.append((kernel.fn.__name__, grid, constants))
        launch(kernel, grid, arguments, constants, device)

    for module in (packed, places, large):
        monkeypatch.setattr(module, "launch", record)
    return seen


@pytest.fixture
def small_tiles(monkeypatch, device):
    """Items beyond 16 x 16 fit no tile; their strips and blocks are so small that each has several."""
    monkeypatch.setattr(places, "_largest_tile", lambda *_: (16, 16))
    monkeypatch.setattr(large, "BLOCKS", {key: dict.fromkeys((2, 4, 8), (16, 16, 4, 2)) for key in large.BLOCKS})
    monkeypatch.setattr(large, "LINES", 16 if device.type == "cpu" else large.LINES)


MANY = 100_000  # items, more than any device solves at once


@pytest.mark.parametrize(
    "longest, itemsize, tiles",
    [
        ((1, 1), 4, [(16, 16)]),
        ((64, 20), 4, [(64, 32), (32, 16)]),
        ((128, 128), 4, [(128, 128), (64, 64), (32, 32), (16, 16)]),
        ((256, 20), 4, [(256, 32), (128, 16), (64, 16), (32, 16)]),
        ((1000, 20), 4, [(256, 32), (128, 16), (64, 16), (32, 16)]),
        ((200, 60), 4, [(128, 64), (64, 32), (32, 16)]),
        ((1000, 1000), 8, [(64, 64), (32, 32), (16, 16)]),
    ],
)
def test_classes_follow_from_the_longest_alone(longest, itemsize, tiles):
    assert [of.tile for of in size_classes(*longest, itemsize, MANY, 132)] == tiles


@pytest.mark.parametrize(
    "longest, B, tiles",
    [
        ((128, 128), 132, [(128, 128)]),
        ((128, 128), 133, [(128, 128), (64, 64)]),
        ((128, 128), 265, [(128, 128), (64, 64), (32, 32)]),
        ((64, 20), 256, [(64, 32)]),
        ((64, 20), 396, [(64, 32)]),
        ((64, 20), 397, [(64, 32), (32, 16)]),
    ],
)
def test_a_batch_that_runs_all_at_once_has_one_launch(longest, B, tiles):
    """Another would begin when the longest item of the first is done, however short its own are."""
    assert [of.tile for of in size_classes(*longest, 4, B, 132)] == tiles


@pytest.mark.parametrize("longest", [(1, 1), (64, 20), (128, 128), (70, 256), (100, 3), (3000, 3000)])
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("B", [1, 200, MANY])
def test_every_item_has_one_launch(longest, itemsize, B):
    """On chip or, if it is larger than what fits, among the others."""
    classes = size_classes(*longest, itemsize, B, 132)
    edges = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 255, 256}
    lengths = [sorted((edges | {most}) & {*range(most + 1)}) for most in longest]
    for n, m in itertools.product(*lengths):
        solving = [of for of in classes if n <= of.most[0] and m <= of.most[1] and (n > of.less[0] or m > of.less[1])]
        fits = n <= classes[0].most[0] and m <= classes[0].most[1]
        assert len(solving) == fits, (n, m)
        for of in solving:
            assert n <= of.tile[0] and m <= of.tile[1] and places._fits(*of.tile, itemsize)


def test_what_no_item_can_need_is_not_launched(device, launches, monkeypatch):
    """Nor is anything for matrices that nobody asked for."""
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 1)
    lengths = [3, 16, 0, 7]
    otfuse.sinkhorn_attend_varlen(**batch(lengths, lengths, device, dtype=torch.float32), num_iters=2, backend="triton")
    assert [(name, grid) for name, grid, _ in launches] == [("_varlen_fwd_kernel", (4, 1))]
    launches.clear()
    with_plan = {"num_iters": 2, "return_plan": True, "backend": "triton"}
    items = batch([1, 80, 9], [5, 40, 3], device, D=2, dtype=torch.float32)
    otfuse.sinkhorn_attend_varlen(**items, **with_plan)
    tiles = [(constants["BLOCK_N"], constants["BLOCK_M"]) for _, _, constants in launches[:-1]]
    assert tiles == [(128, 64), (64, 32)] and launches[-1][0] == "_varlen_matrix_kernel"


def test_a_long_item_alone_is_what_it_is_in_a_batch(small_tiles, device):
    """Bitwise, forward and backward, wherever its blocks stand among the others'."""
    lengths_x, lengths_y = [40, 3, 17, 21], [9, 20, 33, 2]
    items = batch(lengths_x, lengths_y, device, dtype=torch.bfloat16)
    items["x"].requires_grad_()
    options = {"num_iters": 2, "tol": 1e-3, "backend": "triton"}
    out = otfuse.sinkhorn_attend_varlen(**items, **options)
    (gradient,) = torch.autograd.grad(out.x.double().square().sum(), items["x"])
    own_x, own_y = slice(43, 60), slice(29, 62)
    x = items["x"].detach()[own_x].clone().requires_grad_()
    ends = offsets([17], device), offsets([33], device)
    alone = otfuse.sinkhorn_attend_varlen(x, items["y"][own_y], *ends, 40, 33, **options)
    for one, other in zip((out.x[own_x], out.y[own_y], out.f[own_x], out.g[own_y]), (*alone[:2], *alone[3:5])):
        assert torch.equal(one, other)
    assert torch.equal(out.num_iters[2:3], alone.num_iters)
    assert torch.equal(gradient[own_x], torch.autograd.grad(alone.x.double().square().sum(), x)[0])


@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_item_alone_is_what_it_is_in_a_batch(monkeypatch, device, dtype, processors):
    """Bitwise, where it is launched in the same shape: all at once, or each size by itself."""
    monkeypatch.setattr(devices, "multiprocessors", lambda device: processors)
    lengths_x, lengths_y = [5, 33, 1, 40, 0, 17], [4, 20, 7, 9, 3, 18]
    items = batch(lengths_x, lengths_y, device, dtype=dtype)
    items["x"].requires_grad_()
    options = {"num_iters": 5, "tol": 1e-3, "backend": "triton"}
    out = otfuse.sinkhorn_attend_varlen(**items, **options)
    (gradient,) = torch.autograd.grad(out.x.double().square().sum(), items["x"])
    for item, (N, M) in enumerate(zip(lengths_x, lengths_y)):
        own_x, own_y = (slice(sum(n[:item]), sum(n[: item + 1])) for n in (lengths_x, lengths_y))
        x = items["x"].detach()[own_x].clone().requires_grad_()
        alone = otfuse.sinkhorn_attend_varlen(
            x, items["y"][own_y], offsets([N], device), offsets([M], device), 40, 20, **options
        )
        for values, own, other in zip(
            (out.x, out.y, out.f, out.g), (own_x, own_y) * 2, (alone.x, alone.y, alone.f, alone.g)
        ):
            assert torch.equal(values[own], other), item
        assert torch.equal(out.num_iters[item : item + 1], alone.num_iters)
        assert torch.equal(gradient[own_x], torch.autograd.grad(alone.x.double().square().sum(), x)[0])


# Of a tile of 16 x 16 these are: shorter; longer on one side, the other, both; empty on one side and long on the other.
LENGTHS_X, LENGTHS_Y = [0, 24, 3, 33, 20], [5, 9, 24, 18, 0]


def run(items: dict, a: Tensor, b: Tensor, backend: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The output, and the gradients of a sum of everything that has one."""
    leaves = tuple(t.clone().requires_grad_() for t in (items["x"], items["y"], a, b))
    packed_items = {**items, "x": leaves[0], "y": leaves[1]}
    out = otfuse.sinkhorn_attend_varlen(
        **packed_items, epsilon=0.5, a=leaves[2], b=leaves[3], return_plan=True, backend=backend, **options
    )
    differentiable = [
        torch.where(t.isfinite(), t, 0) for t in (out.x, out.y, out.plan, out.f, out.g) if t.requires_grad
    ]
    loss = sum((t * randn(seed, *t.shape).to(t)).sum() for seed, t in enumerate(differentiable))
    return out, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    "path, options",
    [
        (Path.STORED, {"grad": "unroll", "weights": "plan", "similarity": "cosine", "num_iters": 4}),
        (
            Path.RECOMPUTED,
            {"grad": "unroll", "weights": "barycentric", "similarity": "dot", "num_iters": 4, "tol": 1e-2},
        ),
        (Path.STORED, {"grad": "implicit", "weights": "barycentric", "similarity": "cosine", "num_iters": 12}),
        (Path.STORED, {"grad": "detach", "weights": "barycentric", "similarity": "cosine", "num_iters": 4, "tol": 0.1}),
        (Path.RECOMPUTED, {"grad": "detach", "weights": "plan", "similarity": "cosine", "num_iters": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, Path) else "-".join(map(str, list(value.values())[:3])),
)
def test_items_that_fit_no_tile(monkeypatch, small_tiles, device, options, path):
    """Everything they return and every gradient is that of the padded way, at a size that the interpreter stands."""
    monkeypatch.setattr(long_launches, "choose", lambda *_: path)
    # The steps of conjugate gradients that are launched: these items are done after a dozen.
    monkeypatch.setattr(large, "num_steps", lambda *_: 16)
    items = batch(LENGTHS_X, LENGTHS_Y, device, dtype=torch.float64)
    a, b = (padded_weights(seed, 1, sum(n))[0].to(items["x"]) for seed, n in ((3, LENGTHS_X), (4, LENGTHS_Y)))
    (expected, expected_gradients), (out, gradients) = (
        run(items, a, b, name, **options) for name in ("torch", "triton")
    )
    # Cosines over epsilon 0.5 are below two; dots of six normal numbers reach some 20.
    atol = (20 if options["similarity"] == "dot" else 2) / 0.5 * few_roundings()
    for name, one, other in zip(out._fields, out, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    # Coefficients of up to four for some hundred entries, over epsilon; the plan is at its fixed point after 12 rounds.
    for name, one, other in zip("xyab", gradients, expected_gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e4 * atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [0.5, 0.005])
def test_items_that_fit_no_tile_in_every_dtype(monkeypatch, device, dtype, epsilon):
    """At an epsilon, too, that has entries of the plan far below what the dtype can hold."""
    monkeypatch.setattr(places, "_largest_tile", lambda *_: (16, 16))
    items = batch([20, 9, 16], [18, 30, 16], device, dtype=dtype)
    options = {"epsilon": epsilon, "num_iters": 8, "weights": "barycentric"}
    exact = otfuse.sinkhorn_attend_varlen(
        **{**items, "x": items["x"].double(), "y": items["y"].double()}, **options, backend="torch"
    )
    out = otfuse.sinkhorn_attend_varlen(**items, **options, backend="triton")
    assert out.x.dtype == dtype and out.f.dtype == torch.float32
    # A rounding of the similarity is one over epsilon of the plan; and the output is rounded to its dtype.
    atol = 4 * torch.finfo(torch.float32).eps / epsilon * 8 + 2 * torch.finfo(dtype).eps * float(exact.x.abs().max())
    torch.testing.assert_close(out.x.double(), exact.x, rtol=0, atol=atol)
    torch.testing.assert_close(out.y.double(), exact.y, rtol=0, atol=atol)
    torch.testing.assert_close(out.f.double(), exact.f, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nan_stays_in_an_item_that_fits_no_tile(small_tiles, device, bad):
    items = batch([20, 18, 3], [18, 20, 4], device, dtype=torch.float32)
    items["x"][2, 1] = float(bad)
    items["y"].requires_grad_()
    mask = torch.ones(41, dtype=torch.bool, device=device)
    mask[[0, 25]] = False
    out = otfuse.sinkhorn_attend_varlen(**items, a=mask, num_iters=3, return_plan=True, backend="triton")
    for values, own in ((out.x, 20), (out.y, 18), (out.f, 20), (out.g, 18), (out.marginal_error, 1), (out.plan, 1)):
        assert values[:own].isnan().all() and not values[own:].isnan().any()
    (gradient,) = torch.autograd.grad(out.x[20:].square().sum(), items["y"])
    assert torch.isfinite(gradient[18:]).all() and gradient[18:].abs().sum() > 0


def test_lengths_that_differ_by_a_factor_of_a_thousand(monkeypatch, device, launches):
    """A long item among short ones and empty ones: each is solved by the launch of its size."""
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 1)
    lengths_x, lengths_y = [1, 3, 1000, 0, 2, 1], [1, 2, 40, 2, 0, 1]
    items = batch(lengths_x, lengths_y, device, D=2, dtype=torch.float32)
    out = otfuse.sinkhorn_attend_varlen(**items, num_iters=3, backend="triton")
    names = [name for name, _, _ in launches]
    assert names[:3] == ["_varlen_fwd_kernel"] * 3 and "_varlen_fwd_kernel" not in names[3:]
    assert names.count("_strip_kernel") == 1 + 3 + 1 and names.count("_gather_kernel") == 1 + 3
    strips = {(grid[0], constants["BLOCK_N"]) for name, grid, constants in launches if name == "_strip_kernel"}
    ((programs, rows),) = strips
    assert 1000 / rows <= programs <= 1007 / rows + len(lengths_x), "no more than these tokens can need"
    for item, (x, y, x_out, y_out) in enumerate(
        zip(
            *(
                t.split(n)
                for t, n in ((items["x"], lengths_x), (items["y"], lengths_y), (out.x, lengths_x), (out.y, lengths_y))
            )
        )
    ):
        exact = otfuse.sinkhorn_attend(x[None].double(), y[None].double(), num_iters=3, backend="torch")
        atol = 64 * torch.finfo(torch.float32).eps / 0.1 * 4
        torch.testing.assert_close(x_out.double(), exact.x[0], rtol=0, atol=atol, msg=f"item {item}")
        torch.testing.assert_close(y_out.double(), exact.y[0], rtol=0, atol=atol, msg=f"item {item}")


class Bytes(TorchDispatchMode):
    """Of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.nbytes for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def largest_made(items: dict, mode: int, rounds: int) -> int:
    """In bytes, by the launchers, forward and backward: below the ops, where the tensors of a call are made."""
    order = "x", "y", "a", "b", "cu_seqlens_x", "cu_seqlens_y", "max_seqlen_x", "max_seqlen_y"
    arguments = *(items.get(name) for name in order), True, False, LaunchOptions(10.0, rounds, -1.0, mode)
    with Bytes() as made:
        out = packed.launch_attend_varlen(*arguments, True, False)
        packed.launch_attend_varlen_backward(*arguments, *out[-2:], *out[:2], None, None, None)
    return made.largest


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_padded(device, mode):
    """Nothing is made that is larger than the tokens or the history, where padded tokens would be ten times as many."""
    lengths_x, lengths_y = [30, *[1] * 19], [20, *[1] * 19]
    items = batch(lengths_x, lengths_y, device, D=16, dtype=torch.float32)
    total, rounds = sum(lengths_x) + sum(lengths_y), 3
    most, if_padded = 4 * max(sum(lengths_x) * 16, 2 * 20 + rounds * total), 4 * 20 * 30 * 16
    assert most <= if_padded / 10
    assert largest_made(items, MODES[mode], rounds) == most
    with Bytes() as made:
        otfuse.sinkhorn_attend_varlen(**items, num_iters=rounds, grad=mode, backend="torch")
    assert made.largest >= if_padded


def test_matrices_of_long_items_take_no_room_for_short_ones(monkeypatch, device):
    """[T_x, longest_y], however many items there are: a padded batch of these would have ten times as many entries."""
    monkeypatch.setattr(places, "_largest_tile", lambda *_: (16, 16))
    lengths = [40, *[1] * 19]
    items = batch(lengths, lengths, device, D=1, dtype=torch.float32)
    assert largest_made(items, MODES["unroll"], 1) == 4 * sum(lengths) * 40 < 4 * 20 * 40 * 40 / 10


def test_matrices_beyond_the_memory_are_not_made(monkeypatch, small_tiles, device):
    """Where they would take more than a quarter of it, tiles are made anew from the tokens in every round."""
    items = batch([3, 270], [70, 2], device, D=17, dtype=torch.float32)
    room = 4 * 273 * 70
    monkeypatch.setattr(devices, "memory_of", lambda device: 4 * room)
    assert largest_made(items, MODES["detach"], 1) == room
    stored = otfuse.sinkhorn_attend_varlen(**items, num_iters=1, backend="triton").x
    monkeypatch.setattr(devices, "memory_of", lambda device: 4 * room - 1)
    assert largest_made(items, MODES["detach"], 1) < room / 2
    made_anew = otfuse.sinkhorn_attend_varlen(**items, num_iters=1, backend="triton").x
    torch.testing.assert_close(made_anew, stored, rtol=0, atol=64 * torch.finfo(torch.float32).eps / 0.1)


def blocks_as_written(items: dict, most: tuple[int, int], rows: int, columns: int, strip: int) -> list[list[int]]:
    """The table of the blocks of items longer than ``most``, by its definition."""
    ends = items["cu_seqlens_x"].tolist(), items["cu_seqlens_y"].tolist()
    table, strips = [], 0
    for item, (start_x, end_x, start_y, end_y) in enumerate(zip(ends[0], ends[0][1:], ends[1], ends[1][1:])):
        N, M = end_x - start_x, end_y - start_y
        if (most[0] >= N and most[1] >= M) or items["max_seqlen_x"] < N or items["max_seqlen_y"] < M:
            continue
        count = (-(-N // rows) if rows else 0) + (-(-M // columns) if columns else 0) + (not rows + columns)
        P = -(-N // strip)
        table += [[item, block, start_x, N, start_y, M, strips, P] for block in range(count)]
        strips += P
    return table


@pytest.mark.parametrize("rows, columns", [(16, 0), (0, 32), (8, 8), (0, 0)])
@pytest.mark.parametrize("longest", [(90, 60), (50, 60)])
def test_table_of_blocks(monkeypatch, device, rows, columns, longest):
    """Of more items than are looked at together: empty, short, long on one side, longer than announced."""
    monkeypatch.setitem(places.MADE, "ITEMS", 4)
    monkeypatch.setattr(places, "_largest_tile", lambda *_: (16, 16))
    lengths_x, lengths_y = [0, 20, 3, 90, 16, 0, 17, 50, 1], [0, 3, 20, 60, 16, 40, 0, 5, 17]
    items = batch(lengths_x, lengths_y, device, D=2, dtype=torch.float32)
    items["max_seqlen_x"], items["max_seqlen_y"] = longest
    tokens = items["x"], items["y"], None, None, items["cu_seqlens_x"], items["cu_seqlens_y"]
    long_items = places.LongItems(packed._packed(*tokens, *longest))
    for swapped in (False, True):
        programs, table = long_items.blocks(rows, columns, 16, swapped)
        expected = blocks_as_written(items, (16, 16), rows, columns, 16)
        if swapped:
            sides = {of: items[f"{of}_{side}"] for of in ("cu_seqlens", "max_seqlen") for side in "xy"}
            turned = {f"{of}_{side}": items[f"{of}_{other}"] for of in sides for side, other in ("xy", "yx")}
            expected = blocks_as_written(turned, (16, 16), rows, columns, 16)
        assert table.shape == (programs, TABLE) and programs >= len(expected)
        assert table[: len(expected)].tolist() == expected and (table[len(expected) :, 0] == -1).all()


def test_there_are_programs_enough(monkeypatch):
    """For whatever lengths have these totals and these longest; and not many more for one long item among clips."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: 132)
    for _ in range(300):
        B = int(torch.randint(1, 9, (1,), generator=generator))
        longest = torch.randint(1, 700, (2, 1), generator=generator)
        lengths = (torch.rand(2, B, generator=generator) ** 3 * (longest + 1)).int().tolist()
        items = batch(*lengths, torch.device("cpu"), D=1, dtype=torch.float32)
        tokens = items["x"], items["y"], None, None, items["cu_seqlens_x"], items["cu_seqlens_y"]
        long_items = places.LongItems(packed._packed(*tokens, *map(max, lengths)))
        for rows, columns in ((16, 0), (0, 64), (256, 256), (0, 0)):
            needed = blocks_as_written(items, long_items.items.on_chip(), rows, columns, 16)
            assert len(needed) <= long_items.num_blocks(rows, columns, False)
    clips = batch([1024, *[64] * 256], [512, *[20] * 256], torch.device("cpu"), D=1, dtype=torch.float32)
    tokens = clips["x"], clips["y"], None, None, clips["cu_seqlens_x"], clips["cu_seqlens_y"]
    assert places.LongItems(packed._packed(*tokens, 1024, 512)).num_blocks(16, 0, False) < 1300


def test_offsets_that_are_out_of_order_do_not_lead_out_of_the_tokens(device):
    """Nobody can be told of them without stalling the device; the items that are in order are solved all the same."""
    items = batch([4, 6], [3, 5], device, dtype=torch.float32)
    right = otfuse.sinkhorn_attend_varlen(**items, num_iters=2, backend="triton")
    items["cu_seqlens_x"] = torch.tensor([0, 4, 1000], dtype=torch.int32, device=device)
    items["max_seqlen_x"] = 10
    wrong = otfuse.sinkhorn_attend_varlen(**items, num_iters=2, backend="triton")
    assert torch.equal(wrong.x, right.x)


def test_second_derivatives_by_way_of_the_padded_way(device):
    items = batch([3, 0, 4], [2, 3, 1], device, dtype=torch.float64)
    second = []
    for backend in ("torch", "triton"):
        x = items["x"].clone().requires_grad_()
        out = otfuse.sinkhorn_attend_varlen(**{**items, "x": x}, epsilon=0.5, num_iters=4, backend=backend)
        (first,) = torch.autograd.grad(out.x.square().sum() + out.y.sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", [(32, 32), (16, 16)])
def test_compile_with_fullgraph_and_dynamic_shapes(monkeypatch, device, tile):
    """One graph for every number of items and tokens; the longest, as numbers of Python, are inputs of the op."""
    monkeypatch.setattr(places, "_largest_tile", lambda *_: tile)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def solve(x, y, ends_x, ends_y, longest_x, longest_y):
        return otfuse.sinkhorn_attend_varlen(
            x, y, ends_x, ends_y, longest_x, longest_y, num_iters=2, backend="triton"
        ).x

    compiled = torch.compile(solve, backend=count, fullgraph=True, dynamic=True)
    for lengths_x, lengths_y in (([3, 20], [5, 2]), ([4, 0, 17], [3, 18, 7]), ([2, 5, 9, 6], [6, 4, 2, 20])):
        items = batch(lengths_x, lengths_y, device, dtype=torch.float32)
        torch.testing.assert_close(compiled(*items.values()), solve(*items.values()), rtol=0, atol=0)
    assert len(graphs) == 1
    step = torch.compile(lambda *a: solve(*a).square(), backend="aot_eager", fullgraph=True, dynamic=True)
    items["x"].requires_grad_()
    gradients = [
        torch.autograd.grad(run(*items.values()).sum(), items["x"])[0] for run in (step, lambda *a: solve(*a).square())
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_cuda_graph(device):
    """Captured once, replayed on other lengths: nothing waits for the device, nothing depends on values."""
    if is_interpreted("triton", device):
        pytest.skip("needs a CUDA device")
    items = batch([64, 3, 0, 300], [20, 5, 7, 90], device, D=96, dtype=torch.bfloat16)
    items["x"].requires_grad_()

    def step():
        out = otfuse.sinkhorn_attend_varlen(**items, backend="triton")
        return (*out[:2], *torch.autograd.grad(out.x.square().sum() + out.y.sum(), items["x"]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    items["cu_seqlens_x"].copy_(offsets([3, 64, 280, 20], device))
    graph.replay()
    for one, other in zip(captured, step()):
        assert torch.equal(one, other)
