"""CLIP's picture encoder, frozen, and what a frame goes through before it.

Letters: F frames, H, W height and width, V width of the projected features.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lavcap.config import PretrainedCLIP, RandomCLIP
from lavcap.precision import loaded_as
from lavcap.published import published_config

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

IMAGE_SIZE = 224
# Per channel, red first: of the pictures that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisualEncoder(nn.Module):
    """Frames to one projected feature each (CLIP's ``image_embeds``, not scaled to length one); never trained."""

    def __init__(self, clip: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.width: int = clip.config.projection_dim
        self.image_size: int = clip.config.image_size

    def train(self, mode: bool = True) -> VisualEncoder:
        """Frozen: stays in evaluation, whatever ``mode``."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [F, 3, 224, 224] from :func:`preprocess` -> [F, V] float32; computed in the model's precision."""
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [F, 3, {size}, {size}]; got {list(pixels.shape)}")
        weight = self.clip.visual_projection.weight
        return self.clip(pixel_values=pixels.to(weight.device, weight.dtype)).image_embeds.float()

    forward = encode


def preprocess(frames: Tensor | np.ndarray, size: int = IMAGE_SIZE) -> Tensor:
    """CLIP's pictures from decoded frames, in torch alone (its own processor wants PIL or torchvision).

    The shorter side to ``size`` (bicubic, antialiased), the centre cut out, values scaled by CLIP's mean and deviation.

    Args:
        frames: [F, H, W, 3], uint8, RGB.

    Returns:
        [F, 3, size, size] float32.

    Raises:
        ValueError: another shape or dtype.
    """
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames must be [F, H, W, 3] uint8 RGB; got {list(frames.shape)} {frames.dtype}")
    height, width = frames.shape[1:3]
    short = min(height, width)
    # The longer side is rounded down, as CLIP's own processor does.
    target = tuple(size if side == short else int(size * side / short) for side in (height, width))
    pixels = frames.permute(0, 3, 1, 2).float()
    for step in ((height, target[1]), target):  # PIL's two passes, along rows first, each of which ends in bytes
        if step != tuple(pixels.shape[2:]):
            pixels = nn.functional.interpolate(pixels, step, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.round().clamp(0, 255)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size] / 255
    mean, std = pixels.new_tensor(CLIP_MEAN), pixels.new_tensor(CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def build_visual_encoder(config: PretrainedCLIP | RandomCLIP) -> VisualEncoder:
    """With its weights, in the config's precision.

    Raises:
        ValueError: the loaded model's projection has another width than ``config.projection``.
    """
    from transformers import CLIPVisionModelWithProjection

    dtype = getattr(torch, config.precision.value)
    if isinstance(config, RandomCLIP):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return VisualEncoder(CLIPVisionModelWithProjection(clip_config(config)).to(dtype))
    encoder = VisualEncoder(CLIPVisionModelWithProjection.from_pretrained(config.name, **loaded_as(dtype)))
    if encoder.width != config.projection:
        raise ValueError(
            f"{config.name} projects to {encoder.width} features, the config says {config.projection}: "
            f"set visual.projection={encoder.width}"
        )
    return encoder


def skeleton_visual_encoder(config: PretrainedCLIP | RandomCLIP) -> VisualEncoder:
    """Without weights, on the meta device."""
    from transformers import CLIPVisionModelWithProjection

    with torch.device("meta"):
        clip = CLIPVisionModelWithProjection(clip_config(config))
    return VisualEncoder(clip.to(getattr(torch, config.precision.value)))


def clip_config(config: PretrainedCLIP | RandomCLIP) -> CLIPVisionConfig:
    """The sizes of CLIP's picture side."""
    from transformers import CLIPVisionConfig

    if isinstance(config, PretrainedCLIP):
        sizes = published_config(config.name)
        return getattr(sizes, "vision_config", sizes)
    return CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        patch_size=config.patch,
        image_size=IMAGE_SIZE,
        projection_dim=config.projection,
    )


def visual_fingerprint(config: PretrainedCLIP | RandomCLIP) -> str:
    """One line that says what features depend on: features with the same line are the same features."""
    from lavcap.config_file import plain

    return json.dumps(plain(config), sort_keys=True)
