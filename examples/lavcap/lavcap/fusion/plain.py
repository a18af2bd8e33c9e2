"""Fusions without a parameter and without a plan: one modality alone, or both in a row (Table II)."""

from __future__ import annotations

import torch
from torch import Tensor

from lavcap.fusion.base import Fusion, FusionOutput


class AudioOnlyFusion(Fusion):
    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        return FusionOutput(audio, audio_mask, None, audio.shape[1])


class VisualOnlyFusion(Fusion):
    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        return FusionOutput(visual, visual_mask, None, 0)


class ConcatenationFusion(Fusion):
    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        tokens = torch.cat((audio, visual), 1)
        return FusionOutput(tokens, torch.cat((audio_mask, visual_mask), 1), None, audio.shape[1])
