"""Captions of a prepared split by beam search, and the plans that they were written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavcap.checkpoint import Checkpoint
from lavcap.config import GenerationConfig
from lavcap.data.dataset import PreparedDataset
from lavcap.data.sample import RawBatch, collate
from lavcap.fusion import FusionOutput
from lavcap.prompts import test_prompt
from lavcap.trainer import as_model_batch
from lavcap.visual import visual_fingerprint


class Written(NamedTuple):
    """A caption, and how sound and picture were fused for it."""

    caption: str
    plan: Tensor | None  # [N, M] float32 on the CPU, of the clip's own tokens; None: not fused by optimal transport


class CaptionedClip(NamedTuple):
    clip_id: str
    caption: str
    references: Sequence[str]
    plan: Tensor | None  # as in Written


def caption_clips(
    checkpoint: Checkpoint, clips: PreparedDataset, generation: GenerationConfig, workers: int = 0
) -> Iterator[CaptionedClip]:
    """Every clip of a split, in its order.

    Raises:
        ValueError: the split's features are of another picture encoder than the captioner was trained with.
    """
    clips.check_visual(visual_fingerprint(checkpoint.config.visual))
    loader: DataLoader[Any] = DataLoader(
        clips, generation.batch_size, collate_fn=collate, num_workers=workers, multiprocessing_context=_context(workers)
    )
    with tqdm(total=len(clips), desc="captions", unit="clip") as bar:
        for batch in loader:
            written = caption_batch(checkpoint, batch, generation)
            bar.update(len(written))
            for clip_id, (caption, plan), references in zip(batch.clip_ids, written, batch.captions):
                yield CaptionedClip(clip_id, caption, references, plan)


@torch.no_grad()
def caption_batch(checkpoint: Checkpoint, batch: RawBatch, generation: GenerationConfig) -> list[Written]:
    """One caption a clip."""
    captioner, tokenizer, config = checkpoint
    prompts = [test_prompt(config.prompts)] * len(batch.clip_ids)
    device = next(captioner.parameters()).device
    inputs = send_to_device(as_model_batch(tokenizer, batch, prompts, None), device)
    text = {name: inputs.pop(name) for name in ("prompt_ids", "prompt_masks")}
    fused = captioner.fuse(**inputs)
    captions = captioner.write(fused, **text, generation=generation)
    return [Written(caption, plan) for caption, plan in zip(captions, _plans(fused))]


def _plans(fused: FusionOutput) -> list[Tensor | None]:
    """Of each clip, without what pads it."""
    if fused.plan is None:
        return [None] * len(fused.tokens)
    rows, columns = fused.mask[:, : fused.num_audio], fused.mask[:, fused.num_audio :]
    return [plan[own][:, seen].float().cpu() for plan, own, seen in zip(fused.plan, rows, columns)]


def _context(workers: int) -> str | None:
    return "spawn" if workers else None  # a fork would copy the threads of the captioner's device
