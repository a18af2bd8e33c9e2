"""Transport problems whose answers are known, as hypothesis strategies, and the checks of an answer.

Letters: B batch, N rows, M columns, D features. Problems are in :func:`inner` on the CPU unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from otfuse._backends.select import BACKENDS
from otfuse._problem import SinkhornOutput, SolveOptions, cost_problem
from otfuse.testing import assert_as_accurate_as_reference, specified_sinkhorn

_inner = [torch.float64]


def use(dtype: torch.dtype) -> None:
    """What tests that name no dtype run in: the best that their backend has (conftest.py)."""
    _inner[0] = dtype


def inner() -> torch.dtype:
    return _inner[0]


_place = [torch.device("cpu")]


def put(device: torch.device) -> None:
    """Where ``here`` puts tensors of tests that name no device: on a GPU those of the Triton backend (conftest.py)."""
    _place[0] = device


def place() -> torch.device:
    return _place[0]


def here(tensor: Tensor) -> Tensor:
    return tensor.to(_place[0])


def eps() -> float:
    return torch.finfo(inner()).eps


def few_roundings() -> float:
    """An entry of a plan is some ten roundings away from exact arithmetic (a sum, a division and two products for each
    side); what earlier rounds add is contracted away. A factor of six for sums over up to 64 terms."""
    return 64 * eps()


def roundings(tolerance: float) -> float:
    """As many roundings as ``tolerance`` is in float64."""
    return tolerance * eps() / torch.finfo(torch.float64).eps


seeds = st.integers(0, 2**31 - 1)


def is_interpreted(backend: str, device: torch.device) -> bool:
    """Whether this runs in Triton's interpreter: the same program, some ten thousand times as slow as on a GPU."""
    return backend == "triton" and device.type == "cpu"


def why_not(backend: str, device: torch.device, N: int, M: int, dtype: torch.dtype = torch.float32) -> str:
    """Why a backend is not tested on items of this size; empty if it is."""
    (chosen,) = (candidate for candidate in BACKENDS if candidate.name == backend)
    reasons = chosen.why_not(
        cost_problem(torch.zeros(0, N, M, dtype=dtype, device=device), None, None, SolveOptions(1.0, 1))
    )
    if is_interpreted(backend, device) and N * M > 1300:
        reasons.append("too slow in Triton's interpreter")
    return "; ".join(reasons)


@dataclass(frozen=True)
class Known:
    """A problem and its plan; every entry of an answer is to be within ``tolerance`` of it."""

    cost: Tensor  # [B, N, M]
    epsilon: float
    plan: Tensor  # [B, N, M]
    tolerance: float | Tensor
    a: Tensor | None = None  # [B, N]
    b: Tensor | None = None  # [B, M]
    num_iters: int = 50


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform in [0, 1); the same numbers for every dtype up to rounding."""
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64).to(dtype or inner())


def randn(seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype or inner())


def weights(seed: int, B: int, N: int, dtype: torch.dtype | None = None) -> Tensor:
    """Positive weights that do not sum to one: the operator is to scale them."""
    return 0.1 + 3 * rand(seed, B, N, dtype=dtype)


def padded_weights(seed: int, B: int, N: int, dtype: torch.dtype | None = None) -> Tensor:
    """Weights of which about a third are zero, the first never."""
    keep = rand(seed + 1, B, N) > 0.35
    keep[:, 0] = True
    return weights(seed, B, N, dtype) * keep


def normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


@st.composite
def diracs(draw: st.DrawFn) -> Known:
    """One side is a single token: the plan is the other side's weights, whatever the cost."""
    seed, B, length = draw(seeds), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    other = weights(seed, B, length)
    cost, plan = 10 * randn(seed, B, 1, length), normalised(other)[:, None, :]
    # log K reaches 40 / epsilon, and an error in it is one in the plan.
    epsilon = draw(st.sampled_from([1.0, 0.1, 0.01]))
    tolerance = few_roundings() * (1 + 40 / epsilon)
    if draw(st.booleans()):
        return Known(cost, epsilon, plan, tolerance, b=other)
    return Known(cost.mT, epsilon, plan.mT, tolerance, a=other)


@st.composite
def permutations(draw: st.DrawFn) -> Known:
    """Cost zero on a permutation and one elsewhere: by symmetry one round solves it, in closed form."""
    N, epsilon = draw(st.integers(2, 12)), draw(st.sampled_from([0.5, 0.05, 0.01, 0.001]))
    match = torch.eye(N, dtype=torch.float64)[torch.randperm(N, generator=generator(draw(seeds)))]
    off = math.exp(-1 / epsilon)
    plan = (match + off * (1 - match)) / (N * (1 + (N - 1) * off))
    return Known((1 - match)[None], epsilon, plan[None], few_roundings() * (1 + 1 / epsilon))


@st.composite
def products(draw: st.DrawFn) -> Known:
    """Large epsilon: the plan is close to ``a bᵀ``, at every number of rounds.

    With R the range of the cost, row scalings vary by at most exp(R / epsilon) after a row update, so
    ``plan / (a bᵀ)`` varies by at most exp(2 R / epsilon) within a column; its mean there is one.
    """
    seed, N, M = draw(seeds), draw(st.integers(2, 9)), draw(st.integers(2, 9))
    a, b, epsilon = weights(seed, 2, N), weights(seed + 1, 2, M), draw(st.sampled_from([10.0, 1e3, 1e6]))
    plan = normalised(a)[:, :, None] * normalised(b)[:, None, :]
    tolerance = plan * math.expm1(2 / epsilon) + few_roundings()
    return Known(rand(seed + 2, 2, N, M), epsilon, plan, tolerance, a, b, draw(st.sampled_from([1, 2, 50])))


@st.composite
def two_by_two(draw: st.DrawFn) -> Known:
    """The cross ratio of the plan is that of K: a quadratic equation for the first entry."""
    share = st.floats(0.1, 0.9)
    alpha, beta, epsilon = draw(share), draw(share), draw(st.sampled_from([1.0, 0.1, 0.02]))
    cost = 2 * epsilon * randn(draw(seeds), 1, 2, 2).clamp(-1, 1)
    ratio = torch.exp(-(cost[0, 0, 0] + cost[0, 1, 1] - cost[0, 0, 1] - cost[0, 1, 0]) / epsilon).item()
    # p (1 - alpha - beta + p) = ratio (alpha - p)(beta - p), solved without cancellation.
    square, linear, constant = 1 - ratio, 1 - alpha - beta + ratio * (alpha + beta), -ratio * alpha * beta
    root = math.sqrt(linear**2 - 4 * square * constant)
    p = -2 * constant / (linear + root) if linear > 0 else (root - linear) / (2 * square)
    plan = torch.tensor([[[p, alpha - p], [beta - p, 1 - alpha - beta + p]]], dtype=torch.float64)
    a = torch.tensor([[alpha, 1 - alpha]], dtype=torch.float64)
    b = torch.tensor([[beta, 1 - beta]], dtype=torch.float64)
    # The cross ratio lies within exp(±8), so a round contracts by tanh(8 / 4)² = 0.93 or better: 500 rounds leave
    # less than a rounding, and the roundings of all rounds add up to 1 / (1 - 0.93) times those of one.
    return Known(cost, epsilon, plan, few_roundings() / 0.07, a, b, 500)


@st.composite
def gaussians(draw: st.DrawFn) -> Known:
    """Two normal distributions on grids, squared distance: the plan is a bivariate normal distribution.

    Its covariance c solves ``c² + epsilon c / 2 = (s t)²`` (Janati, Muzellec, Peyré, Cuturi: Entropic optimal
    transport between unbalanced Gaussian measures has a closed form, NeurIPS 2020, Theorem 1, in one dimension;
    Mallasto, Gerolin, Minh: Entropy-regularized 2-Wasserstein distance between Gaussian measures, 2022).
    """
    s, t = draw(st.sampled_from([0.5, 1.0, 3.0])), draw(st.sampled_from([0.7, 1.0, 2.0]))
    shift, epsilon = draw(st.floats(-2, 2)), draw(st.sampled_from([0.5, 1.0, 4.0])) * s * t
    # Sums over grids of a quarter of a standard deviation, six of them to each side, are integrals up to the
    # tails: erfc(6 / √2) = 2e-9 of the mass, no entry of the plan exceeding 0.25² of a density below one.
    grid = torch.linspace(-6, 6, 49, dtype=torch.float64)
    x, y = s * grid, t * grid
    covariance = math.sqrt(epsilon**2 / 16 + (s * t) ** 2) - epsilon / 4
    inverse = torch.linalg.inv(torch.tensor([[s * s, covariance], [covariance, t * t]], dtype=torch.float64))
    square = inverse[0, 0] * x[:, None] ** 2 + 2 * inverse[0, 1] * x[:, None] * y + inverse[1, 1] * y**2
    plan = normalised(torch.exp(-square / 2).flatten()).view(1, 49, 49)
    normal = torch.exp(-(grid**2) / 2)[None]
    # epsilon >= s t / 2 makes the correlation at most 0.79: 100 rounds contract by 0.79^200 = 1e-21.
    cost = (x[:, None] - y - shift) ** 2
    return Known(cost[None], epsilon, plan, 2e-9 + few_roundings(), normal, normal, 100)


@st.composite
def padded(draw: st.DrawFn) -> Known:
    """A random problem spread out among padding, which holds anything; the answer is that without padding."""
    seed, N, M = draw(seeds), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    cost, a, b = randn(seed, 2, N, M), weights(seed + 1, 2, N), weights(seed + 2, 2, M)
    solved = specified_sinkhorn(cost, 0.1, a, b, num_iters=20).plan
    wide_N, wide_M = N + draw(st.integers(0, 5)), M + draw(st.integers(0, 5))
    rows = torch.randperm(wide_N, generator=generator(seed + 3))[:N]
    columns = torch.randperm(wide_M, generator=generator(seed + 4))[:M]
    garbage = draw(st.sampled_from([0.0, -torch.finfo(inner()).max, math.nan, math.inf, -math.inf]))

    def spread(values: Tensor, filler: float) -> Tensor:
        wide = values.new_full((2, wide_N, wide_M), filler)
        wide[:, rows[:, None], columns] = values
        return wide

    wide_a, wide_b = a.new_zeros(2, wide_N), b.new_zeros(2, wide_M)
    wide_a[:, rows], wide_b[:, columns] = a, b
    # log K reaches some 8 / 0.1 (eight standard deviations apart), and an error in it is one in the plan.
    return Known(spread(cost, garbage), 0.1, spread(solved, 0.0), 100 * few_roundings(), wide_a, wide_b, 20)


known_problems = st.one_of(diracs(), permutations(), products(), two_by_two(), gaussians(), padded())


def assert_solves(out: SinkhornOutput, known: Known) -> None:
    """Plan, its marginals, its zeros, its potentials, its error: all as the problem has them."""
    plan = known.plan
    assert ((out.plan - plan).abs() <= known.tolerance).all(), f"off by {(out.plan - plan).abs().max():.3g}"
    B, N, M = plan.shape
    a = normalised(torch.ones(B, N, dtype=plan.dtype) if known.a is None else known.a)
    b = normalised(torch.ones(B, M, dtype=plan.dtype) if known.b is None else known.b)
    live = (a != 0)[:, :, None] & (b != 0)[:, None, :]
    assert (out.plan[~live] == 0).all()
    assert torch.equal(out.f == -torch.inf, a == 0) and torch.equal(out.g == -torch.inf, b == 0)
    # Summing up to 64 entries costs fewer roundings than this, of a total of one.
    assert ((out.plan.sum(1) - b).abs() <= few_roundings()).all(), "columns were updated last: their sums are exact"
    error = (out.plan.sum(2) - a).abs().sum(1)
    assert ((out.marginal_error - error).abs() <= few_roundings()).all()
    assert (out.num_iters == known.num_iters).all() and out.num_iters.dtype == torch.int32
    exponent = (out.f[:, :, None] + out.g[:, None, :] - known.cost) / known.epsilon
    summands = out.f.abs()[:, :, None] + out.g.abs()[:, None, :] + known.cost.abs()  # which may cancel
    size = torch.where(live, summands / known.epsilon + 1, 1)
    from_potentials = torch.where(live, exponent, -torch.inf).exp()
    assert ((from_potentials - out.plan).abs() <= 8 * eps() * size).all()


def assert_accurate(
    actual: Tensor, reference: Tensor, exact: Tensor, truth: Tensor, what: str, scale: float | None = None
) -> None:
    """The rule of :func:`assert_as_accurate_as_reference`, for float64 too.

    For float64 ``truth`` is the float64 specification and the other two belong to the same problem in float32: an
    error in float64, 2^-29 the size, is held against theirs magnified by 2^29, a third of it: one third is the
    truth's own error, and one is because roundings at another dtype are another draw. At every other dtype
    ``truth`` is ``exact``.
    """
    if actual.dtype == torch.float64:
        error = torch.where(torch.isfinite(actual) & torch.isfinite(truth), actual - truth, 0)
        actual = torch.where(torch.isfinite(actual), exact + error * 2.0**29 / 3, actual)
        assert_as_accurate_as_reference(actual, reference, exact, rounding=torch.float32, scale=scale, what=what)
    else:
        assert_as_accurate_as_reference(actual, reference, exact, scale=scale, what=what)


def assert_solution_accurate(
    actual: SinkhornOutput,
    reference: SinkhornOutput,
    exact: SinkhornOutput,
    truth: SinkhornOutput,
    epsilon: float,
    what: str,
) -> None:
    """:func:`assert_accurate` for all that a solve returns; ``reference`` has its evaluations in front.

    Two of its outputs need a word on what a rounding is. The marginal error is a difference of sums that are one,
    so its roundings are those of the sums. And ``f + c``, ``g - c`` are potentials as good as ``f``, ``g``: no round
    corrects c, which therefore gathers the roundings of all rounds instead of forgetting them (a round: both
    potentials, and for each a marginal, a sum and a division, half an eps each). So c is held against that sum, and
    the potentials without c against the rule.
    """
    assert torch.equal(actual.num_iters, truth.num_iters), f"{what}: num_iters"
    solutions = (actual, reference, exact, truth)
    assert_accurate(*(s.plan for s in solutions), what=f"{what}: plan")
    # Sums that are one, of quotients times scalings: half a rounding each for quotient, product and sum.
    assert_accurate(*(s.marginal_error for s in solutions), scale=1.5, what=f"{what}: marginal_error")
    scale = max(_size(truth.f), _size(truth.g))
    constant = _constant(actual, truth)
    gathered = torch.finfo(actual.f.dtype).eps * int(truth.num_iters.max()) * (3 * epsilon + scale)
    assert (constant.abs() <= gathered).all(), f"{what}: constant {constant.abs().max():.3g}, allowed {gathered:.3g}"
    actual, reference = (_without_constant(*pair) for pair in ((actual, truth), (reference, exact)))
    for name in ("f", "g"):
        values = (getattr(s, name) for s in (actual, reference, exact, truth))
        assert_accurate(*values, scale=scale, what=f"{what}: {name}")


def _constant(out: SinkhornOutput, exact: SinkhornOutput) -> Tensor:
    """c [..., B]: half the difference of the mean errors of f and of g."""
    return (_mean_error(out.f, exact.f) - _mean_error(out.g, exact.g)) / 2


def _without_constant(out: SinkhornOutput, exact: SinkhornOutput) -> SinkhornOutput:
    """Without c, in the dtype of the potentials: one rounding more, on both sides of the comparison."""
    c = _constant(out, exact)[..., None].to(out.f.dtype)
    return out._replace(f=out.f - c, g=out.g + c)


def _mean_error(values: Tensor, exact: Tensor) -> Tensor:
    live = torch.isfinite(values) & torch.isfinite(exact)
    return torch.where(live, values.double() - exact, 0).sum(-1) / live.sum(-1).clamp_min(1)


def _size(values: Tensor) -> float:
    return float(torch.where(torch.isfinite(values), values, 0).abs().max()) if values.numel() else 0.0
