"""The captioner: a clip's loss and caption are its own, whatever stands beside it; what is trained and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lavcap.captioner import Captioner, cross_entropy, load_captioner
from lavcap.config import (
    AudioConfig,
    AudioOnly,
    Average,
    BatchNorm,
    CEDFrontEnd,
    CEDSize,
    Config,
    Freeze,
    FullTuning,
    GenerationConfig,
    KaldiFrontEnd,
    LoRA,
    LossConfig,
    Precision,
    PretrainedLanguage,
    PromptSet,
    RandomCLIP,
    RandomLlama,
    SolverConfig,
    VisualOnly,
)
from lavcap.config_file import load_config
from lavcap.language import build_tokenizer
from lavcap.prompts import test_prompt, training_prompts
from lavcap.text import IGNORED, encode_text
from torch import Tensor

CONFIGS = Path(__file__).parents[1] / "configs"
CAPTIONS = ["A dog barks", "Rain falls on a roof while an engine hums nearby and people talk", "Wind"]
LORA = LoRA(rank=2, alpha=4, dropout=0)


def config(**sections: Any) -> Config:
    small = {
        "audio": AudioConfig(CEDSize.NANO, tuning=LORA, spec_augment=None),
        "visual": RandomCLIP(),
        "language": RandomLlama(width=64, heads=2, mlp=128, vocabulary=400),
        "solver": SolverConfig(backend="torch"),
    }
    return Config(**(small | sections))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(RandomLlama(vocabulary=400), CAPTIONS)


@pytest.fixture(scope="module")
def captioner(tokenizer: Any) -> Captioner:
    return load_captioner(config(), tokenizer).eval()


def batch(tokenizer: Any, prompts: PromptSet = PromptSet.MULTI, clips: slice = slice(None)) -> dict[str, Any]:
    """Three clips of different lengths, numbers of frames, wordings and captions, padded."""
    generator = torch.Generator().manual_seed(0)
    lengths, frames = torch.tensor([48_000, 16_000, 30_000])[clips], torch.tensor([6, 3, 1])[clips]
    waveform, visual = (
        torch.randn(3, 48_000, generator=generator)[clips],
        torch.randn(3, 6, 64, generator=generator)[clips],
    )
    choice = (training_prompts(prompts) * 3)[:3]
    return {
        "waveform": (waveform * (torch.arange(48_000) < lengths[:, None]))[:, : lengths.max()],
        "num_samples": lengths,
        "visual": (visual * (torch.arange(6) < frames[:, None])[..., None])[:, : frames.max()],
        "num_frames": frames,
        **encode_text(tokenizer, choice[clips], CAPTIONS[clips]),
    }


def one(clip: int) -> slice:
    return slice(clip, clip + 1)


@pytest.mark.parametrize("prompts", list(PromptSet))
def test_a_batch_is_its_clips(tokenizer: Any, prompts: PromptSet) -> None:
    model = load_captioner(config(prompts=prompts), tokenizer).eval()
    together = model(**batch(tokenizer, prompts))
    alone = [model(**batch(tokenizer, prompts, one(clip))) for clip in range(3)]
    for part in ("loss", "ce_loss", "ot_loss"):
        torch.testing.assert_close(together[part], sum(out[part] for out in alone) / 3, rtol=1e-4, atol=1e-4)
    for clip, out in enumerate(alone):
        torch.testing.assert_close(together.logits[clip, : out.logits.shape[1]], out.logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.loss, together.ce_loss + together.ot_loss)


def test_a_batch_is_its_clips_without_pooling_over_frequency(tokenizer: Any) -> None:
    audio = AudioConfig(CEDSize.NANO, pool_frequency=False, tuning=LORA, spec_augment=None)
    model = load_captioner(config(audio=audio), tokenizer).eval()
    together = model(**batch(tokenizer)).loss
    alone = [model(**batch(tokenizer, clips=one(clip))).loss for clip in range(3)]
    torch.testing.assert_close(together, sum(alone) / 3, rtol=1e-4, atol=1e-4)


def test_the_language_model_sees_prompt_tokens_and_caption_in_this_order(tokenizer: Any) -> None:
    """Prompt III of one clip, put together by hand."""
    model = load_captioner(config(prompts=PromptSet.III), tokenizer).eval()
    inputs = batch(tokenizer, PromptSet.III, one(1))
    fused = model.fuse(*(inputs[name] for name in ("waveform", "num_samples", "visual", "num_frames")))
    tokens = model.projector(fused.tokens)[0]
    sound, picture = tokens[:6], tokens[fused.num_audio :]  # 1 s: 101 frames, 6 patches
    assert fused.num_audio == 6 and len(picture) == 3
    text = test_prompt(PromptSet.III).text
    ids = [tokenizer(piece, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for piece in text]
    caption = tokenizer(f" {CAPTIONS[1]}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    embed = model.language.get_input_embeddings()
    start = embed(torch.tensor([tokenizer.bos_token_id]))
    row = torch.cat((start, embed(ids[0]), sound, embed(ids[1]), picture, embed(ids[2]), embed(caption)))
    expected = model.language(inputs_embeds=row[None]).logits[0, -len(caption) - 1 :]
    torch.testing.assert_close(model(**inputs).logits[0], expected, rtol=1e-4, atol=1e-4)
    labels = torch.cat((caption, torch.tensor([tokenizer.eos_token_id])))
    torch.testing.assert_close(model(**inputs).ce_loss, torch.nn.functional.cross_entropy(expected, labels))


def test_averages_of_the_cross_entropy() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, 3], [4, IGNORED, IGNORED]])
    each = [torch.nn.functional.cross_entropy(logits[c], labels[c], ignore_index=IGNORED) for c in range(2)]
    torch.testing.assert_close(cross_entropy(logits, labels, Average.ITEM), (each[0] + each[1]) / 2)
    torch.testing.assert_close(cross_entropy(logits, labels, Average.TOKEN), (3 * each[0] + each[1]) / 4)


def test_beam_search_writes_the_same_alone_and_in_a_batch(captioner: Captioner, tokenizer: Any) -> None:
    settings = GenerationConfig(beams=3, max_new_tokens=12)
    together = captioner.generate(**batch(tokenizer), generation=settings)
    alone = [captioner.generate(**batch(tokenizer, clips=one(c)), generation=settings)[0] for c in range(3)]
    assert together == alone and len(set(together)) > 1


def test_greedy_search_is_the_forward_pass_token_by_token(captioner: Captioner, tokenizer: Any) -> None:
    inputs = batch(tokenizer, clips=one(0))
    written: list[int] = []
    for _ in range(6):
        inputs["labels"] = torch.tensor([[*written, 0]])
        written.append(int(captioner(**inputs).logits[0, -1].argmax()))
    (text,) = captioner.generate(**inputs, generation=GenerationConfig(beams=1, max_new_tokens=6))
    assert text == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_without_labels_it_gives_the_first_tokens_logits(captioner: Captioner, tokenizer: Any) -> None:
    inputs = batch(tokenizer)
    with_labels = captioner(**inputs).logits[:, :1]
    del inputs["labels"]
    out = captioner(**inputs)
    torch.testing.assert_close(out.logits, with_labels, rtol=1e-4, atol=1e-4)
    assert out.loss is None


def test_it_learns_and_every_caption_ends_where_its_own_ends(tokenizer: Any) -> None:
    audio = AudioConfig(CEDSize.NANO, front_end=CEDFrontEnd(BatchNorm.ADAPT, 0.1), tuning=LORA, spec_augment=None)
    model = load_captioner(config(audio=audio), tokenizer).train()
    inputs = batch(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        optimizer.step()
    assert out.ce_loss < 0.1
    assert model.eval().generate(**inputs, generation=GenerationConfig(beams=4, max_new_tokens=40)) == CAPTIONS


ENCODER, DECODER, ALWAYS = ("audio.ced.blocks.0.attn.k_proj.weight", "language.lm_head.weight", "projector.weight")


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [(FullTuning(), Freeze()), (LORA, Freeze()), (FullTuning(), LORA), (LORA, LORA)],
    ids=["full-freeze", "lora-freeze", "full-lora", "lora-lora"],
)
def test_table_iv(tokenizer: Any, encoder: Any, decoder: Any) -> None:
    """After a step exactly what should move has moved, and it is what a checkpoint holds."""
    language = RandomLlama(width=64, heads=2, mlp=128, tuning=decoder)
    audio = AudioConfig(CEDSize.NANO, tuning=encoder, spec_augment=None)
    model = load_captioner(config(audio=audio, language=language), tokenizer).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # LoRA's A moves once its B is no longer zero
        optimizer.zero_grad()
        model(**batch(tokenizer)).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # A softmax does not see what all its logits share: the gradient of the keys' bias is zero, or its rounding.
    unseen = {name for name in model.trained_state() if name.endswith("k_proj.bias")}
    assert moved | unseen == set(model.trained_state())
    assert (ENCODER in moved) == isinstance(encoder, FullTuning) and DECODER not in moved and ALWAYS in moved
    for module, tuning in (("audio", encoder), ("language", decoder)):
        parts = {
            name.split(".lora_")[0].rsplit(".", 1)[1] for name in moved if name.startswith(module) and ".lora_" in name
        }
        assert parts == ({"q_proj", "v_proj"} if tuning is LORA else set())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_takes_a_step_with_small_models(tokenizer: Any, path: Path) -> None:
    """All that the file says but for the sizes: front end, augmentation, tuning, fusion, solver, loss, prompts."""
    full = load_config(path)
    fusion = replace(full.fusion, heads=2) if hasattr(full.fusion, "heads") else full.fusion
    language = RandomLlama(width=64, heads=2, mlp=128, tuning=full.language.tuning)
    audio = replace(full.audio, size=CEDSize.NANO, checkpoint=None)
    small = replace(full, audio=audio, visual=RandomCLIP(), language=language, fusion=fusion)
    model = load_captioner(small, tokenizer).train()
    out = model(**batch(tokenizer, full.prompts))
    out.loss.backward()
    assert out.loss.isfinite() and (out.ot_loss is None) == (full.loss.ot_weight == 0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_adapting_statistics_are_kept_and_frozen_ones_are_not() -> None:
    from lavcap.captioner import skeleton_captioner

    ours = skeleton_captioner(config()).trained_state()
    adapting = skeleton_captioner(config(audio=AudioConfig(CEDSize.NANO, front_end=KaldiFrontEnd(), tuning=LORA)))
    statistics = {f"audio.ced.init_bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert adapting.trained_state().keys() - ours.keys() == statistics


@pytest.mark.parametrize("fusion", [AudioOnly(), VisualOnly()], ids=lambda kind: kind.kind)
def test_one_modality_has_no_weights_for_the_other(tokenizer: Any, fusion: Any) -> None:
    model = load_captioner(config(fusion=fusion, loss=LossConfig(ot_weight=0)), tokenizer).train()
    out = model(**batch(tokenizer))
    out.loss.backward()
    assert out.ot_loss is None and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (model.audio is None) == isinstance(fusion, VisualOnly)


def test_a_smaller_encoder_gets_the_picture_in_its_own_width(tokenizer: Any) -> None:
    model = load_captioner(config(visual=RandomCLIP(projection=24)), tokenizer)
    inputs = batch(tokenizer) | {"visual": torch.randn(3, 6, 24)}
    model(**inputs).loss.backward()
    assert model.visual_adapter.weight.grad.abs().sum() > 0


def gradients(model: Captioner, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tokenizer: Any) -> None:
    model = load_captioner(config(), tokenizer).train()
    plain = gradients(model, batch(tokenizer))
    model.gradient_checkpointing_enable()
    kept = gradients(model, batch(tokenizer))
    assert model.audio.ced.gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.language.model.layers)
    assert plain.keys() == kept.keys() and all(torch.equal(plain[name], kept[name]) for name in plain)


def test_bfloat16_autocast(captioner: Captioner, tokenizer: Any) -> None:
    exact = captioner(**batch(tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = captioner(**batch(tokenizer))
        texts = captioner.generate(**batch(tokenizer), generation=GenerationConfig(beams=2, max_new_tokens=4))
    assert mixed.loss.dtype == torch.float32 and len(texts) == 3
    # Eight bits of mantissa through two transformers, a temperature of 0.07 behind them.
    torch.testing.assert_close(mixed.loss, exact.loss, rtol=2e-2, atol=2e-2)


def test_the_same_seed_is_the_same_model(tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = load_captioner(config(), tokenizer).state_dict()
    torch.manual_seed(2)
    second = load_captioner(config(), tokenizer).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.manual_seed(3).get_state(), _state_after_loading(3, tokenizer))


def _state_after_loading(seed: int, tokenizer: Any) -> Tensor:
    torch.manual_seed(seed)
    load_captioner(config(), tokenizer)
    return torch.get_rng_state()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "OPTForCausalLM"])
def test_any_causal_language_model_of_a_folder(tokenizer: Any, architecture: str, tmp_path: Path) -> None:
    """Loaded by AutoModelForCausalLM and AutoTokenizer, LoRA where peft puts it; a batch is still its clips."""
    import transformers

    cls = getattr(transformers, architecture)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    if architecture.startswith("OPT"):
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    if architecture[0] in "LQ":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    cls(cls.config_class(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    language = PretrainedLanguage(str(tmp_path), Precision.FLOAT32, LORA)
    model = load_captioner(config(language=language), build_tokenizer(language)).eval()
    assert type(model.language) is cls
    assert any("lora_A" in name and name.startswith("language") for name in model.trained_state())
    together = model(**batch(tokenizer)).ce_loss
    alone = [model(**batch(tokenizer, clips=one(clip))).ce_loss for clip in range(3)]
    torch.testing.assert_close(together, sum(alone) / 3, rtol=1e-4, atol=1e-4)
    settings = GenerationConfig(beams=2, max_new_tokens=4)
    written = [model.generate(**batch(tokenizer, clips=one(clip)), generation=settings)[0] for clip in range(3)]
    assert model.generate(**batch(tokenizer), generation=settings) == written


def test_pieces_for_other_prompts_are_refused(captioner: Captioner, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompts 'i' have 1 slots"):
        captioner(**batch(tokenizer, PromptSet.III))
