"""The alignment loss of LAVCap (Eq. 4): each token should be most similar to what it is assigned to.

Letters: B batch, N tokens of ``x``, M tokens of ``y``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otfuse.attention import full_precision, solve_precision
from otfuse.backends import triton_loss
from otfuse.problem import check_choice, check_divisor, check_pair, check_tensor, check_weights

ASSIGNMENTS = ("plan", "log_plan", "barycentric")
CONTRASTS = ("similarity", "assignment")
REDUCTIONS = ("mean", "sum")


def ot_alignment_loss(
    plan: Tensor,
    similarity: Tensor,
    *,
    temperature: float = 0.07,
    assignment: str = "log_plan",
    contrast: str = "similarity",
    a: Tensor | None = None,
    b: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive loss between the rows of the plan and the rows of the similarity, and the same for columns.

    For the rows: ``logits[i, j] = <q_i, s_j> / temperature`` with target ``i``, cross-entropy over j; the loss
    of the columns is added.

    Args:
        plan: [B, N, M], from :func:`sinkhorn` or :func:`sinkhorn_attend`. Its logarithm is taken no lower than
            that of the smallest normal number of its dtype: pass a float32 plan, not a float16 one.
        similarity: [B, N, M], from :func:`similarity_matrix`.
        temperature: Divides the logits, > 0. The public LAVCap code uses ``1 / ln(1 / 0.07) = 0.376``.
        assignment: What ``q_i`` is: "plan" (as printed in the paper; entries are of order 1/(N M), so the
            loss sits at chance), "log_plan" (the public code) or "barycentric" (rows, for the column loss
            columns, scaled to sum one).
        contrast: "similarity": among all ``s_j`` for one ``q_i`` (Eq. 4); "assignment": among all ``q_j`` for
            one ``s_i`` (the public code).
        a, b: [B, N], [B, M] weights or boolean masks; zero or False leaves the token out. None keeps all.
        reduction: "mean": over the tokens of a side, sides added, then over the items that have tokens on both
            sides; "sum": over tokens, sides and items (Eq. 4).

    Returns:
        A scalar in float32 at least; zero if no item has tokens.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.

    Example:
        >>> import torch, otfuse
        >>> similarity = torch.eye(3)[None]
        >>> plan = otfuse.sinkhorn(-similarity, epsilon=0.1).plan
        >>> bool(otfuse.ot_alignment_loss(plan, similarity) < 0.01)
        True

    Source: Rho et al., LAVCap, ICASSP 2025 (arXiv 2501.09291), Eq. 4.
    """
    check_tensor("plan", plan, "[B, N, M]")
    check_tensor("similarity", similarity, "[B, N, M]")
    if plan.shape != similarity.shape:
        raise ValueError(
            f"plan and similarity must have one shape [B, N, M]; got {list(plan.shape)} and {list(similarity.shape)}"
        )
    check_pair(plan, similarity, (), ("plan", "similarity"))
    way_out = "multiply temperature and the similarity by one number: the loss stays"
    check_divisor("temperature", temperature, plan.dtype, way_out)
    check_choice("assignment", assignment, ASSIGNMENTS)
    check_choice("contrast", contrast, CONTRASTS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_weights("a", a, tuple(plan.shape[:2]), "[B, N]", plan)
    check_weights("b", b, (plan.shape[0], plan.shape[2]), "[B, M]", plan)

    return _loss(plan, similarity, a, b, temperature, assignment, contrast, reduction, triton_loss.can_run(plan))


def _loss(
    plan: Tensor,
    similarity: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    temperature: float,
    assignment: str,
    contrast: str,
    reduction: str,
    kernel: bool,
) -> Tensor:
    """The loss of checked arguments, by the kernel or in plain PyTorch."""
    options = ASSIGNMENTS.index(assignment), CONTRASTS.index(contrast), reduction == "mean"
    with full_precision(plan.device):
        run = triton_loss.token_terms if kernel else token_terms
        terms, has_mass = run(plan, similarity, a, b, temperature, *options)
        if reduction == "sum":
            return terms.sum()
        if a is None and b is None:
            return terms.sum() / max(plan.shape[0], 1)
        return terms.sum() / has_mass.sum().clamp_min(1)


def token_terms(
    plan: Tensor,
    similarity: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    temperature: float | Tensor,
    assignment: int,
    contrast: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """What each token adds to its item's loss [B, N + M], those of x first, and whether an item has mass [B].

    ``assignment`` and ``contrast`` are places in ASSIGNMENTS and CONTRASTS; with ``mean`` a token adds its share of
    the mean over its side, otherwise its cross-entropy.
    """
    keep_x = _keep(a, plan[:, :, 0] if plan.shape[2] else plan.sum(2))  # [B, N]
    keep_y = _keep(b, plan[:, 0, :] if plan.shape[1] else plan.sum(1))  # [B, M]
    pairs = keep_x[:, :, None] & keep_y[:, None, :]
    plan = torch.where(pairs, solve_precision(plan), 0)
    similarity = torch.where(pairs, solve_precision(similarity), 0)
    names = ASSIGNMENTS[assignment], CONTRASTS[contrast]
    of_x = _side(plan, similarity, keep_x, temperature, *names)  # [B, N]
    of_y = _side(plan.mT, similarity.mT, keep_y, temperature, *names)  # [B, M]
    if mean:
        of_x, of_y = _shares(of_x, keep_x), _shares(of_y, keep_y)
    has_mass = keep_x.any(1) & keep_y.any(1)  # [B]
    return torch.where(has_mass[:, None], torch.cat((of_x, of_y), 1), 0), has_mass


def _keep(weights: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if weights is None else weights != 0


def _side(
    plan: Tensor, similarity: Tensor, keep: Tensor, temperature: float | Tensor, assignment: str, contrast: str
) -> Tensor:
    """Cross-entropy of each row token [B, N]; zero for those left out."""
    q = _assigned(plan, assignment)
    logits = torch.bmm(q, similarity.mT) / temperature  # [B, N, N]: <q_i, s_j>
    if contrast == "assignment":
        logits = logits.mT  # <q_j, s_i>
    # An item with nothing to keep gets finite logits all the same; its loss is left out later.
    candidates = (keep | ~keep.any(1, keepdim=True))[:, None, :]
    normaliser = torch.logsumexp(torch.where(candidates, logits, -torch.inf), 2)
    return torch.where(keep, normaliser - logits.diagonal(dim1=1, dim2=2), 0)


def _assigned(plan: Tensor, assignment: str) -> Tensor:
    """What a row token is assigned to; zero where the plan is zero by padding."""
    if assignment == "plan":
        return plan
    if assignment == "log_plan":
        # Padding adds nothing to the inner products: the similarity is zero there.
        return plan.clamp_min(torch.finfo(plan.dtype).tiny).log()
    rows = plan.sum(2, keepdim=True)
    return plan / torch.where(rows == 0, 1, rows)


def _shares(per_token: Tensor, keep: Tensor) -> Tensor:
    return per_token / keep.sum(1, keepdim=True).clamp_min(1)
