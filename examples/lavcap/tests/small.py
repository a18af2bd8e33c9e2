"""A captioner of the real parts, small enough for a step in some tens of milliseconds, and clips for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from lavcap.captioner import load_captioner
from lavcap.checkpoint import CONFIG, TOKENIZER, save_trained
from lavcap.config import (
    AudioConfig,
    Average,
    BatchNorm,
    CEDFrontEnd,
    CEDSize,
    Config,
    DataConfig,
    GenerationConfig,
    LoRA,
    LossConfig,
    Precision,
    PromptSet,
    RandomCLIP,
    RandomLlama,
    Reduction,
    TrainConfig,
)
from lavcap.config_file import save_config
from lavcap.data.sample import SAMPLE_RATE, Sample
from lavcap.language import build_tokenizer
from lavcap.train import build_trainer, engine_arguments
from lavcap.trainer import Captioning
from torch.utils.data import Dataset

WORDS = [
    "a",
    "dog",
    "barks",
    "while",
    "rain",
    "falls",
    "and",
    "someone",
    "speaks",
    "near",
    "an",
    "engine",
    "that",
    "hums",
]


def small_config(output: Path, *, dropout: float = 0.1, **train: object) -> Config:
    """LoRA on both models, OT-Att, OT loss and several prompts; ``train`` replaces fields of its training section."""
    lora = LoRA(rank=2, alpha=4.0, dropout=dropout)
    settings = {
        "output": str(output),
        "epochs": 3.0,
        "warmup_epochs": 1.0,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "precision": Precision.FLOAT32,
        "log_steps": 1,
        "sample_captions": 0,
    }
    return Config(
        audio=AudioConfig(size=CEDSize.NANO, tuning=lora, spec_augment=None),
        visual=RandomCLIP(projection=8),
        language=RandomLlama(width=32, depth=1, heads=2, mlp=32, tuning=lora),
        prompts=PromptSet.MULTI,
        data=DataConfig(workers=0),
        train=replace(TrainConfig(), **(settings | train)),  # type: ignore[arg-type]
        generation=GenerationConfig(beams=2, max_new_tokens=8, batch_size=4),
    )


def write_checkpoint(folder: Path, config: Config) -> Path:
    """A checkpoint of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config.language, [" ".join(WORDS)], folder=folder / TOKENIZER)
    save_trained(load_captioner(config, tokenizer), folder)
    save_config(config, folder / CONFIG)
    return folder


class Clips(Dataset[Sample]):
    """Noise of different lengths, with one to three captions a clip."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = [self._make(clip, generator) for clip in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @staticmethod
    def _make(clip: int, generator: torch.Generator) -> Sample:
        length = SAMPLE_RATE // 2 + 1000 * (clip % 3)
        words = [WORDS[(clip * 5 + k) % len(WORDS)] for k in range(4 + clip % 3)]
        return Sample(
            clip_id=f"clip_{clip}",
            waveform=0.1 * torch.randn(length, generator=generator),
            visual=torch.randn(2 + clip % 2, 8, generator=generator),
            captions=tuple(" ".join(words[k:]) for k in range(1 + clip % 3)),
        )


def small_trainer(config: Config, clips: int = 8, validation: int = 3) -> Captioning:
    """A trainer ready to :func:`lavcap.train.run`; the same, to the bit, whenever it is made of the same config."""
    output = Path(config.train.output)
    output.mkdir(parents=True, exist_ok=True)
    arguments = engine_arguments(config)
    tokenizer = build_tokenizer(config.language, [" ".join(WORDS)])
    captioner = load_captioner(config, tokenizer)
    return build_trainer(config, arguments, captioner, tokenizer, Clips(clips), Clips(validation, seed=1))


def losses(trainer: Captioning) -> list[tuple[float, float, float]]:
    """Loss and its two parts at every update in the log."""
    return [(row["loss"], row["ce_loss"], row["ot_loss"]) for row in trainer.state.log_history if "ce_loss" in row]


def _per_clip(output: Path, batch: int) -> Config:
    return small_config(output, dropout=0.0, batch_size=batch, epochs=2.0, learning_rate=1e-3)


def _per_token(output: Path, batch: int) -> Config:
    config = replace(_per_clip(output, batch), loss=LossConfig(ce_average=Average.TOKEN, reduction=Reduction.SUM))
    return replace(config, train=replace(config.train, accumulation=2))


def _adapting(output: Path, batch: int) -> Config:
    config = _per_clip(output, batch)
    return replace(config, audio=replace(config.audio, front_end=CEDFrontEnd(batch_norm=BatchNorm.ADAPT)))


# What has to be shared between processes: averages over clips, over tokens, over frames. By name, of output and clips
# a process.
CASES = {"per_clip": _per_clip, "per_token": _per_token, "adapting": _adapting}
