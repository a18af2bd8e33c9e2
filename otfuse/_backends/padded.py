"""Packed tokens as a padded batch, and back, on the device.

Letters: B batch, T tokens of the whole batch, one batch element after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """Where each packed token stands in the padded batch, worked out on the device."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()  # [B]
        places = torch.arange(max_seqlen, device=cu_seqlens.device)
        source = starts[:, None] + places  # [B, max_seqlen], in the packed tokens
        self.fits = ends - starts <= max_seqlen  # [B]
        self.valid = source < ends[:, None]
        self.source = source.clamp(0, max(total - 1, 0))
        tokens = torch.arange(total, device=cu_seqlens.device)
        self.element = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True).clamp(0, max(len(starts) - 1, 0))
        self.place = (tokens - starts[self.element] if len(starts) else tokens).clamp(0, max(max_seqlen - 1, 0))

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, D] to [B, max_seqlen, D]."""
        if not len(tokens):
            return tokens.new_zeros(*self.valid.shape, tokens.shape[1])
        return tokens[self.source]

    def pad_weights(self, weights: Tensor | None) -> Tensor:
        """[T] to [B, max_seqlen]; a mask stays one."""
        if weights is None or not len(weights):
            return self.valid
        return torch.where(self.valid, weights[self.source], 0 if weights.dtype != torch.bool else False)

    def pack(self, padded: Tensor, fits: Tensor) -> Tensor:
        """[B, max_seqlen, ...] to [T, ...]; NaN for a batch element that was cut off."""
        if not len(self.element):
            return padded.flatten(0, 1)[:0]
        packed = padded[self.element, self.place]
        whole = fits[self.element]
        return torch.where(whole[:, None] if packed.dim() == 2 else whole, packed, torch.nan)
