"""The causal language model that writes the caption, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lavcap.config import PretrainedLanguage, RandomLlama
from lavcap.precision import loaded_as
from lavcap.prompts import PROMPT_II, PROMPT_III, WORDINGS
from lavcap.published import published_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
PAD, START, END = "<pad>", "<s>", "</s>"


def build_tokenizer(
    config: PretrainedLanguage | RandomLlama, captions: Iterable[str] = (), folder: Path | None = None
) -> PreTrainedTokenizerBase:
    """The language model's own tokenizer, or, for a random model, one trained on ``captions``.

    A trained one is kept in ``folder``; if the folder already holds one, that one is used, so that a run resumed or
    evaluated has the ids it was trained with.

    Raises:
        ValueError: a random model's tokenizer is neither in ``folder`` nor are there captions to train it on.
    """
    from transformers import AutoTokenizer

    if isinstance(config, PretrainedLanguage):
        return AutoTokenizer.from_pretrained(config.name)
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return AutoTokenizer.from_pretrained(folder)
    captions = list(captions)
    if not captions:
        raise ValueError(f"language.kind random_llama needs captions to train its tokenizer on, or one in {folder}")
    tokenizer = _train_tokenizer(captions, config.vocabulary)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _train_tokenizer(captions: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of prompts and captions: any text can be written in it, and is read back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, len(alphabet) + 3),
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    prompts = [text for prompt in (*WORDINGS, PROMPT_II, PROMPT_III) for text in prompt.text]
    bpe.train_from_iterator([*prompts, *(f" {caption}" for caption in captions)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=START, eos_token=END)


def build_language_model(
    config: PretrainedLanguage | RandomLlama, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model with its weights, in the config's precision."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    dtype = getattr(torch, config.precision.value)
    if isinstance(config, PretrainedLanguage):
        return AutoModelForCausalLM.from_pretrained(config.name, **loaded_as(dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(_random_llama_config(config, tokenizer)).to(dtype)


def skeleton_language_model(config: PretrainedLanguage | RandomLlama) -> PreTrainedModel:
    """The model without weights, on the meta device; sizes of the published ones need no download."""
    from transformers import AutoModelForCausalLM

    sizes = language_config(config)
    with torch.device("meta"):
        # Eager: the others look into the mask, and here is nothing to see.
        model = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager")
    return model.to(getattr(torch, config.precision.value))


def language_config(config: PretrainedLanguage | RandomLlama) -> PretrainedConfig:
    """The sizes of the language model; no download for the published ones."""
    return published_config(config.name) if isinstance(config, PretrainedLanguage) else _random_llama_config(config)


def _random_llama_config(config: RandomLlama, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    from transformers import LlamaConfig

    special = {} if tokenizer is None else _special_ids(tokenizer)
    return LlamaConfig(
        vocab_size=config.vocabulary if tokenizer is None else len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        max_position_embeddings=1024,
        # Variance is kept from layer to layer. With the usual 0.02 a frozen head this narrow could never be sure of a
        # word: no logit could stand out by more than width * 0.02.
        initializer_range=config.width**-0.5,
        tie_word_embeddings=False,
        **special,
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
