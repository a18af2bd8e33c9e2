"""Sound and picture to one sequence of tokens: OT-Att and what the paper compares it with (Tables II and III)."""

from __future__ import annotations

from lavcap.config import AudioOnly, Concatenation, Config, CrossAttention, JointEncoder, OTAtt, QFormer, VisualOnly
from lavcap.fusion.base import Fusion, FusionOutput
from lavcap.fusion.learned import CrossAttentionFusion, JointEncoderFusion, QFormerFusion
from lavcap.fusion.plain import AudioOnlyFusion, ConcatenationFusion, VisualOnlyFusion
from lavcap.fusion.transport import OTAttFusion, OTLoss, WithOTLoss

__all__ = ["Fusion", "FusionOutput", "build_fusion"]


def build_fusion(config: Config, width: int) -> Fusion:
    """The fusion of ``config.fusion`` for tokens of ``width``, with the OT loss where it has a weight."""
    kind = config.fusion
    if isinstance(kind, AudioOnly):
        return AudioOnlyFusion()
    if isinstance(kind, VisualOnly):
        return VisualOnlyFusion()
    if isinstance(kind, OTAtt):
        return OTAttFusion(kind, config.solver, config.loss)
    fusion = _without_transport(kind, width)
    return WithOTLoss(fusion, OTLoss(config.solver, config.loss)) if config.loss.ot_weight else fusion


def _without_transport(kind: Concatenation | QFormer | JointEncoder | CrossAttention, width: int) -> Fusion:
    if isinstance(kind, QFormer):
        return QFormerFusion(width, kind)
    if isinstance(kind, JointEncoder):
        return JointEncoderFusion(width, kind)
    if isinstance(kind, CrossAttention):
        return CrossAttentionFusion(width, kind)
    return ConcatenationFusion()
