"""The gradient of the fixed point in plain PyTorch: docs/gradients.md, Eq. 5.

Letters: B batch, N rows, M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from otfuse._attention import Marginals
from otfuse._backends.base import Solution
from otfuse._ops import FIRST_DERIVATIVES_ONLY, is_transformed


def attach_implicit_gradient(solution: Solution, similarity: Tensor, p: Marginals, epsilon: float | Tensor) -> Solution:
    """The solution with the gradient of the fixed point (first derivatives): docs/gradients.md, Eq. 5.

    Every term added here is zero; only its derivative is not.
    """
    plan = solution.plan  # [B, N, M], a constant
    rows, columns = plan.sum(2), plan.sum(1)
    if p.masked:
        similarity = torch.where((p.a != 0)[:, :, None] & (p.b != 0)[:, None, :], similarity, 0)
    tangent = plan * (similarity - similarity.detach()) / epsilon
    excess_rows = tangent.sum(2) - (p.a - p.a.detach())
    excess_columns = tangent.sum(1) - (p.b - p.b.detach())
    if rows.shape[1] < columns.shape[1]:  # the system is as large as what is left: the shorter side
        dv, du = _centred_solve(plan.mT, columns, rows, excess_columns, excess_rows)
    else:
        du, dv = _centred_solve(plan, rows, columns, excess_rows, excess_columns)
    # Constants may move from f to g: they are put where the weighted mean of g's change is zero.
    constant = (columns * dv).sum(1, keepdim=True)
    du, dv = du + constant, dv - torch.where(columns == 0, 0, constant)
    outputs = (
        plan + tangent + plan * (du[:, :, None] + dv[:, None, :]),
        solution.f + epsilon * du,
        solution.g + epsilon * dv,
    )
    _refuse_second_derivatives(outputs, similarity, p.a, p.b)
    return Solution(*outputs, *solution[3:])


class _Refusal(torch.autograd.Function):
    """The identity on a gradient, which does not let itself be differentiated."""

    @staticmethod
    def forward(ctx: object, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise RuntimeError(FIRST_DERIVATIVES_ONLY)


def _refuse_second_derivatives(outputs: tuple[Tensor, ...], *inputs: Tensor) -> None:
    """Autograd would give wrong ones, since the plan stands in the first derivatives as a constant.

    ``torch.func`` and ``torch.compile`` take no hooks: there it is for docs/gradients.md to say.
    """
    if is_compiling() or is_transformed():
        return

    def refuse(grad: Tensor) -> Tensor:
        return _Refusal.apply(grad, *inputs) if torch.is_grad_enabled() else grad

    for output in outputs:
        if output.requires_grad:
            output.register_hook(refuse)


def _centred_solve(
    plan: Tensor, rows: Tensor, columns: Tensor, excess_rows: Tensor, excess_columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-scaling changes (du, dv) that take the excess out of the plan's row and column sums.

    The rows are eliminated. What is left is singular along constants: ``columns columnsᵀ`` lifts that
    direction, which makes dv sum to zero under the weights ``columns``.
    """
    inverse_rows = torch.where(rows == 0, 0, 1 / torch.where(rows == 0, 1, rows))  # [B, N]
    scaled = plan * inverse_rows[:, :, None]  # [B, N, M], rows sum to one
    ridge = 10 * torch.finfo(plan.dtype).eps  # a plan that is a permutation leaves nothing but it
    diagonal = torch.where(columns == 0, 1, columns * (1 + ridge))
    system = torch.diag_embed(diagonal) - plan.mT @ scaled
    system = system + columns[:, :, None] * columns[:, None, :]
    right = excess_columns - (scaled * excess_rows[:, :, None]).sum(1)  # [B, M]
    dv = -torch.linalg.solve_ex(system, right[..., None])[0].squeeze(-1)
    du = -inverse_rows * excess_rows - (scaled * dv[:, None, :]).sum(2)
    return du, dv
