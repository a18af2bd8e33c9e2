"""Compiled once, called with other Python numbers: epsilon, tolerance, temperature and iterations of every call count.

What torch.compile makes a symbol of may only be computed with beside tensors. As the parameter of an operator (a fill
value, a bound, an epsilon, a float of ours) it is compiled anew for every value, or stays what it was: inductor and its
caches on disk take it for a constant.
"""

from __future__ import annotations

import operator

import pytest
import torch
from problems import randn
from test_ops import ends, scalar, tokens

import otfuse
from otfuse._alignment import reduced
from otfuse._backends.tpc import emulator
from otfuse._backends.triton.backend import TritonBackend
from otfuse._problem import LossProblem

EPSILONS = (1.0, 0.7, 0.4, 0.25, 0.15)
TOLS = (0.05, 0.02, 0.2, 0.5, 0.35)
TEMPERATURES = (0.5, 0.2, 1.0, 0.3, 0.07)
ITERATIONS = 2


def fusion(x, y, epsilon, tol, temperature, backend):
    """Whose epsilon also weighs what the caller computes."""
    fuse = otfuse.nn.OTFusion(epsilon, tol=tol, temperature=temperature, num_iters=ITERATIONS, backend=backend)
    out = fuse(x, y)
    return out.tokens, out.plan, out.loss + epsilon * (out.plan * (out.plan + 1e-9).log()).sum()


def loss_kernel(x, y, epsilon, tol, temperature, backend):
    """The loss where the kernels run; in Triton's interpreter nobody would choose them."""
    values = x @ y.mT
    problem = LossProblem(values.sigmoid(), values, None, None, temperature, "log_plan", "similarity", True)
    return (reduced(*TritonBackend().token_terms(problem), problem),)


def sinkhorn_and_loss(x, y, epsilon, tol, temperature, backend):
    values = x @ y.mT
    out = otfuse.sinkhorn(values, epsilon, tol=tol, num_iters=ITERATIONS, backend=backend)
    return *out, otfuse.ot_alignment_loss(out.plan, values, temperature=temperature)


# What is called, and the numbers that it takes.
FUNCTIONS = {
    "sinkhorn and loss": (sinkhorn_and_loss, "epsilon tol temperature"),
    "attend": (
        lambda x, y, epsilon, tol, temperature, backend: otfuse.sinkhorn_attend(
            x * epsilon, y, epsilon, similarity="dot", tol=tol, num_iters=ITERATIONS, backend=backend, return_plan=True
        ),
        "epsilon tol",
    ),
    "varlen": (
        lambda x, y, epsilon, tol, temperature, backend: otfuse.sinkhorn_attend_varlen(
            x.flatten(0, 1)[:7], y.flatten(0, 1)[:6], *ends(), 5, 3, epsilon, tol=tol, num_iters=ITERATIONS,
            backend=backend,
        ),
        "epsilon tol",
    ),
    "loss kernel": (loss_kernel, "temperature"),
    "fusion": (fusion, "epsilon tol temperature"),
}  # fmt: skip


CASES = [
    (name, backend)
    for backend in ("torch", "cpu", "triton")
    for name in FUNCTIONS
    if backend == "triton" or name != "loss kernel"
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty one on disk: what a test finds there is of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(run, inputs, *numbers):
    """Outputs, and the gradients of all of them."""
    out = [tensor for tensor in run(*inputs, *numbers) if tensor is not None]
    return [*out, *torch.autograd.grad(scalar(out), inputs)]


def assert_same(actual, expected, what):
    """To roundings, since sums may be in another order: each of some hundred, of numbers up to forty times the result.

    A number of an earlier call is off by 1e-3 at least.
    """
    close = 2**12 * torch.finfo(expected[0].dtype).eps
    torch.testing.assert_close(actual, expected, rtol=close, atol=close, msg=lambda text: f"{what}: {text}")


def differ(one, other):
    return any((a - b).abs().max() > 1e-3 for a, b in zip(one, other))


# What is compiled by inductor too, which takes seconds for each: every kind of graph.
BY_INDUCTOR = [
    *((name, "torch") for name in ("sinkhorn and loss", "varlen", "fusion")),
    *((name, "cpu") for name in ("sinkhorn and loss", "attend", "varlen", "fusion")),
    *((name, "triton") for name in ("varlen", "loss kernel")),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name, backend", BY_INDUCTOR)
def test_every_call_has_its_own_numbers(name, backend, cache):
    run, takes = FUNCTIONS[name]
    inputs = tokens(dtype=torch.float64)
    given = [(*numbers, backend) for numbers in zip(EPSILONS, TOLS, TEMPERATURES)]
    expected = [results(run, inputs, *numbers) for numbers in given]
    for place, number in enumerate(("epsilon", "tol", "temperature")):  # or a stale one would not show
        stale = [(*now[:place], given[1][place], *now[place + 1 :]) for now in given[2:]]
        seen = [differ(results(run, inputs, *numbers), e) for numbers, e in zip(stale, expected[2:])]
        assert any(seen) == (number in takes.split()), number
    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=fullgraph)
        for numbers, e in zip(given, expected):
            assert_same(results(compiled, inputs, *numbers), e, f"{numbers}, {fullgraph=}")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name, backend", [("fusion", "torch"), ("fusion", "cpu"), ("attend", "cpu")])
def test_epsilon_alone(name, backend, cache):
    """An annealing schedule without gradients, beside which the caller multiplies by epsilon too."""
    run, _ = FUNCTIONS[name]
    inputs, compiled = tokens(dtype=torch.float64, requires_grad=False), torch.compile(run)
    for epsilon in (1.0, 0.7, 0.5, 0.3, 0.2):
        actual, expected = (called(*inputs, epsilon, None, 0.5, backend)[:3] for called in (compiled, run))
        assert_same(list(actual), list(expected), f"{epsilon}")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend, dynamic", [("torch", True), ("cpu", True), ("cpu", None)])
def test_sizes_that_change_with_the_numbers(backend, dynamic, cache):
    """Sizes and Python numbers are symbols of a graph side by side."""
    run, _ = FUNCTIONS["attend"]
    compiled = torch.compile(run, dynamic=dynamic)
    sizes = [(2, 5, 3), (3, 7, 4), (4, 6, 9), (1, 8, 8), (3, 4, 2)]
    for (B, N, M), *numbers in zip(sizes, EPSILONS, TOLS, TEMPERATURES):
        inputs = [randn(k, B, n, 6).requires_grad_() for k, n in enumerate((N, M))]
        expected = results(run, inputs, *numbers, backend)
        assert_same(results(compiled, inputs, *numbers, backend), expected, f"{N} x {M}, {numbers}")


class Fused(torch.nn.Module):
    """Both modules, whose numbers are attributes."""

    def __init__(self, backend):
        super().__init__()
        self.attend = otfuse.nn.OTAttention(num_iters=ITERATIONS, backend=backend, return_plan=True)
        self.fuse = otfuse.nn.OTFusion(num_iters=ITERATIONS, backend=backend)

    def set(self, epsilon, tol, temperature):
        for module in (self.attend, self.fuse.attention):
            module.epsilon, module.tol = epsilon, tol
        self.fuse.temperature = temperature

    def forward(self, x, y):
        attended, fused = self.attend(x, y), self.fuse(y, x)
        return attended.x, attended.plan, fused.tokens, fused.loss * self.attend.epsilon


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_numbers_of_modules(backend, cache):
    inputs, module = tokens(dtype=torch.float64), Fused(backend)
    compiled = torch.compile(module, fullgraph=True)
    for numbers in zip(EPSILONS, TOLS, TEMPERATURES):
        module.set(*numbers)
        expected = results(module, inputs)
        assert_same(results(compiled, inputs), expected, str(numbers))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_iterations(backend, cache):
    """Of plain PyTorch each number is a graph of its own, so there the compiler behind it does not matter."""
    inputs, graphs = tokens(dtype=torch.float64)[:1], []

    def run(x, num_iters):
        return otfuse.sinkhorn(x, 0.3, num_iters=num_iters, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    for num_iters in (1, 4, 2, 5, 3):
        expected = results(run, inputs, num_iters)
        assert_same(results(compiled, inputs, num_iters), expected, f"{num_iters} iterations")
    torch._dynamo.reset()
    counted = torch.compile(run, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for num_iters in range(1, 7):
        counted(*inputs, num_iters)
    assert len(graphs) == (6 if backend == "torch" else 2)


# What torch makes tensor arithmetic of, where a tensor meets a symbol: as ``operator`` has it.
ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, operator.pow, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip


def is_tensor(node):
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value)
    )


def parameters_of_operators(graph):
    """The operators of a traced graph that are handed a symbolic float of Python otherwise than beside a tensor."""
    floats = [node for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymFloat)]
    users = {user for node in floats for user in node.users if is_tensor(user)}
    return [str(user.target) for user in users if user.target not in ARITHMETIC]


TPC = [
    pytest.param(
        name,
        "tpc",
        marks=pytest.mark.skipif(emulator.COMPILER is None, reason=f"no C++ compiler: {emulator.HOW_TO_GET_ONE}"),
    )
    for name in FUNCTIONS
    if name != "loss kernel"
]


@pytest.mark.parametrize("name, backend", CASES + TPC)
def test_a_schedule_takes_few_graphs_and_no_parameter_of_an_operator(name, backend):
    """One for the first numbers, one for all others; and a third where a small epsilon takes the other form.

    Of a Gaudi's kernels numbers are constants: each has a graph of its own.
    """
    run, _ = FUNCTIONS[name]
    inputs, graphs = tokens(dtype=torch.float32 if backend == "tpc" else torch.float64, requires_grad=False), []
    compiled = torch.compile(run, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    calls = 5 if backend == "tpc" else 12
    for k in range(calls):
        numbers = 0.6**k, 0.1 * 0.9**k, 1.1**k, backend
        actual, expected = ([t for t in called(*inputs, *numbers) if t is not None] for called in (compiled, run))
        assert_same(actual, expected, str(numbers))
    assert len(graphs) <= {"torch": 3, "tpc": calls}.get(backend, 2)
    symbols = [n for n in graphs[-1].graph.nodes if isinstance(n.meta.get("example_value"), torch.SymFloat)]
    assert symbols or backend == "tpc"
    assert [parameters_of_operators(graph) for graph in graphs] == [[]] * len(graphs)


@pytest.mark.parametrize("fill", [lambda t, e: torch.full_like(t, -1 / e), lambda t, e: t.clamp(max=e)])
def test_that_a_parameter_is_seen(fill):
    graphs = []
    compiled = torch.compile(fill, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for epsilon in (0.5, 0.4):
        compiled(torch.ones(2), epsilon)
    assert parameters_of_operators(graphs[-1])


def test_no_op_takes_a_float():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("otfuse::")]
    assert len(names) >= 11
    for name in names:
        space, _, op = name.partition("::")
        arguments = getattr(getattr(torch.ops, space), op).default._schema.arguments
        assert not [a.name for a in arguments if "float" in str(a.type) or "number" in str(a.type).lower()], name
