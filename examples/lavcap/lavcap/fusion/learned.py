"""The fusions with parameters that Table III compares OT-Att with. The paper gives no sizes; those here are ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavcap.config import CrossAttention, JointEncoder, QFormer
from lavcap.fusion.base import Fusion, FusionOutput


class QFormerFusion(Fusion):
    """Learned queries, which attend to each other and to both sequences; they are what the language model sees."""

    def __init__(self, width: int, kind: QFormer) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(kind.queries, width).normal_(std=0.02))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, kind.heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(kind.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        tokens, mask = _in_a_row(audio, audio_mask, visual, visual_mask)
        queries = self.queries.expand(audio.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, memory_key_padding_mask=~mask)
        seen = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
        return FusionOutput(self.norm(queries), seen, None, None)


class JointEncoderFusion(Fusion):
    """A transformer encoder over both sequences in a row."""

    def __init__(self, width: int, kind: JointEncoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, kind.heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(kind.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        tokens, mask = _in_a_row(audio, audio_mask, visual, visual_mask)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=~mask)
        return FusionOutput(self.norm(tokens), mask, None, audio.shape[1])


class CrossAttentionFusion(Fusion):
    """Sound attends to the picture, added to itself; the sound's tokens are what the language model sees."""

    def __init__(self, width: int, kind: CrossAttention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, kind.heads, batch_first=True)

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        has_frames = visual_mask.any(1)[:, None]  # [B, 1]
        visual = visual.to(audio.dtype)
        # Over no frames at all a softmax is NaN: let it run over all, and leave its result out.
        attended, _ = self.attention(
            audio, visual, visual, key_padding_mask=~(visual_mask | ~has_frames), need_weights=False
        )
        return FusionOutput(audio + attended.where(has_frames[..., None], 0), audio_mask, None, None)


def _in_a_row(audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((audio, visual.to(audio.dtype)), 1), torch.cat((audio_mask, visual_mask), 1)
