"""The ops of the kernels for Gaudi: schemas, fake kernels, derivatives, batching rules.

One op of the namespace ``otfuse_tpc`` for each kernel of ``kernels/tpc``: tensors in the kernel's order, then its
scalars, and the outputs come back. What runs behind them is the emulator on CPU tensors and the built library on a
Gaudi's. ``sinkhorn_history`` is differentiable, by the kernels ``unroll`` and ``implicit``, and ``unroll`` again, by
way of plain PyTorch.

Letters: B items, N rows, M columns, T rounds, K rounds kept, H numbers of a kept round. Matrices come transposed,
[B, M, N]: the kernels' lanes run along the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otfuse._attention import Marginals
from otfuse._backends.base import Solution
from otfuse._backends.torch.solver import solve
from otfuse._ops import FIRST_DERIVATIVES_ONLY, Derivatives, batched, no_infinity, second_order

Sizes = dict[str, int]
VALUES = ("values", "plan", "grad_plan", "grad_values")  # float32 or bfloat16, as the first; all else is float32
MOST_VECTORS = 300  # of 256 bytes, of the local memory that a kernel may fill


class Kernel(NamedTuple):
    """What a kernel takes and gives. A tensor is ``name:sizes``, a size being a letter or a digit."""

    inputs: str
    outputs: str
    scalars: str  # name:type, or name:type:letter where it is a size
    index_space: Callable[[Sizes], list[int]]  # members per dimension
    items_last: bool = False


def _items(sizes: Sizes) -> list[int]:
    return [sizes["B"]]


_PROBLEM = "values:BMN a:BN b:BM form:B1"
_SOLUTION = "plan:BMN f:BN g:BM report:B2"
_SOLVE = "scale:float num_iters:int:T tol:float"
_SOLVED = f"{_PROBLEM} report:B2 history:BKH grad_plan:BMN grad_f:BN grad_g:BM"
_GRADIENTS = "grad_values:BMN grad_a:BN grad_b:BM"
KERNELS = {
    "survey": Kernel("values:BMN a:BN b:BM", "form:B1", "scale:float", _items),
    "sinkhorn": Kernel(_PROBLEM, _SOLUTION, _SOLVE, _items),
    "sinkhorn_history": Kernel(_PROBLEM, f"{_SOLUTION} history:BKH", f"{_SOLVE} kept:int:K", _items),
    "unroll": Kernel(
        _SOLVED, _GRADIENTS, "scale:float slice:int:S", lambda s: [ceil_div(ceil_div(s["M"], 4), s["S"]), s["B"]]
    ),
    "implicit": Kernel(_SOLVED, _GRADIENTS, "scale:float steps:int", _items),
    "small": Kernel(
        "values:NMB a:NB b:MB", "plan:NMB f:NB g:MB report:2B", f"{_SOLVE} fold_every:int",
        lambda s: [ceil_div(s["B"], 64)], items_last=True,
    ),
}  # fmt: skip


def ceil_div(size: int, unit: int) -> int:
    return -(-size // unit)


def vectors(N: int, M: int) -> tuple[int, int]:
    """Vectors of local memory for an item's matrix, in tiles of 16 x 4, and for one number of each row and column."""
    column_tiles = ceil_div(M, 4)
    return ceil_div(N, 16) * column_tiles, ceil_div(N, 64) + ceil_div(column_tiles, 16)


def history_slots(num_iters: int, implicit: bool) -> int:
    """Rounds that the history has room for. As many as are run say ``unroll``, another number ``implicit``."""
    if not implicit:
        return num_iters
    return 1 if num_iters > 1 else 2


def unroll_slice(N: int, M: int) -> int:
    """Column tiles that one member of ``unroll`` works on, beside the matrix."""
    matrix, sides = vectors(N, M)
    row_tiles = ceil_div(N, 16)
    return min(ceil_div(M, 4), (MOST_VECTORS - matrix - 8 * sides) // row_tiles)


def fits(N: int, M: int, grad: str) -> bool:
    """Whether an item and what its gradient needs fit in local memory."""
    matrix, sides = vectors(N, M)
    if grad == "unroll":
        return matrix + 8 * sides + ceil_div(N, 16) <= MOST_VECTORS
    return matrix + (8 if grad == "implicit" else 4) * sides <= MOST_VECTORS


def new_outputs(name: str, args: tuple[Any, ...]) -> tuple[list[Tensor], Sizes]:
    """Room for a kernel's outputs, and what each letter stands for."""
    kernel = KERNELS[name]
    inputs, scalars = kernel.inputs.split(), kernel.scalars.split()
    sizes: Sizes = {}
    for declaration, tensor in zip(inputs, args):
        letters = declaration.partition(":")[2]
        sizes.update(zip(letters, tensor.shape))
    for declaration, value in zip(scalars, args[len(inputs) :]):
        if declaration.count(":") == 2:
            sizes[declaration[-1]] = value
    if "N" in sizes and "M" in sizes:
        sizes["H"] = 128 * (ceil_div(sizes["N"], 64) + ceil_div(sizes["M"], 64))
    outputs = []
    for declaration in kernel.outputs.split():
        output, _, letters = declaration.partition(":")
        shape = [int(letter) if letter.isdigit() else sizes[letter] for letter in letters]
        outputs.append(args[0].new_empty(shape, dtype=args[0].dtype if output in VALUES else torch.float32))
    return outputs, sizes


def schema(name: str) -> str:
    """As :func:`torch.library.define` takes it."""
    kernel = KERNELS[name]
    arguments = [f"Tensor {declaration.partition(':')[0]}" for declaration in kernel.inputs.split()]
    arguments += ["{1} {0}".format(*declaration.split(":")) for declaration in kernel.scalars.split()]
    results = [f"Tensor {declaration.partition(':')[0]}" for declaration in kernel.outputs.split()]
    return f"{name}({', '.join(arguments)}) -> ({', '.join(results)})"


def _fake(name: str) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        outputs, _ = new_outputs(name, args)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return fake


library = torch.library.Library("otfuse_tpc", "FRAGMENT")
for _name in KERNELS:
    library.define(schema(_name))
    torch.library.register_fake(f"otfuse_tpc::{_name}", _fake(_name), lib=library)


class _Sinkhorn(Derivatives):
    """Of ``sinkhorn_history``, and of ``sinkhorn`` for a transform's gradient, which could not be foreseen."""

    library = library

    def __init__(self, name: str) -> None:
        self.name = name

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, a, b, form, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, a, b, form, *output[3:])

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scale, num_iters, tol, *kept = ctx.options
        values, a, b, form, report, *history = ctx.saved_tensors
        if not history:
            *_, report, kept_history = torch.ops.otfuse_tpc.sinkhorn_history(
                values, a, b, form, scale, num_iters, tol, num_iters
            )
            kept, history = [num_iters], [kept_history]
        like = (values, a, b)
        incoming = [torch.zeros_like(t) if grad is None else grad.contiguous() for t, grad in zip(like, grads)]
        solved = (values, a, b, form, report, history[0], *incoming, scale)
        N, M = a.shape[1], b.shape[1]
        if kept[0] == num_iters:
            gradients = torch.ops.otfuse_tpc.unroll(*solved, unroll_slice(N, M))
        else:
            gradients = torch.ops.otfuse_tpc.implicit(*solved, min(N, M) + 20)
        return (*gradients, None, *[None] * len(ctx.options))


class _Unroll(Derivatives):
    """Of ``unroll``, by way of plain PyTorch."""

    name, library = "unroll", library

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, a, b, _, report, history, *grads, ctx.scale, _ = inputs
        ctx.num_iters = history.shape[1]
        ctx.save_for_backward(values, a, b, *grads, report)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *saved, report = ctx.saved_tensors

        def solution(values: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            outputs = _rounds_in_plain_pytorch(values.float(), a, b, ctx.scale, ctx.num_iters, report[:, 1])
            return outputs[0].to(values.dtype), *outputs[1:]

        of_inputs, of_incoming = second_order(solution, saved[:3], saved[3:], grads)
        return (*of_inputs, None, None, None, *of_incoming, None, None)


def _rounds_in_plain_pytorch(
    values: Tensor, a: Tensor, b: Tensor, scale: float, num_iters: int, rounds: Tensor
) -> tuple[Tensor, ...]:
    """Plan [B, M, N], f and g after each item's own number of ``rounds`` [B], in logarithms."""

    def solver(log_kernel: Tensor, a: Tensor, b: Tensor) -> Solution:
        log_a, log_b = (torch.where(w == 0, -torch.inf, torch.where(w == 0, 1, w).log()) for w in (a, b))
        log_u, log_v = torch.zeros_like(a), torch.where(b == 0, -torch.inf, torch.zeros_like(b))
        for t in range(num_iters):
            active = (t < rounds)[:, None]
            new_u = log_a - torch.logsumexp(log_kernel + log_v[:, None, :], 2)
            new_v = log_b - torch.logsumexp(log_kernel + new_u[:, :, None], 1)
            log_u, log_v = torch.where(active, new_u, log_u), torch.where(active, new_v, log_v)
        plan = torch.exp(log_kernel + log_u[:, :, None] + log_v[:, None, :])
        return Solution(plan, log_u / abs(scale), log_v / abs(scale), rounds, rounds)

    plan, f, g, *_ = solve(solver, scale * values.mT, Marginals(a, b, masked=True))
    return plan.mT, no_infinity(f), no_infinity(g)


class _Implicit(Derivatives):
    """Of ``implicit``: none."""

    name, library = "implicit", library

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(FIRST_DERIVATIVES_ONLY)


def _batched_items_last(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    """vmap by folding the extra dimension into the items, which are the last dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        folded = []
        for value, dim in zip(args, in_dims):
            if isinstance(value, Tensor):
                spread = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
                value = spread.movedim(0, -2).flatten(-2)
            folded.append(value)
        outputs = [o.unflatten(-1, (info.batch_size, -1)).movedim(-2, 0) for o in op(*folded)]
        return tuple(outputs), (0,) * len(outputs)

    return rule


for _derivatives in (_Sinkhorn("sinkhorn"), _Sinkhorn("sinkhorn_history"), _Unroll(), _Implicit()):
    _derivatives.register()
for _name in ("survey", "small"):  # without a gradient
    _op = getattr(torch.ops.otfuse_tpc, _name)
    _batch = _batched_items_last if KERNELS[_name].items_last else batched
    torch.library.register_vmap(_op.default, _batch(_op), lib=library)
