"""What captioning adds to a ``Trainer``: how a batch is worded, how losses are averaged, what is kept.

Letters: B clips, T tokens of a caption, V words of the vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import save_fsdp_optimizer, send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, get_cosine_schedule_with_warmup

from lavcap import checkpoint
from lavcap.config import Average, Config, Reduction
from lavcap.config_file import save_config
from lavcap.data.sample import RawBatch, collate
from lavcap.draws import draw
from lavcap.prompts import test_prompt, training_prompts
from lavcap.text import IGNORED, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers import Trainer as AnyTrainer
else:
    AnyTrainer = object  # which one it is mixed into is not known here

CAPTION_LOG = "captions.jsonl"


class Counts(NamedTuple):
    """What the parts of the loss are averages over."""

    clips: Tensor  # scalar, as are the others
    tokens: Tensor  # of captions
    pairs: Tensor  # clips with both sound and picture, which the OT loss is over

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Counts:
        labels, both = batch["labels"], (batch["num_samples"] > 0) & (batch["num_frames"] > 0)
        clips = torch.tensor(float(len(labels)), device=labels.device)
        return cls(clips, (labels != IGNORED).sum().float(), both.sum().float())


class Captioning(AnyTrainer):
    """Mixed in before a ``Trainer``, transformers' own or Gaudi's; takes a :class:`RawBatch`, writes small checkpoints.

    The loss is that of the global batch (all processes, all steps of an accumulation), so that a run's losses do not
    depend on how that batch was split.
    """

    lr_scheduler: Any
    control: Any

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        self.config = config
        super().__init__(data_collator=collate, processing_class=tokenizer, **options)
        refuse_sharding(self.accelerator.state)
        self.model_accepts_loss_kwargs = True  # the Trainer then leaves the averaging to compute_loss
        self._parts = torch.zeros(2)  # cross-entropy and OT loss, added up since the log's last line
        self._updates = 0  # since then

    def get_batch_samples(
        self, epoch_iterator: Iterator[RawBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The batches of one update, worded, and the :class:`Counts` of all of them on all processes."""
        self._updates += 1
        batches = [self.word(raw, self.state.global_step) for raw in islice(epoch_iterator, num_batches)]
        counts = torch.stack([torch.stack(Counts.of(batch)) for batch in batches]).sum(0).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    get_batch_samples_transformers = get_batch_samples  # what GaudiTrainer's loop calls it

    def word(self, raw: RawBatch, step: int) -> dict[str, Any]:
        """A model batch: each clip with a prompt and one of its captions, drawn by seed, step and clip."""
        prompts, seed = training_prompts(self.config.prompts), self.config.train.seed
        return as_model_batch(
            self.processing_class,
            raw,
            [prompts[draw(len(prompts), seed, step, f"prompt {clip}")] for clip in raw.clip_ids],
            [caps[draw(len(caps), seed, step, clip)] for clip, caps in zip(raw.clip_ids, raw.captions)],
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output, loss = model(**inputs), self.config.loss
        here, everywhere = Counts.of(inputs), Counts(*num_items_in_batch)
        words = "clips" if loss.ce_average is Average.ITEM else "tokens"
        ce = output.ce_loss * (getattr(here, words) / getattr(everywhere, words))
        ot = torch.zeros_like(ce)
        if output.ot_loss is not None:
            share = here.pairs / everywhere.pairs.clamp(min=1)
            ot = output.ot_loss * (share if loss.reduction is Reduction.MEAN else 1.0)
        # Gradients are averaged over processes, of which each holds a share of a sum.
        processes = self.accelerator.num_processes
        self._parts = self._parts.to(ce.device) + torch.stack([ce.detach(), ot.detach()]) * processes
        total = (loss.ce_weight * ce + loss.ot_weight * ot) * processes
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with both parts of the training loss."""
        if "loss" in logs:
            ce, ot = (self.accelerator.reduce(self._parts, "mean") / self._updates).tolist()
            logs |= {"ce_loss": ce, "ot_loss": ot}
            self._parts, self._updates = torch.zeros_like(self._parts), 0
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up over the config's first epochs, then half a cosine down to zero."""
        if self.lr_scheduler is None:
            train = self.config.train
            warmup = round(num_training_steps * train.warmup_epochs / train.epochs)
            self.lr_scheduler = get_cosine_schedule_with_warmup(
                optimizer or self.optimizer, num_warmup_steps=warmup, num_training_steps=num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[RawBatch]:
        """Every clip of the validation set; the Trainer's would leave out what fills no batch, as training does."""
        clips = self.eval_dataset if eval_dataset is None else eval_dataset
        workers = self.args.dataloader_num_workers
        loader = DataLoader(clips, batch_size=self.args.eval_batch_size, collate_fn=collate, num_workers=workers)
        return self.accelerator.prepare(loader)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Cross-entropy, averaged over a clip's captions and then over clips, none of which counts twice."""
        self.model.eval()
        losses = [
            self.accelerator.gather_for_metrics(self._clip_losses(raw))
            for raw in self.get_eval_dataloader(eval_dataset)
        ]
        metrics = {f"{metric_key_prefix}_loss": torch.cat(losses).mean().item()}
        self.log(dict(metrics))
        self._log_captions()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _clip_losses(self, raw: RawBatch) -> Tensor:
        """[B]. As many passes as the clip with most captions needs, on every process, since a sharded model is one."""
        counts = torch.tensor([len(captions) for captions in raw.captions], device=raw.waveform.device)
        losses = torch.zeros(len(counts), device=counts.device)
        for turn in range(int(self.accelerator.gather(counts).max())):
            captions = [captions[turn % len(captions)] for captions in raw.captions]
            prompts = [test_prompt(self.config.prompts)] * len(captions)
            batch = self._prepare_inputs(as_model_batch(self.processing_class, raw, prompts, captions))
            losses += caption_losses(self.model(**batch).logits, batch["labels"]) * (turn < counts)
        return losses / counts

    def _log_captions(self) -> None:
        """Captions of a few validation clips, in the terminal and in a file of one JSON object a line."""
        clips = self.eval_dataset
        samples = [clips[index] for index in range(min(self.config.train.sample_captions, len(clips)))]
        if not samples:
            return
        raw = collate(samples)
        batch = as_model_batch(self.processing_class, raw, [test_prompt(self.config.prompts)] * len(samples), None)
        with torch.no_grad(), self.accelerator.autocast():
            captions = self.model.generate(**self._prepare_inputs(batch), generation=self.config.generation)
        if not self.is_world_process_zero():
            return
        with open(Path(self.args.output_dir) / CAPTION_LOG, "a", encoding="utf-8") as file:
            for sample, caption in zip(samples, captions):
                row = {"step": self.state.global_step, "clip_id": sample.clip_id, "caption": caption}
                file.write(json.dumps(row | {"reference": sample.captions[0]}) + "\n")
                tqdm.write(f"{sample.clip_id}: {caption}")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; unlike the Trainer's, never in another dtype, as sound in half precision is noise."""
        return send_to_device(inputs, self.args.device)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """One folder, complete from the moment that it has its name; see :mod:`lavcap.checkpoint`."""
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        unfinished = checkpoint.unfinished(folder)
        if self.is_world_process_zero():
            checkpoint.start_folder(folder)
        self.accelerator.wait_for_everyone()
        checkpoint.save_trained(self.model, unfinished, write=self.is_world_process_zero())
        self._save_optimizer_and_scheduler(str(unfinished))
        self._save_rng_state(str(unfinished))
        if self.is_world_process_zero():
            save_config(self.config, unfinished / checkpoint.CONFIG)
            self.processing_class.save_pretrained(unfinished / checkpoint.TOKENIZER)
            self.state.save_to_json(os.fspath(unfinished / checkpoint.RECORD))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoint.write_checksums(unfinished)
            checkpoint.finish_folder(folder)
            checkpoint.keep_newest(run, self.config.train.keep_checkpoints, best=self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's, which would write all of a sharded model, frozen weights and all, beside the optimiser."""
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.is_world_process_zero():
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        elif self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's, which would miss the frozen weights in a DeepSpeed checkpoint."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_trained(self.model if model is None else model, Path(resume_from_checkpoint))


class CaptionTrainer(Captioning, Trainer):
    """transformers' Trainer for captioning."""


class Cadence(TrainerCallback):
    """Validates every so many epochs instead of every one, and saves further checkpoints within long epochs."""

    def __init__(self, config: Config) -> None:
        self.train = config.train

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = state.epoch == round(state.epoch)  # then saved after its validation, once
        control.should_save |= self._further(state) and not ends_epoch

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = round(state.epoch) % self.train.validate_epochs == 0 or state.global_step >= state.max_steps
        control.should_evaluate = due
        control.should_save = due or self._further(state)

    def _further(self, state: Any) -> bool:
        return self.train.checkpoint_steps is not None and state.global_step % self.train.checkpoint_steps == 0


def refuse_sharding(state: Any) -> None:
    """Raise ``ValueError`` for ways to share weights out that our checkpoints would not survive."""
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"FSDP {fsdp.fsdp_version} hides weights: set fsdp_version: 2, as in accelerate/fsdp.yaml")
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError("DeepSpeed's ZeRO-3 is not supported: set zero_stage: 2, or take accelerate/fsdp.yaml")


def as_model_batch(
    tokenizer: PreTrainedTokenizerBase, raw: RawBatch, prompts: list[Any], captions: list[str] | None
) -> dict[str, Any]:
    """Arguments of ``Captioner.forward`` (with captions) or ``Captioner.generate``, on the device of ``raw``."""
    fields = ("waveform", "num_samples", "visual", "num_frames")
    text = send_to_device(encode_text(tokenizer, prompts, captions), raw.waveform.device)
    return {name: getattr(raw, name) for name in fields} | text


def caption_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] float32: mean cross-entropy of each caption's tokens, of logits [B, T, V] and labels [B, T]."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (labels != IGNORED).sum(1)
