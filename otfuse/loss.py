"""The alignment loss of LAVCap (Eq. 4): each token should be most similar to what it is assigned to.

Letters: B batch, N tokens of ``x``, M tokens of ``y``.
"""

from __future__ import annotations

from torch import Tensor

from otfuse._alignment import reduced
from otfuse._attention import full_precision
from otfuse._backends.select import select
from otfuse._problem import loss_problem


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
        reduction: "mean": over the tokens of a side, sides added, then over the batch elements that have tokens
            on both sides; "sum": over tokens, sides and the batch (Eq. 4).

    Returns:
        A scalar in float32 at least; zero if no batch element has tokens.

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
    problem = loss_problem(plan, similarity, a, b, temperature, assignment, contrast, reduction)
    with full_precision(plan.device):
        return reduced(*select(problem, "auto").token_terms(problem), problem)
