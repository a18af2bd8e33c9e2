"""A training run: from a config and a prepared set to a folder of checkpoints, resumed where it was cut off."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.utils import is_torch_hpu_available, logging

from lavcap import checkpoint
from lavcap.captioner import load_captioner
from lavcap.config import Config, Engine, Precision
from lavcap.config_file import config_to_dict, load_config, save_config
from lavcap.data.dataset import PreparedDataset
from lavcap.data.prepare import check_disjoint
from lavcap.data.sample import Sample
from lavcap.files import alone_in
from lavcap.language import build_tokenizer
from lavcap.trainer import Cadence, Captioning, CaptionTrainer
from lavcap.visual import visual_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


# What may change when a run goes on: where things lie and what is shown, not what is computed.
FREE = (
    "data.folder",
    "data.workers",
    "generation",
    "train.output",
    "train.log_steps",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.sample_captions",
    "train.tracker",
)


def train(config: Config) -> Captioning:
    """Train, from the newest checkpoint in ``config.train.output`` if there is one.

    Returns:
        The trainer, whose ``state`` holds the log.

    Raises:
        ValueError: the output folder holds a run of another config or a damaged checkpoint, another training is at work
            there, or a setting is out of range.
        FileNotFoundError: the prepared set lacks a split.
    """
    check(config)
    clips, validation = open_sets(config)
    arguments = engine_arguments(config)
    output = Path(config.train.output)
    with ExitStack() as claimed:
        with arguments.main_process_first(desc="the run's folder"):
            if arguments.process_index == 0:
                claimed.enter_context(alone_in(output, "lavcap train"))
                claim(output, config)
            tokenizer = run_tokenizer(config, clips)
        captioner = load_captioner(config, tokenizer)
        if config.train.gradient_checkpointing:
            captioner.gradient_checkpointing_enable()
        trainer = build_trainer(config, arguments, captioner, tokenizer, clips, validation)
        run(trainer)
    return trainer


def run(trainer: Captioning) -> None:
    """Train to the end from wherever the output folder stands, and write the log there.

    Raises:
        ValueError: the checkpoint to go on from lacks a file or is damaged, or was written by another number of
            processes.
    """
    output, seed = Path(trainer.args.output_dir), trainer.config.train.seed
    latest = checkpoint.latest_checkpoint(output)
    if latest is not None:
        checkpoint.verify(latest)
        logger.warning("going on from %s", latest)
        before = len(list(latest.glob("rng_state*.pth")))
        if before != trainer.args.world_size:
            raise ValueError(
                f"{latest} was written by {before} processes and now there are {trainer.args.world_size}, which would "
                "share the clips out differently: start as many as before"
            )
    # Draws inside the model (dropout, masks) differ between processes; the order of clips does not.
    torch.manual_seed(seed + trainer.args.process_index)
    trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / checkpoint.RECORD))


def build_trainer(
    config: Config,
    arguments: TrainingArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    clips: Dataset[Sample],
    validation: Dataset[Sample],
) -> Captioning:
    """The trainer of the config's engine around ready parts.

    Raises:
        ValueError: the training set does not fill one batch on every process.
    """
    together = config.train.batch_size * arguments.world_size
    if len(clips) < together:  # type: ignore[arg-type]
        raise ValueError(
            f"{len(clips)} training clips do not fill one batch of {together} (train.batch_size times "  # type: ignore[arg-type]
            f"{arguments.world_size} processes): lower train.batch_size"
        )
    parts: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": clips,
        "eval_dataset": validation,
        "callbacks": [Cadence(config)],
    }
    if config.train.engine is Engine.OPTIMUM_HABANA:
        from lavcap.habana import gaudi_trainer

        return gaudi_trainer(config, tokenizer, parts)
    return CaptionTrainer(config, tokenizer, **parts)


def engine_arguments(config: Config) -> TrainingArguments:
    """Settings of the run in the words of the config's engine."""
    if config.train.engine is Engine.OPTIMUM_HABANA:
        from lavcap.habana import gaudi_arguments

        return gaudi_arguments(training_settings(config))
    return TrainingArguments(**training_settings(config))


def open_sets(config: Config) -> tuple[PreparedDataset, PreparedDataset]:
    """Training and validation set, from one picture encoder, no video in both (unless they are one split by name)."""
    data = config.data
    clips = PreparedDataset(data.folder, data.train_split)
    validation = PreparedDataset(data.folder, data.validation_split)
    check_disjoint({data.train_split: clips.clip_ids, data.validation_split: validation.clip_ids})
    for prepared in (clips, validation):
        prepared.check_visual(visual_fingerprint(config.visual))
    if data.train_split == data.validation_split:
        logger.warning("validation is on the training clips: it shows what was memorised and nothing else")
    return clips, validation


def run_tokenizer(config: Config, clips: PreparedDataset) -> PreTrainedTokenizerBase:
    """The tokenizer, kept in the run's folder; a random language model's is trained on the run's captions first."""
    target = Path(config.train.output) / checkpoint.TOKENIZER
    if not target.exists():
        captions = (caption for clip in range(len(clips)) for caption in clips[clip].captions)
        folder = checkpoint.start_folder(target)
        build_tokenizer(config.language, captions).save_pretrained(folder)
        checkpoint.finish_folder(target)
    return build_tokenizer(config.language, folder=target)


def training_settings(config: Config) -> dict[str, Any]:
    """Our settings in the words of ``TrainingArguments``, those that transformers 4.55 and 5 share."""
    train = config.train
    return {
        "output_dir": train.output,
        "num_train_epochs": train.epochs,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "optim": "adamw_torch",
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.beta1,
        "adam_beta2": train.beta2,
        "max_grad_norm": train.max_gradient_norm or 0.0,
        "bf16": train.precision is Precision.BFLOAT16,
        "fp16": train.precision is Precision.FLOAT16,
        # Said outright: several processes meet on a CPU only if asked to.
        "use_cpu": not (torch.accelerator.is_available() or is_torch_hpu_available()),
        "torch_compile": train.compile,
        "seed": train.seed,
        "data_seed": train.seed,
        "dataloader_drop_last": True,  # every update is of one size, however many processes share it
        "dataloader_num_workers": config.data.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Workers that lived on would spare later epochs a draw, which a resumed run makes: its dropout would differ.
        "dataloader_persistent_workers": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": train.log_steps,
        "logging_nan_inf_filter": False,
        "report_to": train.tracker.value,
    }


def claim(output: Path, config: Config) -> None:
    """Make the run's folder, or see that what stands there is the same run, and clear away what a kill left."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_unfinished(output)
    path = output / checkpoint.CONFIG
    if checkpoint.latest_checkpoint(output) is not None:
        differing = differences(load_config(path), config)
        if differing:
            raise ValueError(
                f"{output} holds a run of another config, which differs in {', '.join(differing)}: name another "
                "--output, or remove that folder"
            )
    folder = checkpoint.start_folder(output / "config")
    save_config(config, folder / checkpoint.CONFIG)
    os.replace(folder / checkpoint.CONFIG, path)
    folder.rmdir()


def differences(before: Config, now: Config) -> list[str]:
    """Settings, as ``section.key``, that a run may not change on its way."""
    old, new = flat(config_to_dict(before)), flat(config_to_dict(now))
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(FREE)]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary of ``section.key``."""
    items: dict[str, Any] = {}
    for key, value in settings.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def check(config: Config) -> None:
    """Raise ``ValueError`` for settings that no run can have."""
    settings, data = config.train, config.data
    for name in ("epochs", "batch_size", "accumulation", "log_steps", "validate_epochs", "keep_checkpoints"):
        if getattr(settings, name) <= 0:
            raise ValueError(f"train.{name} must be positive, got {getattr(settings, name)}")
    if settings.checkpoint_steps is not None and settings.checkpoint_steps <= 0:
        raise ValueError(f"train.checkpoint_steps must be positive or null, got {settings.checkpoint_steps}")
    if not 0 <= settings.warmup_epochs < settings.epochs:
        raise ValueError(
            f"train.warmup_epochs must be from 0 to below train.epochs, {settings.epochs}; got {settings.warmup_epochs}"
        )
    if data.validation_split == data.test_split != data.train_split:
        raise ValueError(
            f"data.validation_split and data.test_split are both '{data.test_split}': the checkpoint would be chosen "
            "on the test set, as in the public code; name the validation split"
        )
