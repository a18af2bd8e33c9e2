"""The measured tables of docs/gradients.md and docs/numerics.md, as Markdown.

``OMP_NUM_THREADS=1 python -m benchmarks.tables errors modes times`` prints those named, or all three. Tokens are
clustered (``otfuse.testing.clustered_tokens``), D is 768, the cost is ``-cosine``.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product

import torch
from torch import Tensor

import otfuse
from benchmarks.contenders import batched_scaling
from benchmarks.results import cpu
from otfuse.testing import clustered_tokens, specified_sinkhorn

EPSILONS = (1.0, 0.1, 0.05, 0.02, 0.005, 0.001)
Plan = Callable[[Tensor], Tensor]


def clustered_cost(B: int, N: int, M: int) -> Tensor:
    return -otfuse.similarity_matrix(*clustered_tokens(B, N, M, 768))


def gradient(solve: Plan, cost: Tensor) -> Tensor:
    """Of a fixed random linear function of the plan."""
    leaf = cost.detach().clone().requires_grad_()
    return torch.autograd.grad(solve(leaf), leaf, _weights(tuple(cost.shape)).to(cost.dtype))[0]


@cache
def _weights(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def errors() -> None:
    """Largest error of plan and gradient at a fixed number of iterations, against the specification in float64."""
    cost = clustered_cost(8, 64, 20)

    def ways(epsilon: float) -> dict[str, Plan]:
        return {
            "logarithms, float32": lambda c: specified_sinkhorn(c, epsilon).plan,
            "scalings, unguarded": lambda c: batched_scaling(c, epsilon, 50),
            "`torch`": lambda c: otfuse.sinkhorn(c, epsilon, backend="torch").plan,
            "`cpu`": lambda c: otfuse.sinkhorn(c, epsilon, backend="cpu").plan,
        }

    for title, of in (("plan", lambda solve, c: solve(c)), ("gradient", gradient)):
        table(
            f"largest error of the {title} / its largest entry",
            ("epsilon", *ways(1.0)),
            (
                (f"{epsilon:g}", *(f"{_relative(of(solve, cost), exact):.1e}" for solve in ways(epsilon).values()))
                for epsilon in EPSILONS
                for exact in (of(lambda c, epsilon=epsilon: specified_sinkhorn(c, epsilon).plan, cost.double()),)
            ),
        )


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def modes() -> None:
    """How far the gradients after so many iterations are from the gradient of the converged plan, in float64."""
    cost = clustered_cost(8, 64, 20).double()
    for epsilon, converged in ((0.1, 4000), (0.02, 60000)):

        def solve(c: Tensor, num_iters: int, grad: str, epsilon: float = epsilon) -> Tensor:
            return otfuse.sinkhorn(c, epsilon, num_iters=num_iters, grad=grad, backend="cpu").plan

        exact = gradient(lambda c: solve(c, converged, "implicit"), cost)  # noqa: B023  called at once
        final = float(otfuse.sinkhorn(cost, epsilon, num_iters=converged).marginal_error.max())

        def distance(num_iters: int, grad: str, exact: Tensor = exact) -> float:
            found = gradient(lambda c: solve(c, num_iters, grad), cost)
            return float(((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())

        table(
            f"epsilon {epsilon}: distance to the gradient at {converged} iterations ({final:.0e}) over its norm",
            ("iterations", "marginal error", "`unroll`", "`implicit`"),
            (
                (
                    str(iterations),
                    f"{float(otfuse.sinkhorn(cost, epsilon, num_iters=iterations).marginal_error.max()):.1e}",
                    f"{distance(iterations, 'unroll'):.1e}",
                    f"{distance(iterations, 'implicit'):.1e}",
                )
                for iterations in (5, 10, 20, 50, 100, 200, 500, 1000)
            ),
        )


def times(seconds: float = 20.0) -> None:
    """A solve with its gradient over the solve alone; the modes take turns."""
    rows = []
    for backend, epsilon, shape in product(("cpu", "torch"), (0.1, 0.02), ((32, 64, 20), (1, 512, 512))):
        if shape == (1, 512, 512) and epsilon != 0.1:
            continue
        spent = interleaved(clustered_cost(*shape), epsilon, backend, seconds)
        base, cells = spent["forward"], []
        for grad in ("unroll", "implicit"):
            ratio = statistics.median(t / f for t, f in zip(spent[grad], base))
            cells.append(f"{ratio:.1f} ({min(spent[grad]) / min(base):.1f})")
        size = " × ".join(map(str, shape))
        rows.append((f"`{backend}`", f"{epsilon:g}", size, f"{min(base) * 1e3:.2f}", *cells, str(len(base))))
    table(
        "time of forward and backward / time of forward: median of the ratios (ratio of the minima)",
        ("backend", "epsilon", "B × N × M", "forward, least ms", "`unroll`", "`implicit`", "turns"),
        rows,
    )


def interleaved(cost: Tensor, epsilon: float, backend: str, seconds: float) -> dict[str, list[float]]:
    """Times on the processor, so that other work on the machine takes no part: right for one thread only."""
    if torch.get_num_threads() != 1:
        sys.exit("set OMP_NUM_THREADS=1")

    def call(name: str) -> None:
        if name == "forward":
            otfuse.sinkhorn(cost, epsilon, backend=backend)
        else:
            gradient(lambda c: otfuse.sinkhorn(c, epsilon, grad=name, backend=backend).plan, cost)

    spent: dict[str, list[float]] = {"forward": [], "unroll": [], "implicit": []}
    for name in spent:
        call(name)  # warm
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(spent["forward"]) < 5:
        for name, of_name in spent.items():
            start = time.process_time()
            call(name)
            of_name.append(time.process_time() - start)
    return spent


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    head = tuple(head)
    print(f"\n{title}\n")
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)


def main(names: list[str]) -> None:
    print(f"{cpu()}, {torch.get_num_threads()} thread, torch {torch.__version__}, {datetime.date.today()}")
    for part in (errors, modes, times):
        if not names or part.__name__ in names:
            part()


if __name__ == "__main__":
    main(sys.argv[1:])
