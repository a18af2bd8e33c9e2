"""The public functions: check the arguments, choose the backend, run it, hand back one result type.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.
"""

from __future__ import annotations

from torch import Tensor

from otfuse import _attention as attention
from otfuse._backends.base import attend, solve
from otfuse._backends.select import select
from otfuse._problem import (
    SIMILARITIES,
    SinkhornAttendOutput,
    SinkhornOutput,
    SolveOptions,
    check_choice,
    check_pair,
    check_tensor,
    cost_problem,
    token_problem,
)


def sinkhorn_attend(
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
    grad: str = "unroll",
    return_plan: bool = False,
    backend: str = "auto",
) -> SinkhornAttendOutput:
    """Align two token sequences by optimal transport and let each attend to the other through the plan.

    With ``S = similarity(x, y)`` the plan maximises ``<plan, S> + epsilon H(plan)`` over all plans whose rows
    sum to ``a`` and whose columns sum to ``b``, found by Sinkhorn-Knopp; then ``x + W y`` and ``y + W' x``.
    The solve runs in float32 or float64, also for half-precision tokens and under autocast.

    Args:
        x: [B, N, D], float64, float32, bfloat16 or float16.
        y: [B, M, D], same dtype and device.
        epsilon: Weight of the entropy, > 0, in units of similarity. Smaller is sharper and converges slower.
        a: [B, N]: weights >= 0, scaled to sum one per batch element (a negative one makes it NaN); or a boolean
            mask, uniform over True; None is uniform. A token of zero weight is padding: its plan entries are
            exactly zero, it comes back unchanged, and what it holds has no influence.
        b: [B, M], likewise for ``y``.
        similarity: "cosine" or "dot".
        num_iters: Sinkhorn iterations, >= 1; each scales the rows, then the columns.
        tol: A batch element stops once the L1 error of its plan's row sums is below this; None runs all
            iterations.
        weights: "plan": ``W = plan``, ``W' = planᵀ`` (rows sum to ``a``, so for N tokens the attended term is
            about 1/N of a token); "barycentric": rows of W and of W' sum to one, a true attention map.
        grad: "unroll": exact gradient of the iterations that were run; "implicit": gradient of the converged plan
            (first derivatives; right when ``marginal_error`` is small); "detach": the plan is a constant.
        return_plan: Whether the result holds the plan.
        backend: "auto", or the name of a backend, which then runs or raises.

    Returns:
        :class:`SinkhornAttendOutput`: x [B, N, D], y [B, M, D] and plan [B, N, M] (or None) in the dtype of the
        tokens; f [B, N], g [B, M], marginal_error [B] in the solve dtype; num_iters [B] int32. If all
        weights of a batch element are zero, its tokens come back unchanged; one that holds NaN or Inf becomes NaN,
        alone.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        BackendError: the named backend cannot run this; lists every reason.

    Example:
        >>> import torch, otfuse
        >>> audio, video = torch.randn(2, 64, 768), torch.randn(2, 20, 768)
        >>> out = otfuse.sinkhorn_attend(audio, video, epsilon=0.1)
        >>> out.x.shape, out.y.shape
        (torch.Size([2, 64, 768]), torch.Size([2, 20, 768]))
        >>> bool((out.marginal_error < 1e-3).all())
        True

    Source: Rho et al., LAVCap, ICASSP 2025 (arXiv 2501.09291), Eqs. 2, 3 and 5; Cuturi, NeurIPS 2013.
    """
    options = SolveOptions(epsilon, num_iters, tol, grad)
    problem = token_problem(x, y, a, b, options, similarity, weights, return_plan)
    return attend(select(problem, backend), problem)


def sinkhorn(
    cost: Tensor,
    epsilon: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    num_iters: int = 50,
    tol: float | None = None,
    grad: str = "unroll",
    backend: str = "auto",
) -> SinkhornOutput:
    """Solve a batch of entropic optimal transport problems by Sinkhorn-Knopp.

    ``plan = exp((f + g - cost) / epsilon)`` minimises ``<plan, cost> - epsilon H(plan)`` over all plans whose
    rows sum to ``a`` and whose columns sum to ``b``.

    Args:
        cost: [B, N, M], float64, float32, bfloat16 or float16 (half precision is solved in float32).
        epsilon: Weight of the entropy, > 0, in units of cost.
        a, b: [B, N], [B, M]: weights or masks, as in :func:`sinkhorn_attend`.
        num_iters, tol, grad, backend: as in :func:`sinkhorn_attend`.

    Returns:
        :class:`SinkhornOutput`: plan [B, N, M] in the dtype of the cost; f [B, N] and g [B, M], as the last
        iteration leaves them (columns last), -inf where the weight is zero; marginal_error [B]; num_iters [B].

    Raises:
        ValueError, TypeError, BackendError: as in :func:`sinkhorn_attend`.

    Example:
        >>> import torch, otfuse
        >>> plan = otfuse.sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.1).plan
        >>> plan.sum(2)
        tensor([[0.5000, 0.5000]])

    Source: Cuturi, Sinkhorn Distances, NeurIPS 2013.
    """
    problem = cost_problem(cost, a, b, SolveOptions(epsilon, num_iters, tol, grad))
    return solve(select(problem, backend), problem)


def similarity_matrix(x: Tensor, y: Tensor, kind: str = "cosine") -> Tensor:
    """How alike every token of ``x`` is to every token of ``y``.

    Args:
        x, y: [B, N, D], [B, M, D], one dtype and device.
        kind: "cosine", ``<x_i, y_j> / (|x_i| |y_j|)``, zero for a zero token; or "dot", ``<x_i, y_j>``.

    Returns:
        [B, N, M] in the dtype of the tokens, computed in float32 at least.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Example:
        >>> import torch, otfuse
        >>> otfuse.similarity_matrix(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
        tensor([[[0.6000, 0.8000]]])
    """
    check_tensor("x", x, "[B, N, D]")
    check_tensor("y", y, "[B, M, D]")
    check_pair(x, y, ((0, "batch size B"), (2, "feature size D")))
    check_choice("kind", kind, SIMILARITIES)
    with attention.full_precision(x.device):
        return attention.similarity(attention.solve_precision(x), attention.solve_precision(y), kind).to(x.dtype)
