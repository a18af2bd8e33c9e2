"""Sizes of the published models that the paper uses, so that they can be counted without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA_2_7B = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf")
CLIP_L14 = "openai/clip-vit-large-patch14"


def published_config(name: str) -> PretrainedConfig:
    """The configuration of the model ``name``: built in for the paper's, read from a folder or the hub for others."""
    from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

    if name in LLAMA_2_7B and not Path(name).is_dir():
        return LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    if name == CLIP_L14 and not Path(name).is_dir():
        return CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
            image_size=224,
            projection_dim=768,
        )
    return AutoConfig.from_pretrained(name)
