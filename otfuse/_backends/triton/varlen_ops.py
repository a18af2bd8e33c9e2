"""The op of packed tokens: schema, fake kernels, derivatives, batching rules; as ``ops.py`` for padded ones.

``otfuse::sinkhorn_attend_varlen_triton`` returns everything packed but the plan, which is [B, longest_x, longest_y].

Letters: B batch, D features, T_x and T_y tokens of all items one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otfuse._backends.base import attend_padded
from otfuse._backends.torch.backend import TorchBackend
from otfuse._backends.triton import ops as fused_ops
from otfuse._backends.triton.ops import KEPT, SOLUTION, history_rows, new_gradients
from otfuse._ops import NUMBERS, OPTIONS, WITH_NUMBERS, SecondDerivatives, argument_names, library, solve_options
from otfuse._problem import VarlenProblem, solve_dtype
from otfuse.kernels.constants import DETACH

PACKED = "Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor cu_seqlens_x, Tensor cu_seqlens_y"
ATTEND = f"{PACKED}, SymInt longest_x, SymInt longest_y, bool cosine, bool barycentric, {OPTIONS}"

library.define(
    f"sinkhorn_attend_varlen_triton({ATTEND}, bool history, bool plan) "
    f"-> (Tensor x, Tensor y, Tensor plan, {SOLUTION})",
    tags=WITH_NUMBERS,
)
library.define(
    f"sinkhorn_attend_varlen_triton_backward({ATTEND}, {KEPT}, Tensor? grad_x, Tensor? grad_y, Tensor? grad_plan, "
    "Tensor? grad_f, Tensor? grad_g) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=WITH_NUMBERS,
)


def history_length(B: int, tokens: int, num_iters: int, grad: int) -> int:
    """Numbers kept of all items, one item's after the other's: each as in ``fused_ops.new_solution``."""
    return 2 * B + history_rows(num_iters, grad) * tokens


def new_outputs(
    x: Tensor, y: Tensor, B: int, longest_x: int, longest_y: int, num_iters: int, grad: int, history: bool, plan: bool
) -> tuple[Tensor, ...]:
    """Room for all outputs; plan and history are empty unless wanted."""
    dtype = solve_dtype(x.dtype)
    kept = history_length(B, x.shape[0] + y.shape[0], num_iters, grad) if history else 0
    return (
        x.new_empty(x.shape), y.new_empty(y.shape),
        x.new_empty((B if plan else 0, longest_x, longest_y), dtype=dtype),
        x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(y.shape[:1], dtype=dtype),
        x.new_empty((B,), dtype=dtype), x.new_empty((B,), dtype=torch.int32), x.new_empty((kept,), dtype=dtype),
    )  # fmt: skip


@torch.library.register_fake("otfuse::sinkhorn_attend_varlen_triton")
def _(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cu_seqlens_x: Tensor, cu_seqlens_y: Tensor,
    longest_x: int, longest_y: int, cosine: bool, barycentric: bool, numbers: Tensor, num_iters: int,
    grad: int, history: bool, plan: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return new_outputs(x, y, cu_seqlens_x.shape[0] - 1, longest_x, longest_y, num_iters, grad, history, plan)


@torch.library.register_fake("otfuse::sinkhorn_attend_varlen_triton_backward")
def _(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return new_gradients(x, y, a, b)


class _AttendVarlen(fused_ops._Attend):
    """Of ``sinkhorn_attend_varlen_triton``."""

    name = "sinkhorn_attend_varlen_triton"
    tensors = 6  # x, y, a, b, cu_seqlens_x, cu_seqlens_y
    options = 7  # longest_x, longest_y, cosine, barycentric, OPTIONS
    outputs = 5  # x, y, plan, f, g
    matrices = (False,)

    def constants(self, output: tuple[Tensor, ...], grad: int) -> Sequence[Tensor]:
        return output[2:5] if grad == DETACH else ()

    def plain(self, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Tensor, ...]:
        x, y, a, b, cu_seqlens_x, cu_seqlens_y = inputs
        longest_x, longest_y, cosine, barycentric, *solving = options
        assert x is not None and y is not None and cu_seqlens_x is not None and cu_seqlens_y is not None
        problem = VarlenProblem(
            x, y, None, a, b, solve_options(*solving),
            "cosine" if cosine else "dot", "barycentric" if barycentric else "plan", True,
            cu_seqlens_x=cu_seqlens_x, cu_seqlens_y=cu_seqlens_y, max_seqlen_x=longest_x, max_seqlen_y=longest_y,
        )  # fmt: skip
        out = attend_padded(problem, TorchBackend())
        assert out.plan is not None
        return out.x, out.y, out.plan.to(problem.solve_dtype), out.f, out.g


def _batched(op: Any) -> Any:
    """vmap by packing the copies one after the other: offsets of the next go on where those of the last end."""
    has_copies = [argument not in NUMBERS for argument in argument_names(op)]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        copies = info.batch_size
        spread = [
            (value.expand(copies, *value.shape) if dim is None else value.movedim(dim, 0))
            if isinstance(value, Tensor) and copied else value
            for copied, value, dim in zip(has_copies, args, in_dims)
        ]  # fmt: skip
        folded = [
            value.flatten(0, 1) if isinstance(value, Tensor) and copied else value
            for copied, value in zip(has_copies, spread)
        ]
        for place, tokens in ((4, spread[0]), (5, spread[1])):
            folded[place] = _joined(spread[place], tokens.shape[1])
        outputs = op(*folded)
        unfolded = tuple(o.unflatten(0, (copies, o.shape[0] // copies)) for o in outputs)
        return unfolded, (0,) * len(outputs)

    return rule


def _joined(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[copies, B+1] to [copies B + 1]."""
    starts = tokens * torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
    moved = cu_seqlens + starts[:, None]
    return torch.cat((moved[:, :-1].flatten(), moved[-1:, -1]))


_AttendVarlen().register(_batched)
SecondDerivatives(_AttendVarlen()).register(_batched)
