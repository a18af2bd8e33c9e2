"""CED, the audio encoder of the paper: a vision transformer over 16 x 16 patches of a log-mel spectrogram.

Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024. Written from the published
sizes and weight names; :mod:`lavcap.audio.ced_weights` reads the published checkpoints.

Letters: B clips, K = 64 mel bins, F frames, T patches along time, L = 4 T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavcap.audio.front_ends import NUM_MELS, PATCH, Spectrogram
from lavcap.config import BatchNorm, CEDSize

NUM_CLASSES = 527  # AudioSet's, of the head that the checkpoints carry
NUM_ROWS = NUM_MELS // PATCH


class CEDShape(NamedTuple):
    width: int
    depth: int
    heads: int


SHAPES = {
    CEDSize.TINY: CEDShape(192, 12, 3),
    CEDSize.MINI: CEDShape(256, 12, 4),
    CEDSize.SMALL: CEDShape(384, 12, 6),
    CEDSize.BASE: CEDShape(768, 12, 12),
    CEDSize.NANO: CEDShape(64, 2, 2),
}


class MelBatchNorm(nn.BatchNorm1d):
    """Batch norm over mel bins whose statistics come from the clips' own frames only, and which can be truly frozen.

    A frozen one uses the statistics it was loaded with under ``train()`` too: the public code calls ``eval()`` once,
    which the next ``train()`` undoes, so that its "frozen" statistics move. Processes that train together share one
    mean and variance, those of all their clips, which carry no gradient: nothing before them is trained.
    """

    momentum: float  # these four are never None here
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_mels: int, statistics: BatchNorm, momentum: float) -> None:
        super().__init__(num_mels, momentum=momentum)
        self.statistics = statistics

    def forward(self, mel: Tensor, own: Tensor) -> Tensor:  # type: ignore[override]
        """mel [B, K, F]; own [B, F]: the frames that count."""
        if not self.training or self.statistics is BatchNorm.FROZEN:
            return self._scale(mel, self.running_mean, self.running_var)
        weight = own[:, None].to(mel.dtype)  # [B, 1, F]
        with torch.no_grad():
            count = _over_processes(weight.sum()).clamp_min(1)
            mean = _over_processes((mel * weight).sum((0, 2))) / count
            var = _over_processes(((mel - mean[:, None]).square() * weight).sum((0, 2))) / count
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp_min(1), self.momentum)
        return self._scale(mel, mean, var)

    def _scale(self, mel: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        slope = self.weight * torch.rsqrt(var + self.eps)
        return mel * slope[:, None] + (self.bias - mean * slope)[:, None]


def _over_processes(share: Tensor) -> Tensor:
    """The sum of all processes' shares."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(share)
    return share


class Attention(nn.Module):
    """Self-attention. The checkpoints' fused ``qkv`` is three projections here, so that LoRA can take two of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], mask [B, 1, 1, L]: tokens that may be attended to."""
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, L, D / heads]
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, stride=PATCH)

    def forward(self, mel: Tensor) -> Tensor:
        """mel [B, K, F] -> [B, D, 4, T]; frames of an unfinished patch are dropped."""
        return self.proj(mel[:, None])


class AudioTokens(NamedTuple):
    """What :class:`CED` returns."""

    tokens: Tensor  # [B, L, D], or [B, T, D] when pooled; zero where the mask is False
    mask: Tensor  # the same without D: tokens that are the clip's own


class CED(nn.Module):
    """Spectrogram to tokens, in frequency-major order (token ``f * T + t``), or averaged over the four rows.

    Args:
        shape: width, depth and heads.
        max_patches: length of the position embedding along time: 63 in the checkpoints, 64 for LAVCap's front end.
        batch_norm, momentum: what the statistics of the batch norm do while training, and how fast.
        pool_frequency: average the four tokens of a moment.
    """

    def __init__(
        self,
        shape: CEDShape,
        max_patches: int,
        batch_norm: BatchNorm,
        pool_frequency: bool = True,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.width = shape.width
        self.pool_frequency = pool_frequency
        self.gradient_checkpointing = False
        self.init_bn = MelBatchNorm(NUM_MELS, batch_norm, momentum)
        self.patch_embed = PatchEmbed(shape.width)
        self.time_pos_embed = nn.Parameter(torch.empty(1, shape.width, 1, max_patches).normal_(std=0.02))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, shape.width, NUM_ROWS, 1).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(self, spectrogram: Spectrogram) -> AudioTokens:
        mel, num_frames, num_patches = spectrogram
        own = torch.arange(mel.shape[2], device=mel.device) < num_frames[:, None]  # [B, F]
        x = self.patch_embed(self.init_bn(mel, own))  # [B, D, 4, T]
        size = x.shape[3]
        x = x + self.time_pos_embed[..., :size] + self.freq_pos_embed
        x = x.flatten(2).mT  # [B, 4 T, D]
        moments = torch.arange(size, device=mel.device) < num_patches[:, None]  # [B, T]
        mask = moments.repeat(1, NUM_ROWS)  # [B, 4 T]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask[:, None, None], use_reentrant=False)
            else:
                x = block(x, mask[:, None, None])
        x = self.norm(x)
        if self.pool_frequency:
            x, mask = x.unflatten(1, (NUM_ROWS, size)).mean(1), moments
        return AudioTokens(x.where(mask[..., None], 0), mask)
