"""Every fusion: what it computes, that padding takes no part, where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from lavcap.config import (
    Assignment,
    AudioOnly,
    Concatenation,
    Config,
    Contrast,
    CrossAttention,
    JointEncoder,
    LossConfig,
    OTAtt,
    QFormer,
    Reduction,
    SolverConfig,
    VisualOnly,
    Weights,
)
from lavcap.fusion import FusionOutput, build_fusion
from torch import Tensor

import otfuse

TORCH = SolverConfig(backend="torch")
KINDS = [Concatenation(), OTAtt(), QFormer(5, heads=2), JointEncoder(heads=2), CrossAttention(heads=2)]


def build(kind: object, loss: LossConfig | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    alone = isinstance(kind, (AudioOnly, VisualOnly))
    loss = loss or (LossConfig(ot_weight=0) if alone else LossConfig())
    return build_fusion(Config(fusion=kind, loss=loss, solver=TORCH), 16).eval()  # type: ignore[arg-type]


def tokens(frames: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two clips: of 6 and 3 sound tokens, and of as many frames as named."""
    generator = torch.Generator().manual_seed(1)
    audio, visual = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 4, 16, generator=generator)
    masks = (torch.arange(n)[None] < torch.tensor(k)[:, None] for n, k in ((6, (6, 3)), (4, frames)))
    audio_mask, visual_mask = masks
    return audio.where(audio_mask[..., None], 0), audio_mask, visual.where(visual_mask[..., None], 0), visual_mask


def own(out: FusionOutput, clip: int) -> Tensor:
    return out.tokens[clip][out.mask[clip]]


@pytest.mark.parametrize("kind", [AudioOnly(), VisualOnly(), *KINDS], ids=lambda kind: kind.kind)
def test_padding_takes_no_part(kind: object) -> None:
    fusion = build(kind)
    audio, audio_mask, visual, visual_mask = tokens()
    out = fusion(audio, audio_mask, visual, visual_mask)
    alone = fusion(audio[1:, :3], audio_mask[1:, :3], visual[1:, :2], visual_mask[1:, :2])
    torch.testing.assert_close(own(out, 1), own(alone, 0), rtol=1e-5, atol=1e-6)
    noisy = fusion(
        audio.where(audio_mask[..., None], 9.0), audio_mask, visual.where(visual_mask[..., None], -9.0), visual_mask
    )
    torch.testing.assert_close(own(noisy, 1), own(out, 1), rtol=1e-5, atol=1e-6)
    if out.loss is not None:
        torch.testing.assert_close(noisy.loss, out.loss)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_clip_without_frames_is_its_sound_and_never_nan(kind: object) -> None:
    fusion = build(kind)
    audio, audio_mask, visual, visual_mask = tokens(frames=(4, 0))
    audio.requires_grad_()
    out = fusion(audio, audio_mask, visual, visual_mask)
    (own(out, 0).sum() + own(out, 1).sum() + out.loss).backward()
    assert out.loss.isfinite() and audio.grad is not None and audio.grad.isfinite().all()
    if isinstance(kind, (Concatenation, OTAtt, CrossAttention)):
        torch.testing.assert_close(own(out, 1), audio[1, :3].detach())


def test_ot_att_is_equation_5_and_6() -> None:
    audio, audio_mask, visual, visual_mask = tokens()
    out = build(OTAtt())(audio, audio_mask, visual, visual_mask)
    plan = otfuse.sinkhorn(-otfuse.similarity_matrix(audio, visual), 0.1, audio_mask, visual_mask, backend="torch").plan
    torch.testing.assert_close(out.tokens, torch.cat((audio + plan @ visual, visual + plan.mT @ audio), 1))
    assert out.num_audio == 6


def test_ot_att_of_the_public_code_attends_to_unit_tokens() -> None:
    audio, audio_mask, visual, visual_mask = tokens((4, 4))
    scaled = build(OTAtt(normalise=True))(5 * audio, audio_mask, 3 * visual, visual_mask)
    plain = build(OTAtt(normalise=True))(audio, audio_mask, visual, visual_mask)
    torch.testing.assert_close(scaled.tokens, plain.tokens)
    attended = build(OTAtt(Weights.BARYCENTRIC))(audio, audio_mask, visual, visual_mask).tokens[0, :6] - audio[0]
    assert (
        attended.norm() > 3 * (build(OTAtt())(audio, audio_mask, visual, visual_mask).tokens[0, :6] - audio[0]).norm()
    )


LOSSES = {
    "paper": LossConfig(),
    "as printed": LossConfig(assignment=Assignment.PLAN, reduction=Reduction.SUM),
    "public code": LossConfig(
        temperature=1 / math.log(1 / 0.07), assignment=Assignment.LOG_PLAN, contrast=Contrast.ASSIGNMENT
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_the_same_inside_ot_att_and_beside_another_fusion(loss: LossConfig) -> None:
    inputs = tokens((4, 4))
    together, beside = build(OTAtt(), loss)(*inputs).loss, build(Concatenation(), loss)(*inputs).loss
    torch.testing.assert_close(together, beside)


def by_hand(loss: str, audio: Tensor, visual: Tensor) -> Tensor:
    """Eq. 4 and the public code's form of one clip, a token at a time, in float64."""
    s = torch.nn.functional.normalize(audio, dim=1) @ torch.nn.functional.normalize(visual, dim=1).T
    q = otfuse.sinkhorn(-s[None], 0.1, backend="torch").plan[0]
    total = s.new_zeros(())
    for plan, sim in ((q, s), (q.T, s.T)):
        side = s.new_zeros(())
        for i in range(len(plan)):
            if loss == "public code":
                logits = torch.stack([math.log(1 / 0.07) * plan[j].log() @ sim[i] for j in range(len(plan))])
            else:
                row = plan[i] / plan[i].sum() if loss == "paper" else plan[i]
                logits = torch.stack([row @ sim[j] / 0.07 for j in range(len(plan))])
            side = side - logits.log_softmax(0)[i]
        total = total + (side if loss == "as printed" else side / len(plan))
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_the_three_forms_of_the_loss(loss: str) -> None:
    audio, audio_mask, visual, visual_mask = tokens((4, 4))
    got = build(OTAtt(), LOSSES[loss])(audio[:1], audio_mask[:1], visual[:1], visual_mask[:1]).loss
    expected = by_hand(loss, audio[0].double(), visual[0].double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_which_forms_of_the_loss_have_a_signal() -> None:
    """At the paper's sizes: as printed it stays at chance; log_plan with contrast similarity swamps all else."""
    torch.manual_seed(0)
    audio, visual = torch.randn(8, 64, 768, requires_grad=True), torch.randn(8, 20, 768)
    masks = torch.ones(8, 64, dtype=torch.bool), torch.ones(8, 20, dtype=torch.bool)
    figures = {}
    for name, loss in (LOSSES | {"log, similarity": LossConfig(assignment=Assignment.LOG_PLAN)}).items():
        value = build(OTAtt(), loss)(audio, masks[0], visual, masks[1]).loss
        (gradient,) = torch.autograd.grad(value, audio)
        figures[name] = value.item(), (gradient.norm() * audio.norm()).item()
    chance = math.log(64) + math.log(20)
    assert figures["as printed"][0] / 8 == pytest.approx(64 * math.log(64) + 20 * math.log(20), rel=3e-3)
    assert figures["paper"][0] < chance - 0.3 and figures["public code"][0] < chance - 2
    assert figures["log, similarity"][0] > 10 * chance
    assert figures["as printed"][1] / figures["as printed"][0] < figures["paper"][1] / figures["paper"][0] / 30
    assert figures["log, similarity"][1] > 100 * figures["public code"][1]


@pytest.mark.parametrize("kind", [OTAtt(), Concatenation()], ids=["ot_att", "concatenation"])
def test_a_learned_temperature_starts_as_the_fixed_one_and_gets_a_gradient(kind: object) -> None:
    inputs = tokens((4, 4))
    learned, fixed = build(kind, LossConfig(learn_temperature=True)), build(kind, LossConfig())
    loss = learned(*inputs).loss
    torch.testing.assert_close(loss, fixed(*inputs).loss)
    loss.backward()
    (scale,) = learned.parameters()
    assert scale.item() == pytest.approx(1 / 0.07) and scale.grad.item() != 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_the_loss_reaches_both_encoders_under_autocast_as_without(kind: object) -> None:
    """The solver stays in float32: bfloat16 around it moves the loss by a rounding of the tokens only."""
    fusion = build(kind)
    audio, audio_mask, visual, visual_mask = tokens((4, 4))
    audio, visual = audio.requires_grad_(), visual.requires_grad_()
    plain = fusion(audio, audio_mask, visual, visual_mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fusion(audio, audio_mask, visual, visual_mask).loss
    mixed.backward()
    assert mixed.dtype == torch.float32 and audio.grad.abs().sum() > 0 and visual.grad.abs().sum() > 0
    torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-5)


def test_no_weight_no_loss() -> None:
    for kind in KINDS:
        assert build(kind, LossConfig(ot_weight=0))(*tokens()).loss is None
