"""The Triton kernels of the loss against plain PyTorch, here in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from problems import assert_accurate, padded_weights, rand, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse import _alignment as alignment
from otfuse._alignment import reduced
from otfuse._backends.base import Backend, is_installed
from otfuse._backends.torch.backend import TorchBackend
from otfuse._backends.triton import loss as triton_loss
from otfuse._backends.triton.backend import TritonBackend
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._problem import ASSIGNMENTS, CONTRASTS, REDUCTIONS, LossProblem
from otfuse.testing import references, reordered

KINDS = list(itertools.product(ASSIGNMENTS, CONTRASTS))
SOME_KINDS = [KINDS[0], KINDS[3], KINDS[4]]  # every assignment and either contrast
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MATRICES = ("plan", "similarity")
TEMPERATURES = {
    "plan": 0.003,
    "log_plan": 3.0,
    "barycentric": 0.05,
}  # logits of order ten, for a softmax worth its name


@pytest.fixture(autouse=True)
def runs_here(device: torch.device) -> None:
    if not is_installed("triton") or (device.type == "cpu" and not INTERPRETED):
        pytest.skip("the kernels run on CUDA, and in Triton's interpreter")


def problem(device: torch.device, B: int, N: int, M: int, *, masked: bool = True) -> dict[str, Tensor | None]:
    """In float64: a similarity and a plan, weights on one side and a mask on the other, with zeros."""
    similarity = 2 * rand(0, B, N, M).to(device) - 1
    a = padded_weights(1, B, N).to(device) if masked else None
    b = padded_weights(2, B, M).to(device) != 0 if masked else None
    # So much entropy keeps the entries of float16 plans out of the subnormals.
    plan = otfuse.sinkhorn(-similarity, 0.5, a, b, num_iters=5, backend="torch").plan
    return {"plan": plan, "similarity": similarity, "a": a, "b": b}


def cast(values: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if name in MATRICES else value for name, value in values.items()}


class Computed(NamedTuple):
    """The loss and its gradients, named for ``reordered`` after what they belong to."""

    loss: Tensor
    plan: Tensor
    similarity: Tensor


def backend_of(kernel: bool) -> Backend:
    return TritonBackend() if kernel else TorchBackend()


def compute(values: dict, kernel: bool, kind: tuple[str, str], reduction: str = "mean", temperature: float = 1.0):
    """The loss and its gradients."""
    leaves = [values[name].detach().requires_grad_() for name in MATRICES]
    problem = LossProblem(*leaves, values["a"], values["b"], temperature, *kind, reduction == "mean")
    out = reduced(*backend_of(kernel).token_terms(problem), problem)
    return out, *torch.autograd.grad(out, leaves)


def item_terms(values: dict, kind: tuple[str, str] = KINDS[0], kernel: bool = True) -> tuple[Tensor, ...]:
    """The terms [B, N + M], their gradients for a different weight of each, and which items have mass."""
    leaves = [values[name].detach().requires_grad_() for name in MATRICES]
    problem = LossProblem(*leaves, values["a"], values["b"], 0.3, *kind, True)
    terms, has_mass = backend_of(kernel).token_terms(problem)
    weights = 0.5 + rand(7, 1, terms.shape[1]).to(terms)
    return terms, *torch.autograd.grad((terms * weights).sum(), leaves), has_mass


def items(values: dict, index: list[int]) -> dict:
    return {name: None if value is None else value[index] for name, value in values.items()}


def assert_same(actual: tuple, expected: tuple, message: str = "") -> None:
    """Bit for bit, NaN equal to NaN."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=message or None)


def references_of(values: dict, kind: tuple[str, str], **options) -> list[Tensor]:
    """The loss and its gradients in plain PyTorch, in several orders of the tokens."""

    def of(order: int) -> list[Tensor]:
        def solve(plan, similarity, a, b):
            values = {"plan": plan, "similarity": similarity, "a": a, "b": b}
            return Computed(*compute(values, False, kind, **options))

        return list(reordered(solve, order)(**values))

    return references(of)


def largest_logit(values: dict, assignment: str, temperature: float) -> float:
    live = torch.ones_like(values["plan"], dtype=torch.bool)
    if values["a"] is not None:
        live = (values["a"] != 0)[:, :, None] & values["b"][:, None, :]
    plan, similarity = (torch.where(live, values[name], 0) for name in MATRICES)
    sides = (plan, similarity, live), (plan.mT, similarity.mT, live.mT)
    largest = ((torch.where(keep, alignment._assigned(p, assignment), 0) @ s.mT).abs().max() for p, s, keep in sides)
    return max(largest).item() / temperature


def assert_kernel_accurate(values: dict, dtype: torch.dtype, kind: tuple[str, str], **options) -> None:
    """float64 is held against the error of plain PyTorch in float32, as problems.assert_accurate explains."""
    options = {"temperature": TEMPERATURES[kind[0]]} | options
    low = torch.float32 if dtype == torch.float64 else dtype
    actual = compute(cast(values, dtype), True, kind, **options)
    reference = references_of(cast(values, low), kind, **options)
    exact = compute(cast(cast(values, low), torch.float64), False, kind, **options)
    truth = compute(values, False, kind, **options) if dtype == torch.float64 else exact
    assert [result.dtype for result in actual] == [dtype if dtype == torch.float64 else torch.float32, dtype, dtype]
    logit = largest_logit(values, kind[0], options["temperature"])
    for name, *results in zip(("loss", *MATRICES), actual, reference, exact, truth):
        scale = results[2].abs().max().item()
        # Differences of logits, and of what a division by a sum gives and takes back: all of it for a single token.
        if name == "loss" or (kind[0] == "barycentric" and 1 in values["plan"].shape[1:]):
            scale = max(scale, logit)
        assert_accurate(*results, scale=scale, what=f"{name} {kind}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_plain_pytorch(device, kind, dtype):
    assert_kernel_accurate(problem(device, 2, 33, 17), dtype, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (20, 33), (64, 20)])
def test_shapes(device, shape, kind):
    assert_kernel_accurate(problem(device, 1, *shape, masked=False), torch.float32, kind)


def test_more_than_one_block_on_both_sides(device):
    assert_kernel_accurate(problem(device, 1, 65, 34), torch.float32, ("log_plan", "similarity"))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_block_of_nothing_but_padding(device, contrast):
    values = problem(device, 1, 40, 5)
    values["a"][:, :33] = 0
    assert_kernel_accurate(values, torch.float32, ("barycentric", contrast))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.07, 10])
def test_reductions_and_temperatures(device, kind, reduction, temperature):
    values = problem(device, 3, 7, 5)
    values["a"][1] = 0
    assert_kernel_accurate(values, torch.float32, kind, reduction=reduction, temperature=temperature)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_item_without_mass_costs_nothing(device, kind):
    values = problem(device, 4, 6, 5)
    values["a"][[1, 3]], values["b"][[2, 3]] = 0, False
    terms, *gradients, has_mass = item_terms(values, kind)
    assert has_mass.tolist() == [1, 0, 0, 0]
    assert all((result[1:] == 0).all() for result in (terms, *gradients)) and (terms[0] != 0).any()
    out, alone = (compute(v, True, kind)[0].item() for v in (values, items(values, [0])))
    assert out == pytest.approx(alone, rel=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_item_with_mass(device, reduction):
    values = problem(device, 2, 6, 5)
    values["b"][:] = False
    for result in compute(values, True, KINDS[0], reduction):
        assert (result == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_padding_holds_changes_nothing(device, kind, bad):
    values = problem(device, 2, 6, 5)
    padding = ~((values["a"] != 0)[:, :, None] & values["b"][:, None, :])
    dirty = values | {name: values[name].masked_fill(padding, bad) for name in MATRICES}
    clean = item_terms(values, kind)
    assert_same(item_terms(dirty, kind), clean)
    assert padding.any() and all((gradient[padding] == 0).all() for gradient in clean[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_in_the_plan(device, kind):
    """Of the logarithm they are beyond the cut, and a row of them is not divided."""
    values = problem(device, 2, 6, 5)
    values["plan"][0, 0] = 0
    values["plan"][1, 0, 0] = 0
    for actual, expected in zip(item_terms(values, kind), item_terms(values, kind, kernel=False)):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_item_alone_in_a_batch_and_at_another_place(device, kind):
    values = cast(problem(device, 3, 34, 7), torch.float32)
    whole = item_terms(values, kind)
    turned = item_terms(items(values, [2, 1, 0]), kind)
    assert_same(tuple(result[[2, 1, 0]] for result in turned), whole)
    assert_same(item_terms(items(values, [1]), kind), tuple(result[[1]] for result in whole))


@pytest.mark.parametrize("where", MATRICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_nan_and_inf_stay_in_their_item(device, kind, bad, where):
    values = cast(problem(device, 3, 6, 5), torch.float32)
    spoilt = values | {where: values[where].clone()}
    row, column = values["a"][1].nonzero()[0], values["b"][1].nonzero()[0]
    spoilt[where][1, row, column] = bad
    clean, out = item_terms(values, kind), item_terms(spoilt, kind)
    assert_same(tuple(result[[0, 2]] for result in out), tuple(result[[0, 2]] for result in clean))
    plain = item_terms(spoilt, kind, kernel=False)
    assert torch.equal(torch.isfinite(out[0]), torch.isfinite(plain[0])) and not torch.isfinite(out[0][1]).all()
    for actual, expected in zip(out[1:3], plain[1:3]):
        assert not (torch.isfinite(actual) & ~torch.isfinite(expected)).any() and actual.isnan().any()


def test_memory_layout_does_not_matter(device):
    values = problem(device, 2, 6, 5)
    turned = values | {name: values[name].mT.contiguous().mT for name in MATRICES}
    turned["a"] = values["a"].mT.contiguous().mT
    assert not turned["plan"].is_contiguous()
    assert_same(item_terms(turned), item_terms(values))
    expanded = values | {name: values[name][:1].expand(3, -1, -1) for name in MATRICES}
    expanded["a"], expanded["b"] = values["a"][:1].expand(3, -1), values["b"][:1].expand(3, -1)
    assert_same(item_terms(expanded), tuple(result[[0, 0, 0]] for result in item_terms(values)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_term_has_its_own_gradient(device, kind):
    values = problem(device, 2, 34, 7)
    for actual, expected in zip(item_terms(values, kind), item_terms(values, kind, kernel=False)):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_first_and_second_derivatives(device, kind):
    values = problem(device, 2, 3, 2)
    values["a"][0, 1] = 0

    def run(plan, similarity):
        problem = LossProblem(plan, similarity, values["a"], values["b"], 0.8, *kind, True)
        return reduced(*TritonBackend().token_terms(problem), problem)

    # Away from the cut of the logarithm, by far more than the step of the difference.
    leaves = [(values[name] + 0.05).requires_grad_() for name in MATRICES]
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


def run(plan: Tensor, similarity: Tensor, a: Tensor | None = None, kernel: bool = True) -> Tensor:
    problem = LossProblem(plan, similarity, a, None, 0.3, *KINDS[2], True)
    return reduced(*backend_of(kernel).token_terms(problem), problem)


def stacks(device: torch.device) -> tuple[Tensor, ...]:
    """Three batches of two items."""
    a = padded_weights(2, 6, 5).view(3, 2, 5).to(device)
    return (rand(0, 3, 2, 5, 4) + 0.1).to(device), randn(1, 3, 2, 5, 4).to(device), a


TRANSFORMS = {
    "vmap": lambda f: vmap(f),
    "vmap of grad": lambda f: vmap(grad(f, argnums=(0, 1))),
    "grad of vmap": lambda f: grad(lambda *args: vmap(f)(*args).sum(), argnums=(0, 1)),
    "vmap of grad of grad": lambda f: vmap(grad(lambda *args: grad(f)(*args).square().sum(), argnums=(0, 1))),
    "vmap over one": lambda f: lambda p, s, a: vmap(f, in_dims=(0, None, None))(p, s[0], a[0]),
    "vmap of another dimension": lambda f: lambda p, s, a: vmap(f, in_dims=(1, 1, 0))(p.mT.mT, s, a.movedim(1, 0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(device, name):
    args = stacks(device)
    actual, expected = (
        TRANSFORMS[name](lambda p, s, a, kernel=kernel: run(p, s, a, kernel))(*args) for kernel in (True, False)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_compile_with_fullgraph(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 4), (3, 7, 6)):
        results = []
        for function in (run, compiled):
            values = problem(device, *shape)
            leaves = [values[name].requires_grad_() for name in MATRICES]
            out = function(*leaves, values["a"])
            results.append((out.detach(), *torch.autograd.grad(out, leaves)))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert len(graphs) == 1


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def test_opcheck(device):
    values = cast(problem(device, 2, 5, 4), torch.bfloat16) | {"b": None}
    with Calls() as calls:
        compute(values, True, KINDS[2])
    (forward, args), (backward, backward_args) = (
        (func, tuple(v.detach() if isinstance(v, Tensor) else v for v in args))
        for func, args in calls.seen
        if str(func).startswith("otfuse.")
    )
    assert forward is torch.ops.otfuse.alignment_loss_triton.default
    assert backward is torch.ops.otfuse.alignment_loss_triton_backward.default
    torch.library.opcheck(forward, (args[0].clone().requires_grad_(), *args[1:]))
    torch.library.opcheck(backward, (backward_args[0].clone().requires_grad_(), *backward_args[1:]))


def names(calls: Calls) -> list[str]:
    """But for what makes a tensor of Python's numbers, and what a Function adds."""
    names = [str(func).split(".")[1] for func, _ in calls.seen]
    return [name for name in names if name not in ("detach", "lift_fresh")]


def test_operations(device):
    """One launch each way, and next to it only what adds the items up: nothing that reads a value."""
    values = problem(device, 2, 5, 4, masked=False)
    with Calls() as calls:
        compute(values, True, KINDS[0])
    assert names(calls) == [
        "alignment_loss_triton", "sum", "div", "ones_like", "div", "expand", "alignment_loss_triton_backward"
    ]  # fmt: skip
    values["a"] = torch.ones(2, 5, device=device)
    with Calls() as calls:
        compute(values, True, KINDS[0])
    assert names(calls) == [
        "alignment_loss_triton", "sum", "sum", "clamp_min", "div",
        "ones_like", "div", "expand", "alignment_loss_triton_backward",
    ]  # fmt: skip


def takes(plan: Tensor) -> bool:
    return not TritonBackend().unsupported_loss(LossProblem(plan, plan, None, None, 1.0, *KINDS[0], True))


@pytest.mark.parametrize(
    "shape, dtype, taken",
    [
        ((1, 1, 1), torch.float32, True),
        ((4, 128, 128), torch.bfloat16, True),
        ((4, 129, 65), torch.float32, False),
        ((4, 1024, 16), torch.float32, True),
        ((4, 64, 64), torch.float64, True),
        ((4, 64, 128), torch.float64, False),
        ((0, 4, 4), torch.float32, False),
        ((2, 0, 4), torch.float32, False),
        ((2, 4, 0), torch.float32, False),
    ],
)
def test_which_plans_the_kernel_takes(shape, dtype, taken):
    with FakeTensorMode():  # on a device that need not be there
        assert takes(torch.empty(shape, dtype=dtype, device="cuda")) == taken
        assert not takes(torch.empty(shape, dtype=dtype, device="cpu"))
        with forward_ad.dual_level():
            assert not takes(torch.empty(shape, dtype=dtype, device="cuda"))


def test_the_loss_asks_for_the_kernel_where_it_can_run(device, monkeypatch):
    values = problem(device, 2, 5, 4)
    monkeypatch.setattr(TritonBackend, "device", "cpu")
    with Calls() as calls:
        out = otfuse.ot_alignment_loss(**values)
    assert names(calls)[0] == "alignment_loss_triton"
    monkeypatch.undo()
    torch.testing.assert_close(out, otfuse.ot_alignment_loss(**values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_can_be_traced(dtype):
    """The choice of the kernel takes symbolic sizes: one graph for those of one tile."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    choose = torch.compile(lambda t: t + 1 if triton_loss.fits(t) else t - 1, backend=count, dynamic=True)
    for N, change in ((33, 1), (40, 1), (64, 1), (1000, -1)):
        plan = torch.zeros(2, N, 20, dtype=dtype)
        assert (choose(plan) == change).all()
    assert len(graphs) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_and_backward_in_a_cuda_graph():
    values = cast(problem(torch.device("cuda"), 4, 64, 20), torch.float32)
    leaves = [values[name].requires_grad_() for name in MATRICES]

    def step():
        out = otfuse.ot_alignment_loss(*leaves, a=values["a"], b=values["b"])
        return out.detach(), *torch.autograd.grad(out, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[1].neg_()
    graph.replay()
    assert_same(captured, step())
