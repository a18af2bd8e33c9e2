"""The alignment loss in plain PyTorch: the terms of all tokens, and what is made of them.

Backends that have a kernel for the terms replace them. Everything here runs in the solve dtype and is differentiable.

Letters: B batch, N tokens of ``x``, M tokens of ``y``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otfuse._attention import solve_precision
from otfuse._problem import ASSIGNMENTS, CONTRASTS, LossProblem


def reduced(terms: Tensor, has_mass: Tensor, problem: LossProblem) -> Tensor:
    """The loss, of what ``token_terms`` returns."""
    if not problem.mean:
        return terms.sum()
    if problem.a is None and problem.b is None:
        return terms.sum() / max(problem.plan.shape[0], 1)
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
    """What each token adds to the loss [B, N + M], those of x first, and whether a batch element has mass [B].

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
    # A batch element with nothing to keep gets finite logits all the same; its loss is left out later.
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
