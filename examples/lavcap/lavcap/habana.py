"""optimum-habana's Trainer for Gaudi (extra ``habana``): its fused optimiser and graphs around the same captioning.

It needs transformers below 4.56 and Habana's own torch, and so an environment of its own; the README says how. What
differs from the stock Trainer is in this file only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavcap.config import Config, Precision
from lavcap.trainer import Captioning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

try:
    from optimum.habana import GaudiConfig, GaudiTrainer, GaudiTrainingArguments
except ImportError as error:
    raise ValueError(
        f"train.engine optimum_habana cannot be used: {error}. Install lavcap[habana] in an environment of its own, "
        "on a machine with Gaudi's software, or use train.engine transformers, which runs on Gaudi too"
    ) from error


class GaudiCaptionTrainer(Captioning, GaudiTrainer):
    """optimum-habana's Trainer for captioning."""


def gaudi_arguments(settings: dict[str, Any]) -> TrainingArguments:
    """Our settings as Gaudi's arguments; what else they have stays at its default."""
    return GaudiTrainingArguments(**settings, use_habana=True)


def gaudi_trainer(config: Config, tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any]) -> Captioning:
    """The trainer around ready parts, with Gaudi's fused AdamW and clipping."""
    gaudi = GaudiConfig(
        use_fused_adam=True,
        use_fused_clip_norm=config.train.max_gradient_norm is not None,
        use_torch_autocast=config.train.precision is Precision.BFLOAT16,
    )
    return GaudiCaptionTrainer(config, tokenizer, gaudi_config=gaudi, **parts)
