"""Small encoders, the package's fusion, and a small Llama that writes the caption.

Letters: B clips, R rows of sound patches over frequency, N sound tokens, M frames, D width, T caption tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lavcap.captioner import cross_entropy
from lavcap.config import Average, Config
from lavcap.fusion import build_fusion
from lavcap.study.task import NUM_BANDS, NUM_FRAMES, NUM_WINDOWS, PICTURE
from lavcap.study.words import CAPTION_LENGTH, START, WORDS


@dataclass(frozen=True)
class Sizes:
    width: int = 48
    heads: int = 4
    mlp: int = 96
    depth: int = 2  # decoder layers
    patch: tuple[int, int] = (4, 2)  # bands and windows a sound patch


class SoundEncoder(nn.Module):
    """Patches of the spectrogram to tokens; rows over frequency averaged where ``pool``, as after CED."""

    def __init__(self, sizes: Sizes, pool: bool) -> None:
        super().__init__()
        self.patch = sizes.patch
        self.rows, self.columns = NUM_BANDS // sizes.patch[0], NUM_WINDOWS // sizes.patch[1]
        self.pool = pool
        self.embed = nn.Linear(sizes.patch[0] * sizes.patch[1], 2 * sizes.width)
        self.row_place = _places(self.rows, 2 * sizes.width)
        self.net = nn.Sequential(nn.GELU(), nn.Linear(2 * sizes.width, sizes.width))
        self.time_place = _places(self.columns, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)

    def features(self, spectrogram: Tensor) -> Tensor:
        """[B, bands, windows] to [B, R, columns, D], without a place in time."""
        high, wide = self.patch
        patches = spectrogram.unfold(1, high, high).unfold(2, wide, wide).flatten(3)  # [B, R, columns, patch]
        return self.net(self.embed(patches) + self.row_place[:, None])

    def forward(self, spectrogram: Tensor) -> Tensor:
        """[B, bands, windows] to [B, N, D], N being columns, or rows times columns."""
        features = self.features(spectrogram)
        features = features.mean(1, keepdim=True) if self.pool else features
        return self.norm(features + self.time_place).flatten(1, 2)


class PictureEncoder(nn.Module):
    """Each frame by itself to one token, as CLIP does, and then its place in time."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        pixels = 3 * PICTURE[0] * PICTURE[1]
        self.net = nn.Sequential(nn.Linear(pixels, 2 * sizes.width), nn.GELU(), nn.Linear(2 * sizes.width, sizes.width))
        self.time_place = _places(NUM_FRAMES, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)

    def features(self, pictures: Tensor) -> Tensor:
        """[B, M, 3, height, width] to [B, M, D], without a place in time."""
        return self.net(pictures.flatten(2))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.norm(self.features(pictures) + self.time_place)


class StudyOutput(NamedTuple):
    ce_loss: Tensor
    ot_loss: Tensor | None


class StudyCaptioner(nn.Module):
    """What is not the fusion's is drawn first, so that it is the same for every fusion under one seed."""

    def __init__(self, config: Config, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        self.audio = SoundEncoder(sizes, config.audio.pool_frequency)
        self.visual = PictureEncoder(sizes)
        self.projector = nn.Linear(sizes.width, sizes.width)
        self.language = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=sizes.width,
                intermediate_size=sizes.mlp,
                num_hidden_layers=sizes.depth,
                num_attention_heads=sizes.heads,
                max_position_embeddings=256,
                initializer_range=sizes.width**-0.5,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        self.fusion = build_fusion(config, sizes.width)

    def forward(self, spectrogram: Tensor, pictures: Tensor, captions: Tensor) -> StudyOutput:
        prefix, ot_loss = self._prefix(spectrogram, pictures)
        before = torch.cat((torch.full_like(captions[:, :1], START), captions[:, :-1]), 1)
        logits = self._logits(prefix, before)[:, -captions.shape[1] :]
        return StudyOutput(cross_entropy(logits, captions, Average.ITEM), ot_loss)

    @torch.no_grad()
    def generate(self, spectrogram: Tensor, pictures: Tensor) -> Tensor:
        """[B, CAPTION_LENGTH]: the likeliest word each time, given those already written."""
        prefix, _ = self._prefix(spectrogram, pictures)
        ids = torch.full((len(prefix), 1), START)
        for _ in range(CAPTION_LENGTH):
            ids = torch.cat((ids, self._logits(prefix, ids)[:, -1:].argmax(2)), 1)
        return ids[:, 1:]

    @torch.no_grad()
    def share_places(self) -> None:
        """Every sound token gets the place in time of the frame that it is heard in."""
        places = self.audio.time_place
        places.copy_(self.visual.time_place.repeat_interleave(len(places) // NUM_FRAMES, 0))

    def encode(self, spectrogram: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio(spectrogram), self.visual(pictures)

    def _prefix(self, spectrogram: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        audio, visual = self.encode(spectrogram, pictures)
        fused = self.fusion(audio, _all(audio), visual, _all(visual))
        return self.projector(fused.tokens), fused.loss

    def _logits(self, prefix: Tensor, ids: Tensor) -> Tensor:
        embeds = torch.cat((prefix, self.language.get_input_embeddings()(ids)), 1)
        return self.language(inputs_embeds=embeds, use_cache=False).logits


def _all(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def _places(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, width))
