"""What a config costs at its real sizes, counted without weights: parameters, memory, FLOP, the paper's 100 epochs.

The captioner is built on the meta device and takes a real training step there: matrix products are counted by
torch's own counter, and what autograd keeps for the backward pass is what its hooks see.

Letters: B clips, N and M tokens of sound and picture, D their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lavcap.captioner import Captioner
from lavcap.config import Config

SAMPLES = 160_000  # 10 s
FRAMES = 20
PROMPT_TOKENS = (7, 14)  # before a slot and behind it: prompt I as Llama's tokenizer cuts it
CAPTION_TOKENS = 15
TRAINING_CLIPS = 48_595  # those that the paper had of AudioCaps
ADAM_BYTES = 8  # two float32 moments a trained weight


class ModuleBudget(NamedTuple):
    """One part of the captioner."""

    name: str
    parameters: int
    trained: int
    dtypes: tuple[str, ...]  # of its parameters
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


class StepBudget(NamedTuple):
    """One training step of one device."""

    forward_flop: int
    backward_flop: int
    activation_bytes: int  # kept for the backward pass
    operations: int  # that would each be a kernel at least, in eager PyTorch; views are none
    gradients: dict[str, torch.dtype]  # which weights got one


class FusedStep(NamedTuple):
    """Similarity, plan, attend and loss, forward and backward."""

    flop: int
    tensor_bytes: int  # tokens read and written, each once a pass


@dataclass(frozen=True)
class Assumptions:
    """Of the machine; none of it is measured here."""

    peak_tflops: float = 989.0  # H100 SXM, bfloat16, dense: NVIDIA's data sheet
    utilisation: float = 0.35  # of the peak, over a step
    bandwidth_tbs: float = 3.35  # H100 SXM memory: NVIDIA's data sheet
    operation_us: float = 5.0  # of the host, for one operation in eager PyTorch
    price_per_hour: float = 2.5  # USD for one such GPU
    clips: int = TRAINING_CLIPS


class RunBudget(NamedTuple):
    """A whole training run on ``gpus`` devices, data parallel."""

    gpus: int
    memory_bytes: int  # a device
    steps: int
    step_seconds: float
    hours: float
    gpu_hours: float
    price: float


def module_budgets(captioner: Captioner) -> list[ModuleBudget]:
    """Each part of the captioner, in the order that data takes through them."""
    parts = ("audio", "visual_adapter", "fusion", "projector", "language")
    named = ((name, getattr(captioner, name)) for name in parts)
    return [
        module_budget(name, part) for name, part in named if part is not None and any(True for _ in part.parameters())
    ]


def module_budget(name: str, module: nn.Module) -> ModuleBudget:
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return ModuleBudget(
        name,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        tuple(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        sum(map(_bytes, parameters)),
        sum(map(_bytes, trained)),
        sum(ADAM_BYTES * p.numel() for p in trained),
    )


def count_step(captioner: Captioner, batch_size: int) -> StepBudget:
    """Forward and backward of a captioner on the meta device, for ``batch_size`` clips of 10 s.

    There is no autocast on that device: what runs in bfloat16 under it counts in float32 here (the audio encoder), and
    attention keeps its matrices, which fused kernels do not. Both make the activations an upper bound.
    """
    captioner.train()
    weights = {p.untyped_storage()._cdata for p in captioner.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    operations = _Operations()
    with operations, FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = captioner(**meta_batch(captioner, batch_size)).loss
    activation_bytes = sum(storage.nbytes() for storage in kept.values())
    with operations, FlopCounterMode(display=False) as backward:
        loss.backward()
    gradients = {name: p.grad.dtype for name, p in captioner.named_parameters() if p.grad is not None}
    captioner.zero_grad()
    flop = forward.get_total_flops(), backward.get_total_flops()
    return StepBudget(*flop, activation_bytes, operations.count, gradients)


def meta_batch(captioner: Captioner, batch_size: int) -> dict[str, Any]:
    """A model batch without values."""
    sizes = (PROMPT_TOKENS[0], *[PROMPT_TOKENS[1]] * len(captioner.slots))
    with torch.device("meta"):
        counts = torch.zeros(batch_size, dtype=torch.long)
        ids = tuple(torch.zeros(batch_size, size, dtype=torch.long) for size in sizes)
        return {
            "waveform": torch.zeros(batch_size, SAMPLES),
            "num_samples": counts,
            "visual": torch.zeros(batch_size, FRAMES, captioner.settings.visual.projection),
            "num_frames": counts,
            "prompt_ids": ids,
            "prompt_masks": tuple(i.bool() for i in ids),
            "labels": torch.zeros(batch_size, CAPTION_TOKENS, dtype=torch.long),
        }


def fused_step(B: int, N: int, M: int, D: int, num_iters: int, element_bytes: int = 4) -> FusedStep:
    """Counted from the formulae: every multiply and every add, divisions and exponentials as one."""
    tokens, pairs = B * (N + M) * D, B * N * M
    similarity = 2 * pairs * D + 3 * tokens
    attend = 4 * pairs * D + tokens
    solve = pairs + 4 * pairs * num_iters
    loss = 2 * pairs * (N + M) + 4 * B * (N * N + M * M)
    # Backward: two products for each of forward's, and the rounds run back at twice their cost.
    flop = 3 * (similarity + attend + loss + solve)
    return FusedStep(flop, 5 * tokens * element_bytes)  # read, write; read both gradients' tokens, write their own


def run_budget(config: Config, captioner: Captioner, step: StepBudget, gpus: int, assumed: Assumptions) -> RunBudget:
    """The run of ``config.train`` on ``gpus`` devices, each with a replica."""
    modules = module_budgets(captioner)
    memory = sum(m.weight_bytes + m.gradient_bytes + m.optimizer_bytes for m in modules) + step.activation_bytes
    # A step computes at the assumed utilisation, but no faster than the weights can be read, forward and backward, and
    # no faster than the host can ask for it.
    compute = (step.forward_flop + step.backward_flop) / (assumed.peak_tflops * 1e12 * assumed.utilisation)
    reading = 2 * sum(m.weight_bytes for m in modules) / (assumed.bandwidth_tbs * 1e12)
    seconds = max(compute, reading, step.operations * assumed.operation_us * 1e-6)
    steps = round(config.train.epochs * assumed.clips / (config.train.batch_size * gpus))
    hours = steps * seconds / 3600
    return RunBudget(gpus, memory, steps, seconds, hours, gpus * hours, gpus * hours * assumed.price_per_hour)


def frozen_parts(config: Config) -> Iterator[ModuleBudget]:
    """What runs once, in ``lavcap prepare``, and takes no part in a step."""
    from lavcap.visual import skeleton_visual_encoder

    yield module_budget("visual (prepare only)", skeleton_visual_encoder(config.visual))


class _Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher, views left out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
