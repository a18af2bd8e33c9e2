"""Packed tokens of different lengths: what is measured, what it must move, and its answer.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features; here N and M are the longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from cases import Case
from measured import Answer
from peers import with_gradient
from torch import Tensor

import otfuse
from otfuse._problem import VarlenProblem
from otfuse.testing import clustered_tokens, specified_attend
from otfuse.varlen import attend_padded

SHORTER = 5  # one clip in so many is shorter than the others, by sixteenths that follow one another without order

# What lengths a batch has, of both sides alike: ``lavcap`` is four clips in five of ten seconds, and the fifth shorter
# by sixteenths. AudioCaps cuts ten seconds out of a longer video, so only what begins within ten seconds of its end is
# shorter: one of the six clips of its test split that we have. ``uniform``: every length as often. ``one long``: an
# item of the longest among clips like those, which have a sixteenth and a 25th of its tokens. ``thousandfold``: one
# among items of a token on either side, and of a few.
MIXES = "full", "lavcap", "uniform", "one long", "thousandfold"


@dataclass(frozen=True)
class Packed:
    """``case`` has the longest item; ``mix``, of MIXES, says what the others are."""

    case: Case
    dtype: torch.dtype = torch.bfloat16
    grad: str | None = None
    mix: str = "lavcap"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"varlen {self.mix} {self.case} {dtype} {self.grad or 'forward'}"

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Of both sides of each item."""
        B, longest = self.case.B, (self.case.N, self.case.M)
        if self.mix == "full":
            return [longest] * B
        if self.mix == "uniform":
            return [_part(longest, 1 + 37 * item % longest[0], longest[0]) for item in range(B)]
        if self.mix == "thousandfold":
            return [longest] + [(1, 1) if item % 2 else (1 + item % 16, 1 + item % 7) for item in range(B - 1)]
        clip, first = (_part(longest, 1, 16)[0], _part(longest, 1, 25)[1]), [longest]
        if self.mix == "lavcap":
            clip, first = longest, []
        sixteenths = (16 if item % SHORTER else 1 + 7 * (item // SHORTER) % 16 for item in range(B - len(first)))
        return first + [_part(clip, part, 16) for part in sixteenths]

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def valid(self) -> float:
        """The share of tokens in a batch that is padded to the longest."""
        return self.tokens / (self.case.B * (self.case.N + self.case.M))

    @property
    def traffic(self) -> int:
        """Bytes: as ``Case.attend_traffic``, of valid tokens alone, and the offsets, of 32 bits."""
        numbers = self.tokens * self.case.D * self.dtype.itemsize
        history = 2 * 4 * self.case.T * self.tokens if self.grad == "unroll" else 0
        offsets = 2 * 4 * (self.case.B + 1)
        return (2 if self.grad is None else 5) * numbers + history + offsets

    def flops(self, rounds: float) -> int:
        """As ``Case.attend_flops``, of entries that both sides have."""
        alone = (replace(self.case, B=1, N=n, M=m) for n, m in self.lengths)
        return sum(case.attend_flops(self.grad, rounds) for case in alone)

    @property
    def facts(self) -> dict[str, Any]:
        case = self.case
        return {
            "op": "attend", "size": case.name, "B": case.B, "N": case.N, "M": case.M, "D": case.D,
            "epsilon": case.epsilon, "dtype": str(self.dtype).removeprefix("torch."), "grad": self.grad, "tol": None,
            "tokens": "clustered", "lengths": self.mix, "valid": round(self.valid, 4),
        }  # fmt: skip

    def shrunk(self) -> Packed:
        return replace(self, case=replace(self.case, B=7, N=12, M=9, D=24, T=3))


def _part(longest: tuple[int, int], part: int, of: int) -> tuple[int, int]:
    N, M = longest
    return max(1, N * part // of), max(1, M * part // of)


def inputs_of(packed: Packed, device: torch.device) -> tuple[Tensor, ...]:
    """x, y, both offsets, and for a backward the gradients sent to the outputs."""
    case = packed.case
    padded = clustered_tokens(case.B, case.N, case.M, case.D)
    values, offsets = [], []
    for side, lengths in zip(padded, zip(*packed.lengths)):
        values.append(torch.cat([item[:length] for item, length in zip(side, lengths)]))
        offsets.append(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))
    generator = torch.Generator().manual_seed(1)
    sent = () if packed.grad is None else [torch.randn(value.shape, generator=generator) for value in values]
    x, y, *sent = (value.to(device, packed.dtype) for value in (*values, *sent))
    return x, y, *offsets, *sent


def ours(packed: Packed, backend: str) -> Any:
    case = packed.case

    def call(x: Tensor, y: Tensor, ends_x: Tensor, ends_y: Tensor, *sent: Tensor) -> Any:
        def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = otfuse.sinkhorn_attend_varlen(
                x, y, ends_x, ends_y, case.N, case.M, case.epsilon, num_iters=case.T,
                grad=packed.grad or "unroll", backend=backend,
            )  # fmt: skip
            return out.x, out.y

        return with_gradient(attend)(x, y, *sent) if packed.grad else attend(x, y)

    return call


def padded(packed: Packed, backend: str) -> Any:
    """The same through a batch that is padded to the longest."""
    case = packed.case

    def call(x: Tensor, y: Tensor, ends_x: Tensor, ends_y: Tensor, *sent: Tensor) -> Any:
        def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            problem = VarlenProblem(
                x, y, None, None, None, case.epsilon, case.T, None, packed.grad or "unroll", "cosine", "plan", False,
                cu_seqlens_x=ends_x, cu_seqlens_y=ends_y, max_seqlen_x=case.N, max_seqlen_y=case.M,
            )  # fmt: skip
            out = attend_padded(problem, backend)
            return out.x, out.y

        return with_gradient(attend)(x, y, *sent) if packed.grad else attend(x, y)

    return call


def dense(packed: Packed, backend: str) -> Any:
    """The padded operator on a batch of which every item is as long as the longest."""
    case = packed.case

    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = otfuse.sinkhorn_attend(
            x, y, case.epsilon, num_iters=case.T, grad=packed.grad or "unroll", backend=backend
        )
        return out.x, out.y

    return with_gradient(attend) if packed.grad else attend


def filled(packed: Packed, *inputs: Tensor) -> list[Tensor]:
    """Tokens, and gradients, for ``dense``: those there are, over and over."""
    x, y, _, _, *sent = inputs
    case, sides = packed.case, []
    for tokens, length in zip((x, y, *sent), (case.N, case.M) * 2):
        count = case.B * length
        sides.append(tokens.repeat(-(-count // len(tokens)), 1)[:count].unflatten(0, (case.B, length)))
    return sides


class Answers:
    """What is right: the specification in float64, item by item; of other gradients, the torch backend stands in."""

    def __init__(self, packed: Packed, inputs: tuple[Tensor, ...]) -> None:
        exact = one_by_one(packed, inputs, torch.float64)
        residuals = [tensor.double() for tensor in inputs[-2:] if packed.grad] or [t.double() for t in inputs[:2]]
        right = Answer(exact, residuals)
        plain = [tensor.double() for tensor in one_by_one(packed, inputs, packed.dtype)]
        size = max(float(e.norm() / (e - x).norm()) for e, x in zip(exact, residuals))
        allowed = 2 * right.error(plain) + torch.finfo(torch.float32).eps * size
        self.answer = Answer(exact, residuals, allowed, 2 * right.missing(plain) + 0.1)

    def of(self, follows: str) -> Answer:
        return self.answer


def one_by_one(packed: Packed, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Dense calls in plain PyTorch, and their tokens, or gradients, one item's after the other's."""
    case = packed.case

    def attend(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if packed.grad in (None, "unroll"):
            return specified_attend(x, y, case.epsilon, num_iters=case.T)[:2]
        out = otfuse.sinkhorn_attend(x, y, case.epsilon, num_iters=case.T, grad=packed.grad, backend="torch")
        return out.x, out.y

    call = with_gradient(attend) if packed.grad else attend
    x, y, _, _, *sent = inputs
    sizes = [list(lengths) for lengths in zip(*packed.lengths)] * 2
    pieces = zip(*(tensor.to(dtype).split(lengths) for tensor, lengths in zip((x, y, *sent), sizes)))
    items = [call(*(piece[None] for piece in item)) for item in pieces]
    return [torch.cat([item[side][0] for item in items]) for side in (0, 1)]
