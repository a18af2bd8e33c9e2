"""The captioner: sound and picture to tokens, tokens between the pieces of a prompt, a language model that goes on.

Letters: B clips, S samples, F frames, V and D widths of picture and sound features, P and T tokens of prompt and
caption, H width of the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lavcap.audio.ced import MelBatchNorm
from lavcap.audio.encoder import AudioEncoder, load_audio_encoder
from lavcap.config import AudioOnly, Average, BatchNorm, Config, GenerationConfig, VisualOnly
from lavcap.fusion import FusionOutput, build_fusion
from lavcap.language import build_language_model, skeleton_language_model
from lavcap.lora import ENCODER_TARGETS, tune
from lavcap.prompts import Slot, test_prompt
from lavcap.text import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class CaptionerOutput(ModelOutput):
    """What :meth:`Captioner.forward` returns; without labels only ``logits``, of the first caption token."""

    loss: Tensor | None = None  # ce_weight * ce_loss + ot_weight * ot_loss
    ce_loss: Tensor | None = None
    ot_loss: Tensor | None = None  # None where there is no OT loss
    logits: Tensor | None = None  # [B, T, vocabulary]: row t is what comes t-th


class Captioner(nn.Module):
    """Built by :func:`load_captioner`, or, to be counted only, by :func:`skeleton_captioner`."""

    def __init__(
        self,
        config: Config,
        language: PreTrainedModel,
        audio: AudioEncoder | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        super().__init__()
        self.settings = config
        self.tokenizer = tokenizer
        width = config.visual.projection if audio is None else audio.width
        self.fusion = build_fusion(config, width)
        self.audio = audio
        same = config.visual.projection == width or isinstance(config.fusion, AudioOnly)
        # The paper's encoders have one width; a smaller CED needs the picture brought to its own.
        self.visual_adapter = None if same else nn.Linear(config.visual.projection, width)
        self.projector = nn.Linear(width, language.config.hidden_size)
        self.language = language
        self.slots = test_prompt(config.prompts).slots
        accepted = inspect.signature(language.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.keeps_logits = "logits_to_keep" in accepted

    def forward(
        self,
        waveform: Tensor,
        num_samples: Tensor,
        visual: Tensor,
        num_frames: Tensor,
        prompt_ids: tuple[Tensor, ...],
        prompt_masks: tuple[Tensor, ...],
        labels: Tensor | None = None,
    ) -> CaptionerOutput:
        """The losses of a batch.

        Args:
            waveform: [B, S] at 16 kHz; num_samples: [B].
            visual: [B, F, V], CLIP's projected features; num_frames: [B].
            prompt_ids, prompt_masks, labels: from :func:`lavcap.text.encode_text`.
        """
        fused = self.fuse(waveform, num_samples, visual, num_frames)
        embeds, mask = self._prompted(fused, prompt_ids, prompt_masks)
        if labels is None:
            return CaptionerOutput(logits=self._logits(embeds, mask, 1))
        before = labels[:, :-1]  # each caption token is predicted from those before it
        embeds = torch.cat((embeds, self._embed(before.clamp_min(0)).to(embeds.dtype)), 1)
        mask = torch.cat((mask, before != IGNORED), 1)
        logits = self._logits(embeds, mask, labels.shape[1])
        ce_loss = cross_entropy(logits, labels, self.settings.loss.ce_average)
        loss = self.settings.loss.ce_weight * ce_loss
        if fused.loss is not None:
            loss = loss + self.settings.loss.ot_weight * fused.loss
        return CaptionerOutput(loss, ce_loss, fused.loss, logits)

    @torch.no_grad()
    def generate(
        self,
        waveform: Tensor,
        num_samples: Tensor,
        visual: Tensor,
        num_frames: Tensor,
        prompt_ids: tuple[Tensor, ...],
        prompt_masks: tuple[Tensor, ...],
        generation: GenerationConfig,
        labels: Tensor | None = None,
    ) -> list[str]:
        """Captions by beam search; a clip's ends with its own end-of-sequence token. ``labels`` are not looked at."""
        fused = self.fuse(waveform, num_samples, visual, num_frames)
        return self.write(fused, prompt_ids, prompt_masks, generation)

    @torch.no_grad()
    def write(
        self,
        fused: FusionOutput,
        prompt_ids: tuple[Tensor, ...],
        prompt_masks: tuple[Tensor, ...],
        generation: GenerationConfig,
    ) -> list[str]:
        """:meth:`generate` from where :meth:`fuse` ends."""
        from transformers import GenerationConfig as Settings

        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("a captioner without a tokenizer cannot write; build it with load_captioner")
        end = tokenizer.eos_token_id
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        embeds, mask = self._prompted(fused, prompt_ids, prompt_masks)
        ids = self.language.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            generation_config=Settings(
                num_beams=generation.beams,
                max_new_tokens=generation.max_new_tokens,
                length_penalty=generation.length_penalty,
                do_sample=False,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=end,
                pad_token_id=pad,
            ),
        )
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def fuse(self, waveform: Tensor, num_samples: Tensor, visual: Tensor, num_frames: Tensor) -> FusionOutput:
        """Sound and picture as the tokens that the projector takes."""
        visual_mask = torch.arange(visual.shape[1], device=visual.device) < num_frames[:, None]  # [B, F]
        if self.visual_adapter is not None:
            visual = self.visual_adapter(visual)
        if self.audio is None:
            return self.fusion(visual[:, :0], visual_mask[:, :0], visual, visual_mask)
        audio, audio_mask = self.audio(waveform, num_samples)
        return self.fusion(audio, audio_mask, visual.to(audio.dtype), visual_mask)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the blocks of both transformers in the backward pass instead of keeping their insides."""
        kwargs = {"use_reentrant": False}
        if hasattr(self.language, "activation_checkpointing_enable"):
            self.language.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:  # its name in older transformers
            self.language.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if self.audio is not None:
            self.audio.ced.gradient_checkpointing = True

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes: weights that are trained, and statistics that adapt."""
        return {name: tensor.detach() for name, tensor in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        for name, module in self.named_modules():
            if isinstance(module, MelBatchNorm) and module.statistics is BatchNorm.ADAPT:
                yield from ((f"{name}.{buffer}", tensor) for buffer, tensor in module.named_buffers())

    def _prompted(
        self, fused: FusionOutput, prompt_ids: tuple[Tensor, ...], prompt_masks: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, H] and mask [B, L] of the prompt with its slots filled.

        Every piece has its own columns, so that padding lies between pieces, masked and without a position.
        """
        if len(prompt_ids) != len(self.slots) + 1:
            raise ValueError(
                f"prompts {self.settings.prompts.value!r} have {len(self.slots)} slots; got pieces for others"
            )
        dtype = self.language.get_input_embeddings().weight.dtype
        tokens = self.projector(fused.tokens)
        embeds, masks = [self._embed(prompt_ids[0])], [prompt_masks[0]]
        for slot, ids, mask in zip(self.slots, prompt_ids[1:], prompt_masks[1:]):
            part = _part(slot, fused.num_audio)
            embeds += [tokens[:, part], self._embed(ids)]
            masks += [fused.mask[:, part], mask]
        return torch.cat([e.to(dtype) for e in embeds], 1), torch.cat(masks, 1)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.language.get_input_embeddings()(ids)

    def _logits(self, embeds: Tensor, mask: Tensor, keep: int) -> Tensor:
        """[B, keep, vocabulary]: of the last ``keep`` columns."""
        settings: dict[str, Any] = {"logits_to_keep": keep} if self.keeps_logits else {}
        if self.takes_positions:
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.language(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False, **settings)
        return out.logits[:, -keep:]


def _part(slot: Slot, num_audio: int | None) -> slice:
    if slot is Slot.FUSED:
        return slice(None)
    assert num_audio is not None  # the config makes sure
    return slice(None, num_audio) if slot is Slot.AUDIO else slice(num_audio, None)


def cross_entropy(logits: Tensor, labels: Tensor, average: Average) -> Tensor:
    """Of labels [B, T], over a caption's tokens and then over captions, or over all tokens at once."""
    kept = labels != IGNORED
    losses = nn.functional.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")  # [B, T]
    if average is Average.TOKEN:
        return losses.sum() / kept.sum().clamp_min(1)
    return (losses.sum(1) / kept.sum(1).clamp_min(1)).mean()


def load_captioner(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> Captioner:
    """With the weights that the config names, or random ones from its seeds, on ``device``.

    What is new (LoRA, fusion, projector) is drawn from ``train.seed``, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        audio = None if isinstance(config.fusion, VisualOnly) else load_audio_encoder(config.audio)
        language = build_language_model(config.language, tokenizer)
        return _assemble(config, language, audio, tokenizer).to(device)


def skeleton_captioner(config: Config) -> Captioner:
    """On the meta device: sizes and dtypes without weights, downloads or memory."""
    with torch.device("meta"):
        audio = None if isinstance(config.fusion, VisualOnly) else AudioEncoder(config.audio)
        return _assemble(config, skeleton_language_model(config.language), audio, None)


def _assemble(
    config: Config,
    language: PreTrainedModel,
    audio: AudioEncoder | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Captioner:
    if audio is not None:
        tune(audio, config.audio.tuning, ENCODER_TARGETS)
    tune(language, config.language.tuning, None)
    return Captioner(config, language, audio, tokenizer)
