"""What every fusion takes and returns.

Letters: B clips, N sound tokens, M picture tokens, L tokens out, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class FusionOutput(NamedTuple):
    tokens: Tensor  # [B, L, D]
    mask: Tensor  # [B, L] bool: tokens that the language model may see
    loss: Tensor | None  # the OT loss, unweighted; None without one
    num_audio: int | None  # how many tokens, from the front, are the sound's; None where they are mixed
    plan: Tensor | None = None  # [B, N, M]: how the tokens were fused, where that was by optimal transport


class Fusion(nn.Module):
    """``forward(audio [B, N, D], audio_mask [B, N], visual [B, M, D], visual_mask [B, M]) -> FusionOutput``.

    A token whose mask is False takes no part in any other's result.
    """

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        raise NotImplementedError
