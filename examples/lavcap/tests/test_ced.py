"""CED: its published sizes and names, reading both kinds of checkpoint, and tokens that padding does not touch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lavcap.audio.ced import CED, SHAPES, MelBatchNorm
from lavcap.audio.ced_weights import load_ced, original_shapes, original_state_dict
from lavcap.audio.encoder import AudioEncoder, load_audio_encoder
from lavcap.audio.front_ends import Spectrogram
from lavcap.config import AudioConfig, BatchNorm, CEDFrontEnd, CEDSize, KaldiFrontEnd, LoRA
from lavcap.lora import ENCODER_TARGETS, tune
from safetensors.torch import save_file
from torch import Tensor


def nano(max_patches: int = 63, pool: bool = True, seed: int = 0) -> CED:
    torch.manual_seed(seed)
    encoder = CED(SHAPES[CEDSize.NANO], max_patches, BatchNorm.FROZEN, pool)
    for tensor in encoder.state_dict().values():  # every entry is worth comparing
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=0.1)
    return encoder.eval()


def spectrogram(num_frames: list[int]) -> Spectrogram:
    frames = torch.tensor(num_frames)
    return Spectrogram(torch.randn(len(num_frames), 64, max(num_frames)), frames, frames // 16)


def hugging_face(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the hub's names."""
    kept = {name.replace("init_bn.1", "init_bn"): t for name, t in original.items() if not name.startswith("front_end")}
    return {name if name.startswith("outputlayer") else f"encoder.{name}": t for name, t in kept.items()}


@pytest.mark.parametrize(
    ("size", "millions"), [(CEDSize.TINY, 5.5), (CEDSize.MINI, 9.7), (CEDSize.SMALL, 21.7), (CEDSize.BASE, 85.7)]
)
def test_published_sizes(size: CEDSize, millions: float) -> None:
    with torch.device("meta"):
        shapes = original_shapes(CED(SHAPES[size], 63, BatchNorm.FROZEN))
    constants = ("front_end", "running", "num_batches")
    count = sum(torch.Size(s).numel() for name, s in shapes.items() if not any(c in name for c in constants))
    assert len(shapes) == 161
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_published_names_and_shapes_of_base() -> None:
    with torch.device("meta"):
        shapes = original_shapes(CED(SHAPES[CEDSize.BASE], 63, BatchNorm.FROZEN))
    facts = {
        "front_end.0.spectrogram.window": (512,),
        "front_end.0.mel_scale.fb": (257, 64),
        "init_bn.1.running_var": (64,),
        "init_bn.1.num_batches_tracked": (),
        "patch_embed.proj.weight": (768, 1, 16, 16),
        "time_pos_embed": (1, 768, 1, 63),
        "freq_pos_embed": (1, 768, 4, 1),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.0.attn.proj.bias": (768,),
        "blocks.5.mlp.fc1.weight": (3072, 768),
        "norm.bias": (768,),
        "outputlayer.0.weight": (768,),
        "outputlayer.1.weight": (527, 768),
    }
    assert {name: shapes[name] for name in facts} == facts


@pytest.mark.parametrize("naming", ["original", "hugging_face"])
@pytest.mark.parametrize("form", ["safetensors", "torch", "torch with 'model'"])
def test_both_namings_load(tmp_path: Path, naming: str, form: str) -> None:
    saved = nano(seed=1)
    weights = original_state_dict(saved)
    weights = hugging_face(weights) if naming == "hugging_face" else weights
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save({"model": weights} if "model" in form else weights, path)
    loaded = nano(seed=2)
    load_ced(loaded, path)
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_wrong_checkpoints_are_named_in_full(tmp_path: Path) -> None:
    weights = original_state_dict(nano())
    weights["extra.weight"] = weights.pop("blocks.1.mlp.fc2.bias")
    weights["norm.weight"] = torch.zeros(65)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        load_ced(nano(), tmp_path / "w.pt")
    assert "missing: blocks.1.mlp.fc2.bias [64]" in str(error.value)
    assert "unexpected: extra.weight [64]" in str(error.value)
    assert "shape: norm.weight is [65], needs [64]" in str(error.value)
    weights = original_state_dict(nano())
    weights["front_end.0.mel_scale.fb"] = torch.zeros(257, 64)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"mel_scale\.fb is not that of CED's front end"):
        load_ced(nano(), tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"README.md says where"):
        load_ced(nano(), tmp_path / "none.pt")


def test_position_embedding_is_interpolated_for_64_patches(tmp_path: Path) -> None:
    saved = nano()
    with torch.no_grad():
        saved.time_pos_embed.copy_(torch.arange(63.0))  # a ramp stays a ramp
    torch.save(original_state_dict(saved), tmp_path / "w.pt")
    loaded = nano(max_patches=64)
    load_ced(loaded, tmp_path / "w.pt")
    ramp = ((torch.arange(64.0) + 0.5) * 63 / 64 - 0.5).clamp(0, 62)
    torch.testing.assert_close(loaded.time_pos_embed[0, 0, 0], ramp)


def test_fused_qkv_is_computed_as_three(tmp_path: Path) -> None:
    """One block written with the checkpoint's own tensors, plainly, in float64."""
    encoder = nano(pool=False).double()
    w = {name: tensor.double() for name, tensor in original_state_dict(encoder).items()}
    mel = torch.randn(1, 64, 48, dtype=torch.float64)
    got = CED.forward(_first_block(encoder), Spectrogram(mel, torch.tensor([48]), torch.tensor([3]))).tokens[0]

    scale = w["init_bn.1.weight"] / (w["init_bn.1.running_var"] + 1e-5).sqrt()
    x = (mel[0] - w["init_bn.1.running_mean"][:, None]) * scale[:, None] + w["init_bn.1.bias"][:, None]
    tokens = []
    for f in range(4):  # frequency-major
        for t in range(3):
            patch = x[16 * f : 16 * f + 16, 16 * t : 16 * t + 16]
            token = (w["patch_embed.proj.weight"][:, 0] * patch).sum((1, 2)) + w["patch_embed.proj.bias"]
            tokens.append(token + w["time_pos_embed"][0, :, 0, t] + w["freq_pos_embed"][0, :, f, 0])
    x = torch.stack(tokens)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    q, k, v = (norm(x, "blocks.0.norm1") @ w["blocks.0.attn.qkv.weight"].T + w["blocks.0.attn.qkv.bias"]).chunk(3, 1)
    heads = [(q[:, h] @ k[:, h].T / 32**0.5).softmax(1) @ v[:, h] for h in (slice(0, 32), slice(32, 64))]
    x = x + torch.cat(heads, 1) @ w["blocks.0.attn.proj.weight"].T + w["blocks.0.attn.proj.bias"]
    hidden = norm(x, "blocks.0.norm2") @ w["blocks.0.mlp.fc1.weight"].T + w["blocks.0.mlp.fc1.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    x = x + hidden @ w["blocks.0.mlp.fc2.weight"].T + w["blocks.0.mlp.fc2.bias"]
    torch.testing.assert_close(got, norm(x, "norm"))


def _first_block(encoder: CED) -> CED:
    encoder.blocks = encoder.blocks[:1]
    return encoder


def test_pooling_averages_the_four_rows() -> None:
    pooled, whole = nano(), nano(pool=False)
    inputs = spectrogram([80, 48])
    tokens, mask = whole(inputs)
    assert tokens.shape == (2, 20, 64) and mask[1].tolist() == [True, True, True, False, False] * 4
    torch.testing.assert_close(pooled(inputs).tokens, tokens.unflatten(1, (4, 5)).mean(1))


def test_padding_does_not_reach_a_clip() -> None:
    encoder, inputs = nano(), spectrogram([160, 96])
    both = encoder(inputs)
    alone = encoder(Spectrogram(inputs.mel[1:, :, :96], inputs.num_frames[1:], inputs.num_patches[1:]))
    torch.testing.assert_close(both.tokens[1, :6], alone.tokens[0])
    assert not both.tokens[1, 6:].any() and both.mask.sum(1).tolist() == [10, 6]


@pytest.mark.parametrize("statistics", list(BatchNorm))
def test_frozen_statistics_stay_under_train(statistics: BatchNorm) -> None:
    norm = MelBatchNorm(64, statistics, 0.1).train()
    mel, own = 3 + 2 * torch.randn(8, 64, 100), torch.ones(8, 100, dtype=torch.bool)
    own[:, 50:] = False
    mel[:, :, 50:] = 1e3  # padding
    out = norm(mel, own)
    if statistics is BatchNorm.FROZEN:
        assert not norm.running_mean.any() and norm.running_var.eq(1).all() and norm.num_batches_tracked == 0
        return
    plain = torch.nn.BatchNorm1d(64).train()
    torch.testing.assert_close(out[:, :, :50], plain(mel[:, :, :50]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.eval()(mel, own), plain.eval()(mel), rtol=1e-4, atol=1e-3)


def test_lora_touches_queries_and_values_only() -> None:
    encoder = load_audio_encoder(AudioConfig(size=CEDSize.NANO))
    tune(encoder, LoRA(rank=4, alpha=8, dropout=0), ENCODER_TARGETS)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {
        f"ced.blocks.{n}.attn.{part}_proj.lora_{ab}.default.weight" for n in (0, 1) for part in "qv" for ab in "AB"
    }
    attention = encoder.ced.blocks[0].attn
    a, b = (getattr(attention.v_proj, f"lora_{ab}").default.weight for ab in "AB")
    torch.nn.init.normal_(b)
    x = torch.randn(2, 64)
    base = attention.v_proj.base_layer
    torch.testing.assert_close(attention.v_proj(x), base(x) + 2 * x @ a.T @ b.T)  # alpha / rank = 2
    assert type(attention.k_proj) is torch.nn.Linear


@pytest.mark.parametrize(("front_end", "tokens"), [(CEDFrontEnd(), 62), (KaldiFrontEnd(), 64)], ids=["ced", "kaldi"])
def test_tokens_of_ten_seconds(front_end: CEDFrontEnd | KaldiFrontEnd, tokens: int) -> None:
    encoder = AudioEncoder(AudioConfig(size=CEDSize.NANO, front_end=front_end)).eval()
    out, mask = encoder(torch.randn(1, 160_000), torch.tensor([160_000]))
    assert out.shape == (1, tokens, 64)
    assert mask.sum().item() == {62: 62, 64: 63}[tokens]  # 998 Kaldi frames end within the 63rd patch


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for on in (False, True):
        encoder = nano().train()
        encoder.gradient_checkpointing = on
        torch.manual_seed(3)
        encoder(spectrogram([96])).tokens.square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
