"""The registered ops, torch.compile, torch.export, and the promise never to look at a value on the way."""

import subprocess
import sys

import pytest
import torch
from problems import here, place
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse.testing import clustered_tokens

OPS = {
    "cpu": ("sinkhorn_cpu", "sinkhorn_tokens_cpu", "sinkhorn_cpu_backward"),
    "triton": (
        "sinkhorn_triton",
        "sinkhorn_triton_backward",
        "sinkhorn_attend_triton",
        "sinkhorn_attend_triton_backward",
        "sinkhorn_attend_varlen_triton",
        "sinkhorn_attend_varlen_triton_backward",
    ),
}
LOSS_OPS = {"alignment_loss_triton", "alignment_loss_triton_backward"}  # tests/test_loss_kernel.py
ENDS_X, ENDS_Y = [0, 2, 2, 7], [0, 3, 4, 6]


def ends():
    return tuple(torch.tensor(values, dtype=torch.int32, device=place()) for values in (ENDS_X, ENDS_Y))


def tokens(B=2, N=5, M=4, D=6, dtype=torch.float32, requires_grad=True):
    return tuple(here(t).requires_grad_(requires_grad) for t in clustered_tokens(B, N, M, D, dtype=dtype))


def packed_tokens():
    return tuple(t.detach().flatten(0, 1)[:n].clone().requires_grad_() for t, n in zip(tokens(), (7, 6)))


class Calls(TorchDispatchMode):
    """Every operation that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))

    def names(self):
        return {str(func) for func, _ in self.seen}


# Through the public functions, so that the samples are what really reaches the ops.
SAMPLES = {
    "float32": lambda backend: otfuse.sinkhorn(tokens()[0], 0.5, num_iters=3, backend=backend),
    "float64": lambda backend: otfuse.sinkhorn(tokens(dtype=torch.float64)[0], 0.5, num_iters=3, backend=backend),
    "tol": lambda backend: otfuse.sinkhorn(tokens()[0], 0.5, num_iters=9, tol=1e-2, backend=backend),
    "small epsilon": lambda backend: otfuse.sinkhorn(tokens()[0], 1e-3, num_iters=4, backend=backend),
    "implicit": lambda backend: otfuse.sinkhorn(tokens()[0], 0.5, num_iters=30, grad="implicit", backend=backend),
    "padding": lambda backend: otfuse.sinkhorn(
        tokens()[0], 0.5, here(torch.tensor([[1.0, 0, 2, 0, 0], [0.0] * 5])), num_iters=3, backend=backend
    ),
    "weights": lambda backend: otfuse.sinkhorn(
        tokens()[0], 0.5, here(torch.ones(2, 5)).requires_grad_(), here(torch.ones(2, 6)), num_iters=3, backend=backend
    ),
    "a side of 17": lambda backend: otfuse.sinkhorn(tokens(D=17)[0], 0.5, num_iters=3, backend=backend),
    "one item": lambda backend: otfuse.sinkhorn(tokens(1, 1, 1, 1)[0], 0.5, num_iters=1, backend=backend),
    "empty batch": lambda backend: otfuse.sinkhorn(tokens()[0][:0], 0.5, num_iters=2, backend=backend),
    "cosine": lambda backend: otfuse.sinkhorn_attend(*tokens(), num_iters=3, return_plan=True, backend=backend),
    "dot": lambda backend: otfuse.sinkhorn_attend(
        *tokens(), 2.0, similarity="dot", weights="barycentric", num_iters=3, backend=backend
    ),
    "mask": lambda backend: otfuse.sinkhorn_attend(
        *tokens(), a=here(torch.tensor([[True] * 5, [True, False] * 2 + [False]])), num_iters=3, backend=backend
    ),
    "detach": lambda backend: otfuse.sinkhorn_attend(*tokens(), num_iters=3, grad="detach", backend=backend),
    "bfloat16": lambda backend: otfuse.sinkhorn_attend(*tokens(dtype=torch.bfloat16), num_iters=3, backend=backend),
    "packed": lambda backend: otfuse.sinkhorn_attend_varlen(
        *packed_tokens(), *ends(), 5, 3, num_iters=3, return_plan=True, backend=backend
    ),
    "packed weights": lambda backend: otfuse.sinkhorn_attend_varlen(
        *packed_tokens(),
        *ends(),
        5,
        3,
        a=here(torch.ones(7)).requires_grad_(),
        b=here(torch.arange(6)) > 0,
        num_iters=9,
        tol=1e-2,
        weights="barycentric",
        backend=backend,
    ),
}


def scalar(out):
    parts = [t.double().square().sum() for t in out if t is not None and t.requires_grad]
    return sum(torch.where(torch.isfinite(part), part, 0) for part in parts)


def calls_of_ops(sample, backend):
    """(op, detached arguments) of every call of an op of ours, forward and backward."""
    recorder = Calls()
    out = SAMPLES[sample](backend)
    with recorder:
        out = SAMPLES[sample](backend)
        scalar(out).backward()
    ours = [(func, args) for func, args in recorder.seen if str(func).startswith("otfuse.")]
    return [(f, tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in args)) for f, args in ours]


def name_of(func):
    return str(func).split(".")[1]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("fused", OPS)
def test_opcheck(sample, fused):
    """One op forward and one backward, whatever is asked (``detach`` leaves the cpu backend none backward, and packed
    items of each length are a call of their own there)."""
    calls = calls_of_ops(sample, fused)
    backward = [name_of(func).endswith("backward") for func, _ in calls]
    times = backward.count(False)
    assert backward == [False] * times + [True] * (0 if (fused, sample) == ("cpu", "detach") else times)
    assert times == 1 or (fused == "cpu" and sample.startswith("packed"))
    for func, args in calls:
        torch.library.opcheck(func, args)
    func, (first, *rest) = calls[0]
    if sample != "empty batch":
        torch.library.opcheck(func, (first.clone().requires_grad_(), *rest))


@pytest.mark.parametrize("fused", OPS)
def test_the_samples_reach_every_op(fused):
    reached = {name_of(func) for sample in ("float32", "cosine", "packed") for func, _ in calls_of_ops(sample, fused)}
    assert reached == set(OPS[fused])


def test_every_op_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("otfuse::")}
    assert registered - LOSS_OPS == {name for names in OPS.values() for name in names}


# name: function of tokens, backend and further options; everything that is public and solves
FUNCTIONS = {
    "attend": lambda x, y, backend: otfuse.sinkhorn_attend(
        x, y, a=x[:, :, 0] > -1, num_iters=3, return_plan=True, backend=backend
    ),
    "sinkhorn": lambda x, y, backend: otfuse.sinkhorn(x @ y.mT, 2.0, num_iters=3, tol=1e-3, backend=backend),
    "loss": lambda x, y, backend: (
        otfuse.ot_alignment_loss(
            otfuse.sinkhorn(-x @ y.mT, 2.0, num_iters=3, backend=backend).plan, otfuse.similarity_matrix(x, y)
        ),
    ),
    "fusion": lambda x, y, backend: otfuse.nn.OTFusion(num_iters=3, backend=backend)(x, y),
    "varlen": lambda x, y, backend: otfuse.sinkhorn_attend_varlen(
        x.flatten(0, 1)[:7], y.flatten(0, 1)[:6], *ends(), 5, 3, num_iters=3, backend=backend
    ),
}


def outputs_and_gradients(run, x, y, backend):
    out = run(x, y, backend)
    return [*(t for t in out if t is not None), *torch.autograd.grad(scalar(out), (x, y))]


def assert_compiles(run, backend, *, compiler="aot_eager", cases=((2, 5, 4),), **options):
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=compiler, fullgraph=True, **options)
    for B, N, M in cases:
        x, y = tokens(B, N, M)
        expected = outputs_and_gradients(run, x, y, backend)
        actual = outputs_and_gradients(compiled, x, y, backend)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "auto"])
def test_compile_with_fullgraph(name, backend):
    assert_compiles(FUNCTIONS[name], backend)


@pytest.mark.parametrize("how", ["implicit", "detach"])
def test_compile_the_other_gradients(how, backend):
    assert_compiles(lambda x, y, b: otfuse.sinkhorn_attend(x, y, 1.0, num_iters=40, grad=how, backend=b), backend)


def test_compile_with_dynamic_shapes(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = FUNCTIONS["attend"]
    assert_compiles(run, backend, dynamic=True, cases=((2, 5, 4), (3, 7, 6), (2, 4, 9)))
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 4), (3, 7, 6), (4, 6, 5)):
        compiled(*tokens(*shape), backend)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_inductor(backend):
    assert_compiles(
        lambda x, y, b: otfuse.sinkhorn_attend(x, y, num_iters=2, backend=b).x[None], backend, compiler="inductor"
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_reach_the_solve(compiled, backend):
    torch._dynamo.reset()
    x, y = tokens(requires_grad=False)

    def run(x, y):
        with torch.autocast(place().type, dtype=torch.bfloat16):
            out = otfuse.sinkhorn_attend(x, y, num_iters=5, return_plan=True, backend=backend)
            assert (x @ y.mT).dtype == torch.bfloat16
            return out.x, out.plan, out.f, otfuse.nn.OTFusion(num_iters=5, backend=backend)(x, y).loss

    outside = otfuse.sinkhorn_attend(x, y, num_iters=5, return_plan=True, backend=backend)
    loss = otfuse.nn.OTFusion(num_iters=5, backend=backend)(x, y).loss
    actual = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(x, y)
    torch.testing.assert_close(actual, (outside.x, outside.plan, outside.f, loss), rtol=1e-6, atol=1e-7)


def test_compile_as_the_very_first_call(backend):
    """Nothing may have to happen in eager mode before, such as an import or a cache being filled."""
    code = f"""
import torch, otfuse
x, y = torch.randn(2, 5, 6, requires_grad=True, device="{place()}"), torch.randn(2, 4, 6, device="{place()}")
run = lambda x: otfuse.sinkhorn_attend(x, y, num_iters=3, backend="{backend}").x
out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
out.square().sum().backward()
z = x.detach().clone().requires_grad_()
expected = run(z)
expected.square().sum().backward()
torch.testing.assert_close((out, x.grad), (expected, z.grad))
print("equal")
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


class Model(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.project = torch.nn.Linear(6, 6, device=place())
        self.fuse = otfuse.nn.OTFusion(num_iters=3, backend=backend)

    def forward(self, x, y, b):
        fused = self.fuse(self.project(x), y, b=b)
        return fused.tokens, fused.loss


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(backend, dynamic, tmp_path):
    model, (x, y), b = (
        Model(backend),
        tokens(requires_grad=False),
        here(torch.tensor([[True] * 4, [True, True, False, False]])),
    )
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {name: {0: batch} for name in ("x", "y", "b")} if dynamic else None
    torch.export.save(torch.export.export(model, (x, y, b), dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    ours = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("otfuse")}
    assert len(ours) == (backend != "torch")
    torch.testing.assert_close(program.module()(x, y, b), model(x, y, b))
    if dynamic:
        x, y, b = (t.repeat_interleave(3, 0) for t in (x, y, b))
        torch.testing.assert_close(program.module()(x, y, b), model(x, y, b))


def reads_values(func, args):
    """Whether an operation hands values to Python, or makes a shape of them: both wait for the device."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    by_number = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
    return not by_number


@pytest.mark.parametrize("how", ["unroll", "implicit", "detach"])
@pytest.mark.parametrize("name", ["attend", "masked", "sinkhorn", "loss", "fusion", "varlen"])
def test_no_value_is_read_on_the_torch_backend(name, how):
    """Forward and backward: the call could be captured in a device's graph."""
    x, y = tokens()
    weights = torch.rand(2, 5, requires_grad=True)
    options = {"num_iters": 7, "tol": 1e-4, "grad": how, "backend": "torch"}
    runs = {
        "attend": lambda: otfuse.sinkhorn_attend(x, y, 0.01, weights="barycentric", return_plan=True, **options),
        "masked": lambda: otfuse.sinkhorn_attend(x, y, a=weights, b=y.detach()[..., 0] > 0, **options),
        "sinkhorn": lambda: (otfuse.sinkhorn(x @ y.mT, 0.05, weights, **options).plan * (x @ y.mT),),
        "loss": lambda: (otfuse.ot_alignment_loss(x @ y.mT, x @ y.mT, a=weights.detach() > 0.5),),
        "fusion": lambda: otfuse.nn.OTFusion(**options)(x, y, a=weights),
        "varlen": lambda: otfuse.sinkhorn_attend_varlen(
            x.flatten(0, 1)[:7], y.flatten(0, 1)[:6], *ends(), 5, 3, **options
        ),
    }
    with Calls() as calls:
        torch.autograd.grad(sum(t.double().sum() for t in runs[name]() if t is not None and t.requires_grad), (x, y))
    assert [str(func) for func, args in calls.seen if reads_values(func, args)] == []
    assert len(calls.seen) > 20


@pytest.mark.parametrize(
    "read",
    [lambda t: t.item(), bool, lambda t: t[t > 0], torch.nonzero, torch.unique, lambda t: torch.equal(t, t)],
    ids=["item", "bool", "mask", "nonzero", "unique", "equal"],
)
def test_that_reading_is_seen(read):
    value = torch.ones(1)
    with Calls() as calls:
        read(value)
    assert any(reads_values(func, args) for func, args in calls.seen)
