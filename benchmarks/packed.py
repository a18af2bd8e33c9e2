"""Packed tokens of different lengths: the workload, what it must move, and its answer.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features; here N and M are the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import otfuse
from benchmarks import answers
from benchmarks.answers import ROWS_FIRST, Answer, Call, as_good_as, with_gradient
from benchmarks.cases import Case, Workload, lavcap
from otfuse._backends.base import attend_padded
from otfuse._backends.select import select
from otfuse._problem import SolveOptions, varlen_problem
from otfuse.testing import clustered_tokens

SHORTER = 5  # one clip in so many is shorter than the others, by sixteenths that follow one another without order

# What lengths a batch has, of both sides alike: ``lavcap`` is four clips in five of ten seconds, and the fifth shorter
# by sixteenths. AudioCaps cuts ten seconds out of a longer video, so only what begins within ten seconds of its end is
# shorter: one of the six clips of its test split that we have. ``uniform``: every length as often. ``one long``: an
# element of the longest among clips like those, which have a sixteenth and a 25th of its tokens. ``thousandfold``: one
# among elements of a token on either side, and of a few.
MIXES = "full", "lavcap", "uniform", "one long", "thousandfold"
MAIN = replace(lavcap(256), name="varlen")
WITH_LONG = {"one long": Case("varlen", 257, 1024, 512, 768), "thousandfold": Case("varlen", 128, 1024, 512, 64)}


@dataclass(frozen=True)
class PackedWorkload(Workload):
    """``case`` has the longest element; ``mix``, of MIXES, says what the others are."""

    mix: str = "lavcap"

    @classmethod
    def of(cls, mix: str, dtype: torch.dtype = torch.bfloat16, grad: str | None = None) -> PackedWorkload:
        return cls(WITH_LONG.get(mix, MAIN), dtype, grad, mix=mix)

    def __str__(self) -> str:
        return f"varlen {self.mix} {self.case} {self.dtype_name} {self.grad or 'forward'}"

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Of both sides of each element."""
        B, longest = self.case.B, (self.case.N, self.case.M)
        if self.mix == "full":
            return [longest] * B
        if self.mix == "uniform":
            return [_part(longest, 1 + 37 * element % longest[0], longest[0]) for element in range(B)]
        if self.mix == "thousandfold":
            return [longest] + [(1, 1) if i % 2 else (1 + i % 16, 1 + i % 7) for i in range(B - 1)]
        clip, first = (_part(longest, 1, 16)[0], _part(longest, 1, 25)[1]), [longest]
        if self.mix == "lavcap":
            clip, first = longest, []
        sixteenths = (16 if i % SHORTER else 1 + 7 * (i // SHORTER) % 16 for i in range(B - len(first)))
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

    def flops(self, iterations: float) -> int:
        """As ``Case.attend_flops``, of entries that both sides have."""
        alone = (replace(self.case, B=1, N=n, M=m) for n, m in self.lengths)
        return sum(case.attend_flops(self.grad, iterations) for case in alone)

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"lengths": self.mix, "valid": round(self.valid, 4)}

    def shrunk(self) -> PackedWorkload:
        return replace(self, case=replace(self.case, B=7, N=12, M=9, D=24, T=3))


def _part(longest: tuple[int, int], part: int, of: int) -> tuple[int, int]:
    N, M = longest
    return max(1, N * part // of), max(1, M * part // of)


def inputs_of(packed: PackedWorkload, device: torch.device) -> tuple[Tensor, ...]:
    """x, y, both offsets, and for a backward the gradients sent to the outputs."""
    case = packed.case
    padded = clustered_tokens(case.B, case.N, case.M, case.D)
    values, offsets = [], []
    for side, lengths in zip(padded, zip(*packed.lengths)):
        values.append(torch.cat([element[:length] for element, length in zip(side, lengths)]))
        offsets.append(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))
    generator = torch.Generator().manual_seed(1)
    sent = () if packed.grad is None else [torch.randn(value.shape, generator=generator) for value in values]
    x, y, *sent = (value.to(device, packed.dtype) for value in (*values, *sent))
    return x, y, *offsets, *sent


def ours(packed: PackedWorkload, backend: str) -> Call:
    case = packed.case

    def attend(x: Tensor, y: Tensor, *ends: Tensor) -> tuple[Tensor, Tensor]:
        out = otfuse.sinkhorn_attend_varlen(
            x, y, *ends, case.N, case.M, case.epsilon, num_iters=case.T, grad=packed.grad or "unroll", backend=backend
        )
        return out.x, out.y

    return _differentiated(packed, attend)


def padded(packed: PackedWorkload, backend: str) -> Call:
    """The same through a batch that is padded to the longest."""
    case = packed.case
    options = SolveOptions(case.epsilon, case.T, None, packed.grad or "unroll")

    def attend(x: Tensor, y: Tensor, *ends: Tensor) -> tuple[Tensor, Tensor]:
        problem = varlen_problem(x, y, *ends, case.N, case.M, None, None, options, "cosine", "plan", False)
        out = attend_padded(problem, select(problem, backend))
        return out.x, out.y

    return _differentiated(packed, attend)


def _differentiated(packed: PackedWorkload, attend: Call) -> Call:
    """Offsets stand between the tokens and the gradients sent."""

    def call(x: Tensor, y: Tensor, ends_x: Tensor, ends_y: Tensor, *sent: Tensor) -> Sequence[Tensor]:
        def of_tokens(x: Tensor, y: Tensor) -> Sequence[Tensor]:
            return attend(x, y, ends_x, ends_y)

        return with_gradient(of_tokens)(x, y, *sent) if packed.grad else of_tokens(x, y)

    return call


def dense(packed: PackedWorkload, backend: str) -> Call:
    """The padded operator on a batch of which every element is as long as the longest."""
    call = answers.ours(packed, backend)
    return with_gradient(call) if packed.grad else call


def fill(packed: PackedWorkload, *inputs: Tensor) -> list[Tensor]:
    """Tokens, and gradients, for ``dense``: those there are, over and over."""
    x, y, _, _, *sent = inputs
    case, sides = packed.case, []
    for tokens, length in zip((x, y, *sent), (case.N, case.M) * 2):
        count = case.B * length
        sides.append(tokens.repeat(-(-count // len(tokens)), 1)[:count].unflatten(0, (case.B, length)))
    return sides


class PackedAnswers:
    """What is right: the specification in float64, element by element; for other gradients the torch backend."""

    def __init__(self, packed: PackedWorkload, inputs: tuple[Tensor, ...]) -> None:
        exact = one_by_one(packed, inputs, torch.float64)
        residuals = [tensor.double() for tensor in (inputs[-2:] if packed.grad else inputs[:2])]
        self.answer = as_good_as(one_by_one(packed, inputs, packed.dtype), exact, residuals)

    def of(self, follows: str) -> Answer:
        return self.answer


def one_by_one(packed: PackedWorkload, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Dense calls in plain PyTorch, and their tokens, or gradients, one element's after the other's."""
    unrolled = packed.grad in (None, "unroll")
    call = answers.specified(packed, ROWS_FIRST) if unrolled else answers.ours(packed, "torch")
    if packed.grad:
        call = with_gradient(call)
    x, y, _, _, *sent = inputs
    sizes = [list(lengths) for lengths in zip(*packed.lengths)] * 2
    pieces = zip(*(tensor.to(dtype).split(lengths) for tensor, lengths in zip((x, y, *sent), sizes)))
    elements = [call(*(piece[None] for piece in element)) for element in pieces]
    return [torch.cat([element[side][0] for element in elements]) for side in (0, 1)]
