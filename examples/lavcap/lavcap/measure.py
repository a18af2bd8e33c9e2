"""How much of a training step the fused step takes, timed on this machine's CPU at the paper's sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import otfuse
from lavcap.audio.encoder import load_audio_encoder
from lavcap.budget import CAPTION_TOKENS, FRAMES, PROMPT_TOKENS, SAMPLES
from lavcap.config import Config
from lavcap.language import language_config
from lavcap.lora import ENCODER_TARGETS, tune


class Share(NamedTuple):
    """Seconds of one step's parts, forward and backward, float32."""

    fused: float
    encoder: float
    layer: float  # one decoder layer, of which there are num_layers
    num_layers: int
    batch_size: int

    @property
    def share(self) -> float:
        return self.fused / (self.fused + self.encoder + self.num_layers * self.layer)

    def describe(self) -> str:
        return (
            f"measured here, float32, batch {self.batch_size}, {torch.get_num_threads()} thread(s), both passes: "
            f"fused step {1e3 * self.fused:.2f} ms; audio encoder {self.encoder:.2f} s; one decoder layer "
            f"{self.layer:.2f} s, times {self.num_layers}; the fused step is {100 * self.share:.4f} % of their sum "
            f"(embeddings, head and optimizer left out, which would lower it)"
        )


def measure_share(config: Config, rounds: int = 3) -> Share:
    """Time the parts with random weights: the whole language model would not fit most machines, one layer does.

    The layer is frozen and passes gradients through, as under LoRA, whose own products are left out.
    """
    batch = config.train.batch_size
    encoder = load_audio_encoder(replace(config.audio, checkpoint=None)).train()
    tune(encoder, config.audio.tuning, ENCODER_TARGETS)
    waveform, num_samples = torch.randn(batch, SAMPLES) * 0.1, torch.full((batch,), SAMPLES)
    audio = torch.randn(batch, 64, encoder.width, requires_grad=True)
    visual = torch.randn(batch, FRAMES, encoder.width)
    fuse = otfuse.nn.OTFusion(config.solver.epsilon, num_iters=config.solver.num_iters, backend=config.solver.backend)
    layer, num_layers, width = _decoder_layer(config)
    length = 64 + FRAMES + sum(PROMPT_TOKENS) + CAPTION_TOKENS
    hidden = torch.randn(batch, length, width, requires_grad=True)

    _check_fused(fuse, audio.detach(), visual)

    def fused_step() -> None:
        out = fuse(audio, visual)
        (out.tokens.square().mean() + out.loss).backward()

    return Share(
        _time(fused_step, 10 * rounds),
        _time(lambda: encoder(waveform, num_samples).tokens.square().mean().backward(), rounds),
        _time(lambda: layer(hidden).square().mean().backward(), rounds),
        num_layers,
        batch,
    )


def _check_fused(fuse: otfuse.nn.OTFusion, audio: torch.Tensor, visual: torch.Tensor) -> None:
    """A wrong answer is not worth timing: it must be the specification's, in float64."""
    exact = otfuse.nn.OTFusion(fuse.attention.epsilon, num_iters=fuse.attention.num_iters, backend="torch")
    for got, expected in zip(fuse(audio, visual), exact(audio.double(), visual.double())):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def _decoder_layer(config: Config) -> tuple[Callable[[torch.Tensor], torch.Tensor], int, int]:
    """One layer of a Llama of the config's sizes, as a function of hidden states alone."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = language_config(config.language)
    sizes._attn_implementation = "sdpa"
    layer: nn.Module = LlamaDecoderLayer(sizes, 0).requires_grad_(False)
    rotary = LlamaRotaryEmbedding(sizes)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        positions = rotary(hidden, torch.arange(hidden.shape[1])[None])
        out = layer(hidden, position_embeddings=positions)
        return out[0] if isinstance(out, tuple) else out

    return run, sizes.num_hidden_layers, sizes.hidden_size


def _time(step: Callable[[], None], rounds: int) -> float:
    step()  # compiles what has to be compiled
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
