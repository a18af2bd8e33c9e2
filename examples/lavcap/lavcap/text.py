"""Prompts and captions as token ids.

Letters: B clips, P tokens of a piece of prompt, T tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavcap.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that no loss is taken of


def encode_text(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], captions: Sequence[str] | None
) -> dict[str, Any]:
    """The text side of a model batch, one prompt and (for training) one caption a clip.

    Returns:
        prompt_ids: a [B, P] tensor for each piece of text around the slots, padded on the left, so that what a slot
            holds and what a caption starts with follow directly; prompt_masks: bool, same shapes; with captions also
            labels [B, T]: the caption and the end-of-sequence token, IGNORED behind it.

    Raises:
        ValueError: prompts with different slots in one batch, or a tokenizer that cannot continue a prompt.
    """
    if len({prompt.slots for prompt in prompts}) != 1:
        raise ValueError(f"one batch holds prompts with the same slots; got {sorted({str(p.slots) for p in prompts})}")
    if captions is not None and len(captions) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many captions; got {len(captions)}")
    pieces = [_ids(tokenizer, piece) for piece in zip(*(prompt.text for prompt in prompts))]
    bos = tokenizer.bos_token_id
    if bos is not None:
        pieces[0] = [[bos, *ids] for ids in pieces[0]]
    padded = [_pad_left(ids) for ids in pieces]
    batch: dict[str, Any] = {
        "prompt_ids": tuple(ids for ids, _ in padded),
        "prompt_masks": tuple(mask for _, mask in padded),
    }
    if captions is not None:
        batch["labels"] = _labels(tokenizer, [prompt.text[-1] for prompt in prompts], captions)
    return batch


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _labels(tokenizer: PreTrainedTokenizerBase, before: Sequence[str], captions: Sequence[str]) -> Tensor:
    """[B, T]. A caption is tokenised behind its prompt: tokenizers differ in what they make of the blank between."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end-of-sequence token, so no caption could end")
    rows = []
    whole = _ids(tokenizer, [f"{text} {' '.join(caption.split())}" for text, caption in zip(before, captions)])
    for prompt_ids, ids, text in zip(_ids(tokenizer, before), whole, before):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(f"{type(tokenizer).__name__} joins the end of the prompt {text!r} with the caption")
        rows.append(torch.tensor([*ids[len(prompt_ids) :], tokenizer.eos_token_id]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def _pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask
