"""Packed tokens on a host that may look at their lengths: dense batches of items of equal lengths, and no padding.

Letters: B batch, D features, T tokens of all items one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from otfuse._problem import Problem, SinkhornAttendOutput, VarlenProblem

# Bytes of tokens that it takes as long to sort as a dense call takes besides its items, some 0.2 ms. Where items are
# sorted, equal ones are one call. 256 of up to 64 x 20 on one thread, forward: D = 768, 171 kB for each call saved, 60
# ms sorted and 50 as they came; D = 64, 14 kB, 15 and 32 (AMD EPYC virtual machine, 2 cores, torch 2.13.0, 2026-11-24).
WORTH_A_CALL = 128 * 1024


def can_read(offsets: Tensor) -> bool:
    """Whether numbers on a CPU may be looked at: not while a graph is traced, nor where ``vmap`` has many of them."""
    is_batched = torch._C._functorch.is_batchedtensor
    return not is_compiling() and type(offsets) is Tensor and not is_batched(offsets)


Attend = Callable[[Problem], SinkhornAttendOutput]  # of dense items


def attend_by_length(problem: VarlenProblem, attend: Attend) -> SinkhornAttendOutput:
    """Every item as it is solved alone, those of equal lengths together: all, or those that follow one another.

    There is one item at least.

    Raises:
        ValueError: the offsets decrease, or do not end with the tokens.
    """
    assert problem.x is not None and problem.y is not None
    starts_x = _checked("x", problem.cu_seqlens_x, len(problem.x))
    starts_y = _checked("y", problem.cu_seqlens_y, len(problem.y))
    lengths = [(x[1] - x[0], y[1] - y[0]) for x, y in zip(pairwise(starts_x), pairwise(starts_y))]
    order = list(range(len(lengths)))
    saved = sum(1 for one, other in pairwise(lengths) if one != other) + 1 - len(set(lengths))
    if problem.x.nbytes + problem.y.nbytes < saved * WORTH_A_CALL:
        order.sort(key=lambda item: lengths[item])
    batches = [(NM, len(list(items))) for NM, items in groupby(lengths[item] for item in order)]
    lengths_x, lengths_y = [(count, N) for (N, _), count in batches], [(count, M) for (_, M), count in batches]
    of_x, of_y = _Sorted(starts_x, order, lengths_x), _Sorted(starts_y, order, lengths_y)
    tokens = zip(of_x.split(problem.x), of_y.split(problem.y))
    weights = zip(
        [None] * len(lengths_x) if problem.a is None else of_x.split(problem.a),
        [None] * len(lengths_y) if problem.b is None else of_y.split(problem.b),
    )
    solved = [_solve(problem, attend, *batch, *weighed) for batch, weighed in zip(tokens, weights)]
    x, y, plan, f, g, error, rounds = zip(*solved)
    of_items = _Sorted(range(len(order) + 1), order, [])
    return SinkhornAttendOutput(
        of_x.join([values.flatten(0, 1) for values in x]), of_y.join([values.flatten(0, 1) for values in y]),
        of_items.join(plan) if problem.return_plan else None,
        of_x.join([values.flatten() for values in f]), of_y.join([values.flatten() for values in g]),
        of_items.join(error), of_items.join(rounds),
    )  # fmt: skip


def _checked(side: str, offsets: Tensor, total: int) -> list[int]:
    starts: list[int] = offsets.tolist()
    if starts[0] != 0 or starts[-1] != total or any(end < start for start, end in pairwise(starts)):
        raise ValueError(f"cu_seqlens_{side} must not decrease, from 0 to T_{side} = {total}; got {starts}")
    return starts


class _Sorted:
    """One side of all items in another order, in batches of equal lengths, and back."""

    def __init__(self, starts: Sequence[int], order: list[int], batches: list[tuple[int, int]]) -> None:
        """``starts`` [B+1] of items as they came; ``batches``: how many items of which length, in their order."""
        self.batches = batches
        self.places, self.back = None, None  # None: they came so
        if order != list(range(len(order))):
            self.places = torch.cat([torch.arange(starts[item], starts[item + 1], device="cpu") for item in order])
            self.back = torch.empty_like(self.places)
            self.back[self.places] = torch.arange(len(self.places), device="cpu")

    def split(self, values: Tensor) -> list[Tensor]:
        """[T, ...] to a [B, N, ...] for every batch."""
        values = values if self.places is None else values.index_select(0, self.places)
        pieces = values.split([count * length for count, length in self.batches])
        return [piece.unflatten(0, batch) for piece, batch in zip(pieces, self.batches)]

    def join(self, values: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(values)) if len(values) > 1 else values[0]
        return joined if self.back is None else joined.index_select(0, self.back)


def _solve(
    problem: VarlenProblem, attend: Attend, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None
) -> SinkhornAttendOutput:
    """Items of N and of M tokens. The plan is padded to what was announced; where that is less, all is NaN."""
    out = attend(problem.dense(x, y, a, b))
    beyond = problem.max_seqlen_x - x.shape[1], problem.max_seqlen_y - y.shape[1]
    if out.plan is not None:  # a negative number takes off
        plan = pad(out.plan, (0, beyond[1], 0, beyond[0]))
        out = out._replace(plan=torch.where(out.marginal_error.isnan()[:, None, None], torch.nan, plan))
    if min(beyond) >= 0:
        return out
    never = torch.zeros((), dtype=torch.bool, device=out.x.device)  # gradients are zero
    names = [name for name, values in out._asdict().items() if values is not None and name != "num_iters"]
    return out._replace(**{name: torch.where(never, getattr(out, name), torch.nan) for name in names})
