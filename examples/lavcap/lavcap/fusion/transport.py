"""OT-Att and the OT loss, by otfuse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import otfuse
from lavcap.config import LossConfig, OTAtt, SolverConfig
from lavcap.fusion.base import Fusion, FusionOutput
from lavcap.precision import full_precision


class OTLoss(nn.Module):
    """Eq. 4 of a plan and its similarity, with a temperature that is fixed (the paper) or learned (the public code)."""

    def __init__(self, solver: SolverConfig, loss: LossConfig) -> None:
        super().__init__()
        self.solver = solver
        self.loss = loss
        self.scale = nn.Parameter(torch.tensor(1 / loss.temperature)) if loss.learn_temperature else None

    def forward(self, audio: Tensor, visual: Tensor, audio_mask: Tensor, visual_mask: Tensor) -> Tensor:
        similarity = otfuse.similarity_matrix(audio, visual, self.solver.similarity.value)
        with full_precision(audio.device):
            plan = otfuse.sinkhorn(
                -similarity.float(),
                self.solver.epsilon,
                audio_mask,
                visual_mask,
                num_iters=self.solver.num_iters,
                grad=self.solver.gradient.value,
                backend=self.solver.backend,
            ).plan
        return self.of_plan(plan, similarity, audio_mask, visual_mask)

    def of_plan(self, plan: Tensor, similarity: Tensor, audio_mask: Tensor, visual_mask: Tensor) -> Tensor:
        """The loss of a plan that is already solved. The logits are linear in the similarity, so a learned scale
        can multiply it in the temperature's place."""
        similarity = similarity.float()
        temperature = self.loss.temperature
        if self.scale is not None:
            similarity, temperature = similarity * self.scale.clamp(1, 100), 1.0
        return otfuse.ot_alignment_loss(
            plan,
            similarity,
            temperature=temperature,
            assignment=self.loss.assignment.value,
            contrast=self.loss.contrast.value,
            a=audio_mask,
            b=visual_mask,
            reduction=self.loss.reduction.value,
        )


class WithOTLoss(Fusion):
    """Another fusion, with the OT loss of the tokens that go into it."""

    def __init__(self, fusion: Fusion, loss: OTLoss) -> None:
        super().__init__()
        self.fusion = fusion
        self.loss = loss

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        fused: FusionOutput = self.fusion(audio, audio_mask, visual, visual_mask)
        return fused._replace(loss=self.loss(audio, visual, audio_mask, visual_mask))


class OTAttFusion(Fusion):
    """Attended tokens and loss from one solve (Eq. 5 and 6), by :class:`otfuse.nn.OTFusion`."""

    def __init__(self, kind: OTAtt, solver: SolverConfig, loss: LossConfig) -> None:
        super().__init__()
        self.normalise = kind.normalise
        self.wants_loss = loss.ot_weight > 0
        self.learned_loss = OTLoss(solver, loss) if self.wants_loss and loss.learn_temperature else None
        self.ot = otfuse.nn.OTFusion(
            solver.epsilon,
            similarity=solver.similarity.value,
            num_iters=solver.num_iters,
            weights=kind.weights.value,
            grad=solver.gradient.value,
            temperature=loss.temperature,
            assignment=loss.assignment.value,
            contrast=loss.contrast.value,
            reduction=loss.reduction.value,
            backend=solver.backend,
        )

    def forward(self, audio: Tensor, audio_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> FusionOutput:
        visual = visual.to(audio.dtype)
        if self.normalise:
            audio, visual = nn.functional.normalize(audio, dim=2), nn.functional.normalize(visual, dim=2)
        fused = self.ot(audio, visual, audio_mask, visual_mask)
        loss = fused.loss if self.wants_loss else None
        if self.learned_loss is not None:
            similarity = otfuse.similarity_matrix(audio, visual, self.ot.attention.similarity)
            loss = self.learned_loss.of_plan(fused.plan, similarity, audio_mask, visual_mask)
        mask = torch.cat((audio_mask, visual_mask), 1)
        return FusionOutput(fused.tokens, mask, loss, audio.shape[1], fused.plan)
