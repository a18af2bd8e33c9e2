"""Captions of a prepared split by beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavcap.checkpoint import Checkpoint
from lavcap.config import GenerationConfig
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import RawBatch, collate
from lavcap.prompts import test_prompt
from lavcap.trainer import as_model_batch
from lavcap.visual import visual_fingerprint


def caption_clips(
    checkpoint: Checkpoint, clips: PreparedDataset, generation: GenerationConfig, workers: int = 0
) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Clip id, caption and references of each clip, in the split's order.

    Raises:
        ValueError: the split's features are of another picture encoder than the captioner was trained with.
    """
    clips.check_visual(visual_fingerprint(checkpoint.config.visual))
    loader: DataLoader[Any] = DataLoader(
        clips, generation.batch_size, collate_fn=collate, num_workers=workers, multiprocessing_context=_context(workers)
    )
    with tqdm(total=len(clips), desc="captions", unit="clip") as bar:
        for batch in loader:
            captions = caption_batch(checkpoint, batch, generation)
            bar.update(len(captions))
            yield from zip(batch.clip_ids, captions, batch.captions)


def caption_batch(checkpoint: Checkpoint, batch: RawBatch, generation: GenerationConfig) -> list[str]:
    """One caption a clip."""
    captioner, tokenizer, config = checkpoint
    prompts = [test_prompt(config.prompts)] * len(batch.clip_ids)
    inputs = as_model_batch(tokenizer, batch, prompts, None)
    device = next(captioner.parameters()).device
    return captioner.generate(**send_to_device(inputs, device), generation=generation)


def _context(workers: int) -> str | None:
    return "spawn" if workers else None  # a fork would copy the threads of the captioner's device
