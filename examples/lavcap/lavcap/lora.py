"""What is trained of the encoder and of the decoder: nothing, everything, or low-rank updates (Table IV)."""

from __future__ import annotations

from torch import nn

from lavcap.config import Freeze, FullTuning, LoRA, Tuning

# Of CED, whose fused qkv is kept as three projections: an update of the fused one would share its low rank between
# queries, keys and values, and train the keys, which the paper's does not.
ENCODER_TARGETS = ["q_proj", "v_proj"]


def tune(module: nn.Module, tuning: Tuning, targets: list[str] | None) -> None:
    """Make of ``module`` what ``tuning`` says, in place.

    Trained weights are float32, so that small steps are not lost; frozen ones stay as they are.

    Args:
        targets: names of the projections that get LoRA; None for peft's choice for this architecture.

    Raises:
        ValueError: peft knows no targets for the architecture.
    """
    module.requires_grad_(isinstance(tuning, FullTuning))
    if isinstance(tuning, LoRA):
        _add_lora(module, tuning, targets)
    if not isinstance(tuning, Freeze):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _add_lora(module: nn.Module, tuning: LoRA, targets: list[str] | None) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),  # GPT-2 keeps weights transposed
    )
    inject_adapter_in_model(config, module)
