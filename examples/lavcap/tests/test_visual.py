"""CLIP's pictures and features, against transformers' own processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lavcap.config import Precision, PretrainedCLIP, RandomCLIP
from lavcap.visual import build_visual_encoder, preprocess, visual_fingerprint


def frames(height: int, width: int) -> np.ndarray:
    """A smooth picture with an edge and noise: [2, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(0)
    picture = 128 + 80 * np.sin(x / 31) * np.cos(y / 17) + 40 * (x > width / 2)
    return (picture[None, :, :, None] + rng.normal(0, 20, (2, height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(288, 384), (720, 1280), (225, 224), (500, 333)])
def test_preprocessing_is_clips(size: tuple[int, int]) -> None:
    """PIL resizes in fixed point, so a value may differ by one of 255; seldom, and never by more."""
    image = pytest.importorskip("PIL.Image")
    height, width = size
    short = min(size)
    target = tuple(224 if side == short else int(224 * side / short) for side in size)
    ours = preprocess(frames(height, width))
    for got, frame in zip(ours, frames(height, width)):
        resized = np.asarray(image.fromarray(frame).resize(target[::-1], image.Resampling.BICUBIC))
        top, left = (target[0] - 224) // 2, (target[1] - 224) // 2
        cut = resized[top : top + 224, left : left + 224]
        mean, std = (np.array(v, np.float32) for v in (
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
        steps = (got.permute(1, 2, 0).numpy() * std + mean) * 255 - cut
        assert abs(steps).max() < 1.01 and (abs(steps) > 0.5).mean() < 0.02


def test_preprocess_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"frames must be \[F, H, W, 3\] uint8 RGB; got \[2, 3, 8, 8\] torch.float32"):
        preprocess(torch.zeros(2, 3, 8, 8))


def test_random_clip_is_frozen_repeatable_and_batched() -> None:
    encoder, pixels = build_visual_encoder(RandomCLIP()), preprocess(frames(300, 400))
    features = encoder.encode(pixels)
    assert features.shape == (2, 64) and features.dtype == torch.float32 and not features.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.train()
    assert not encoder.training and not encoder.clip.training
    torch.testing.assert_close(
        build_visual_encoder(RandomCLIP()).encode(pixels[1:]), features[1:], rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(build_visual_encoder(RandomCLIP(seed=1)).encode(pixels), features)
    with pytest.raises(ValueError, match=r"pixels must be \[F, 3, 224, 224\]"):
        encoder.encode(pixels[:, :, :10])


def test_a_folder_loads_like_a_published_model(tmp_path: Path) -> None:
    saved = build_visual_encoder(RandomCLIP(seed=3))
    saved.clip.save_pretrained(tmp_path)
    pixels = preprocess(frames(224, 224))
    loaded = build_visual_encoder(PretrainedCLIP(str(tmp_path), projection=64))
    assert loaded.clip.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.encode(pixels), saved.encode(pixels), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"set visual\.projection=64"):
        build_visual_encoder(PretrainedCLIP(str(tmp_path)))


def test_a_published_checkpoint_has_a_text_side_too(tmp_path: Path) -> None:
    """As ``openai/clip-vit-large-patch14`` is: the features are what the whole model calls its image features."""
    from transformers import CLIPConfig, CLIPModel

    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sides |= {"projection_dim": 48}
    text = sides | {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = sides | {"patch_size": 56, "image_size": 224}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()
    whole.save_pretrained(tmp_path)
    pixels = preprocess(frames(224, 300))
    encoder = build_visual_encoder(PretrainedCLIP(str(tmp_path), projection=48, precision=Precision.FLOAT32))
    with torch.no_grad():
        expected = whole.visual_projection(whole.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(encoder.encode(pixels), expected)


def test_a_fingerprint_tells_models_apart() -> None:
    lines = {visual_fingerprint(config) for config in (RandomCLIP(), RandomCLIP(seed=1), PretrainedCLIP())}
    assert len(lines) == 3 and visual_fingerprint(RandomCLIP()) in lines
