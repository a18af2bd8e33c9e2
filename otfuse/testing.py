"""For tests and benchmarks: inputs that look like real ones, the float64 oracle, and the tolerance rule.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from otfuse import _attention as attention
from otfuse._attention import Marginals
from otfuse._backends.base import Backend, Solution
from otfuse._backends.torch import solver as plain
from otfuse._problem import Problem, SinkhornAttendOutput, SinkhornOutput, SolveOptions, cost_problem, token_problem


def clustered_tokens(
    B: int,
    N: int,
    M: int,
    D: int,
    *,
    num_topics: int = 8,
    noise: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokens x [B, N, D], y [B, M, D] that share topics, in different proportions, as sound and picture do.

    Independent random tokens are nearly orthogonal: Sinkhorn then converges in a few iterations, and a benchmark
    or a test on them alone says little. ``noise`` is the size of a token's own part beside its topic's.
    """
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(B, num_topics, D, generator=generator, device="cpu")
    # Some topics crowd one side.
    popularity = torch.rand(2, B, num_topics, generator=generator, device="cpu") ** 3 + 0.01

    def tokens(side: int, count: int) -> Tensor:
        chosen = torch.multinomial(popularity[side], max(count, 1), replacement=True, generator=generator)[:, :count]
        own = noise * torch.randn(B, count, D, generator=generator, device="cpu")
        return (topics.gather(1, chosen[..., None].expand(B, count, D)) + own).to(device, dtype)

    return tokens(0, N), tokens(1, M)


EVALUATIONS = 8  # of the reference: see assert_as_accurate_as_reference
_MATRICES, _OF_ROWS, _OF_COLUMNS = ("cost", "similarity", "plan"), ("x", "a", "f"), ("y", "b", "g")


class SpecificationBackend(Backend):
    """The log-domain specification behind the same rules for padding, mass and NaN as every backend."""

    name = "specification"

    def unavailable(self) -> list[str]:
        return []

    def solve(self, similarity: Tensor, p: Marginals, problem: Problem) -> Solution:
        def solver(s: Tensor, a: Tensor, b: Tensor) -> Solution:
            return plain.specification(s, a, b, problem.options)

        return plain.solve(solver, similarity, p)


def specified_sinkhorn(
    cost: Tensor,
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    num_iters: int = 50,
    tol: float | None = None,
) -> SinkhornOutput:
    """:func:`otfuse.sinkhorn` by the specification, in the dtype of ``cost``; exact when that is float64."""
    problem = cost_problem(cost, a, b, SolveOptions(epsilon, num_iters, tol))
    solution = SpecificationBackend().solve(-cost.to(problem.solve_dtype), attention.marginals(problem), problem)
    return SinkhornOutput(*solution)


def specified_attend(
    x: Tensor,
    y: Tensor,
    epsilon: float = 0.1,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    similarity: str = "cosine",
    num_iters: int = 50,
    tol: float | None = None,
    weights: str = "plan",
) -> SinkhornAttendOutput:
    """:func:`otfuse.sinkhorn_attend` by the specification, in the dtype of the tokens, plan included."""
    problem = token_problem(x, y, a, b, SolveOptions(epsilon, num_iters, tol), similarity, weights, True)
    return SpecificationBackend().attend(problem)[0]


def per_item_log_domain(similarity: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """Plans [B, N, M] by a Python loop over the batch, uniform weights: how OT layers are written today.

    The formula of the specification with a hundred small operations a batch element; the yardstick of the demo and
    the benchmarks.
    """
    plans = []
    for log_kernel in similarity / epsilon:  # [N, M]
        N, M = log_kernel.shape
        log_a = log_kernel.new_full((N,), 1 / N).log()
        log_b = log_kernel.new_full((M,), 1 / M).log()
        log_v = torch.zeros_like(log_b)
        for _ in range(num_iters):
            log_u = log_a - torch.logsumexp(log_kernel + log_v[None, :], 1)
            log_v = log_b - torch.logsumexp(log_kernel + log_u[:, None], 0)
        plans.append(torch.exp(log_kernel + log_u[:, None] + log_v[None, :]))
    return torch.stack(plans)


def reordered(solve: Callable[..., Any], order: int) -> Callable[..., Any]:
    """The same function with rows and columns in another order, its answer in the order of the input.

    In exact arithmetic nothing changes; in floating point the sums are rounded differently, and equally well.
    Gradients pass through.

    Args:
        solve: of tensors named as in :func:`otfuse.sinkhorn` or :func:`otfuse.sinkhorn_attend`, to a named tuple.
        order: seed of the order; 0 leaves ``solve`` as it is.
    """
    if order == 0:
        return solve

    def solve_reordered(*args: Any, **options: Any) -> Any:
        bound = inspect.signature(solve).bind(*args, **options)
        tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
        matrix = next((tensors[name] for name in _MATRICES if name in tensors), None)
        N, M = matrix.shape[1:] if matrix is not None else (tensors["x"].shape[1], tensors["y"].shape[1])
        generator = torch.Generator().manual_seed(order)
        rows, columns = torch.randperm(N, generator=generator), torch.randperm(M, generator=generator)
        bound.arguments.update(permuted(tensors, rows, columns))
        out = solve(*bound.args, **bound.kwargs)
        return out._replace(**permuted(out._asdict(), rows.argsort(), columns.argsort()))

    return solve_reordered


def permuted(values: Mapping[str, Any], rows: Tensor, columns: Tensor) -> dict[str, Any]:
    """Matrices [B, N, M], and what belongs to rows [B, N, ...] or to columns [B, M, ...], in the order of two
    permutations; which is which goes by the names of :func:`otfuse.sinkhorn` and :func:`otfuse.sinkhorn_attend`."""

    def of(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and name in _MATRICES + _OF_ROWS:
            value = value.index_select(1, rows.to(value.device))
        if isinstance(value, Tensor) and name in _MATRICES + _OF_COLUMNS:
            value = value.index_select(2 if name in _MATRICES else 1, columns.to(value.device))
        return value

    return {name: of(name, value) for name, value in values.items()}


def references(specify: Callable[[int], Iterable[Tensor]]) -> list[Tensor]:
    """Each output of ``specify(order)`` for several orders, stacked in front: see :func:`reordered`."""
    return [torch.stack(values) for values in zip(*(specify(order) for order in range(EVALUATIONS)))]


def assert_as_accurate_as_reference(
    actual: Tensor,
    reference: Tensor,
    exact: Tensor,
    *,
    rounding: torch.dtype | None = None,
    scale: float | None = None,
    what: str = "result",
) -> None:
    """Error of ``actual`` at most twice that of ``reference``, plus one rounding; both against ``exact``.

    The error of one evaluation is a draw, which depends on the order of its sums and so on the processor, and may be
    small by luck: of two draws from one normal distribution one exceeds twice the other in 29 % of cases. So the
    reference is several evaluations, equally good (:func:`references`), and the largest of their errors counts: with
    eight, an error of the same distribution exceeds twice that in under 1 % of cases for a single number, and far
    fewer for the largest of many. The factor stays two: accuracy that is lost is still seen.

    Args:
        actual: what is judged, of any shape S.
        reference: the same formula in plain PyTorch at the same dtype, in evaluations [K, *S].
        exact: the same in float64, of shape S.
        rounding: dtype of the one rounding; that of ``actual`` if None.
        scale: size of what is rounded, for a difference of larger things; the largest of ``exact`` if None.
        what: named in the failure.
    """
    given, expected = list(reference.shape), list(exact.shape)
    _demand(actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {expected}")
    _demand(given[1:] == expected, f"{what}: reference of shape {given}, expected evaluations [K, *{expected}]")
    dtype, special = actual.dtype, ~torch.isfinite(exact)
    same = torch.equal(_special(actual), _special(exact))
    _demand(same, f"{what}: NaN or Inf where there is none, or the reverse")
    actual, reference, exact = (t.double().masked_fill(special, 0) for t in (actual, reference, exact))
    if not exact.numel():
        return
    error, allowed = (actual - exact).abs().max(), (reference - exact).abs().max()
    band = torch.finfo(rounding or dtype).eps * (exact.abs().max() if scale is None else scale)
    _demand(
        bool(error <= 2 * allowed + band),
        f"{what}: error {error:.3g}; the reference at the same dtype has {allowed:.3g}, a rounding is {band:.3g}",
    )


def _demand(condition: bool, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


def _special(values: Tensor) -> Tensor:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return torch.isposinf(values) + 2 * torch.isneginf(values) + 3 * torch.isnan(values)
