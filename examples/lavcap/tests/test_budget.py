"""Sizes, gradients and dtypes at the paper's real sizes, on the meta device; memory, FLOP and cost from them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from lavcap import captioner as captioner_module
from lavcap.budget import Assumptions, StepBudget, count_step, fused_step, module_budgets, run_budget
from lavcap.captioner import Captioner, skeleton_captioner
from lavcap.cli import main
from lavcap.config import Config, FullTuning, LoRA, PretrainedLanguage
from lavcap.config_file import load_config
from lavcap.language import skeleton_language_model

CONFIGS = Path(__file__).parents[1] / "configs"
ENCODER_LORA = 12 * 2 * 2 * 8 * 768  # blocks, queries and values, A and B, rank, width
DECODER_LORA = 32 * 2 * 2 * 8 * 4096
PROJECTOR = 768 * 4096 + 4096
LLAMA_2_7B = 6_738_415_616


@pytest.fixture(scope="module", autouse=True)
def _one_language_model_a_kind():
    """Thirty-two layers take seconds to build, on the meta device too: those of one kind are built once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(captioner_module, "skeleton_language_model", cache(_skeleton))
    patch.setattr(captioner_module, "tune", _tune_once)
    yield
    patch.undo()


def _skeleton(config):
    return skeleton_language_model(config)


_tuned: set[int] = set()
_tune = captioner_module.tune


def _tune_once(module, tuning, targets) -> None:
    if targets is None:
        if id(module) in _tuned:
            return
        _tuned.add(id(module))
    _tune(module, tuning, targets)


@pytest.fixture(scope="module")
def paper() -> tuple[Config, Captioner, StepBudget]:
    config = load_config(CONFIGS / "lavcap.yaml")
    captioner = skeleton_captioner(config)
    return config, captioner, count_step(captioner, config.train.batch_size)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_at_its_real_size(path: Path) -> None:
    config = load_config(path)
    captioner = skeleton_captioner(config)
    assert all(p.is_meta for p in captioner.parameters())
    assert all(p.dtype == torch.float32 for p in captioner.parameters() if p.requires_grad)
    modules = {m.name: m for m in module_budgets(captioner)}
    if isinstance(config.language, PretrainedLanguage):
        decoder_lora = DECODER_LORA if isinstance(config.language.tuning, LoRA) else 0
        assert modules["language"].trained == decoder_lora
        assert modules["language"].parameters == LLAMA_2_7B + decoder_lora
        assert modules["projector"].trained == PROJECTOR
        if "audio" in modules:
            full = isinstance(config.audio.tuning, FullTuning)
            assert modules["audio"].trained == (modules["audio"].parameters if full else ENCODER_LORA)


def test_the_papers_modules(paper: tuple[Config, Captioner, StepBudget]) -> None:
    rows = {m.name: m for m in module_budgets(paper[1])}
    assert list(rows) == ["audio", "projector", "language"]  # OT-Att has no parameters
    assert rows["language"].dtypes == ("bfloat16", "float32") and rows["audio"].dtypes == ("float32",)
    # 85.7 million in the checkpoint: less the tagging head, plus LoRA.
    assert rows["audio"].parameters == 85_711_759 - (2 * 768 + 527 * 769) + ENCODER_LORA
    assert rows["language"].weight_bytes == 2 * LLAMA_2_7B + 4 * DECODER_LORA
    assert rows["language"].gradient_bytes == 4 * DECODER_LORA and rows["language"].optimizer_bytes == 8 * DECODER_LORA


def test_gradients_reach_what_is_trained_and_nothing_else(paper: tuple[Config, Captioner, StepBudget]) -> None:
    _, captioner, step = paper
    trained = {name for name, p in captioner.named_parameters() if p.requires_grad}
    assert step.gradients.keys() == trained and set(step.gradients.values()) == {torch.float32}
    names = {re.sub(r"\d+", "N", name) for name in trained}
    assert names == {"projector.weight", "projector.bias"} | {
        f"{module}.{part}_proj.lora_{ab}.default.weight"
        for module in ("audio.ced.blocks.N.attn", "language.model.layers.N.self_attn")
        for part in "qv"
        for ab in "AB"
    }


def test_flop_are_twice_weights_times_tokens(paper: tuple[Config, Captioner, StepBudget]) -> None:
    """The counter against the rule of thumb: 2 a weight and token forward, the same backward to a frozen model."""
    _, captioner, step = paper
    columns = 62 + 20 + 21 + 14  # sound, frames, prompt, caption but for its last token
    layers = LLAMA_2_7B - 2 * 32_000 * 4096  # embeddings and head take no part in every column
    head = 32_000 * 4096 * 15
    encoder = 85_000_000 * 248
    rule = 2 * 4 * (layers * columns + head + encoder)
    assert step.forward_flop == pytest.approx(rule, rel=0.02)
    assert step.backward_flop == pytest.approx(rule, rel=0.05)
    assert captioner.training and all(p.grad is None for p in captioner.parameters())


def test_activations_grow_with_the_batch_and_shrink_by_recomputing() -> None:
    config = replace(load_config(CONFIGS / "lavcap.yaml"), language=load_config(CONFIGS / "tiny.yaml").language)
    captioner = skeleton_captioner(config)
    one, two = count_step(captioner, 1).activation_bytes, count_step(captioner, 2).activation_bytes
    assert two == pytest.approx(2 * one, rel=0.02)
    captioner.gradient_checkpointing_enable()
    assert count_step(captioner, 2).activation_bytes < two / 5


def test_a_run_is_its_steps(paper: tuple[Config, Captioner, StepBudget]) -> None:
    config, captioner, step = paper
    assumed = Assumptions(peak_tflops=1000, utilisation=0.1, price_per_hour=2)
    one, eight = (run_budget(config, captioner, step, gpus, assumed) for gpus in (1, 8))
    assert one.steps == 100 * 48_595 / 4 and eight.steps == round(one.steps / 8)
    assert one.step_seconds == pytest.approx((step.forward_flop + step.backward_flop) / 1e14)
    assert one.price == pytest.approx(2 * one.steps * one.step_seconds / 3600)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours, rel=1e-4) and eight.hours == pytest.approx(
        one.hours / 8, rel=1e-4
    )
    weights = sum(m.weight_bytes + m.gradient_bytes + m.optimizer_bytes for m in module_budgets(captioner))
    assert one.memory_bytes == eight.memory_bytes == weights + step.activation_bytes
    assert run_budget(config, captioner, step, 1, Assumptions(operation_us=1e3)).step_seconds == step.operations / 1e3


def test_the_fused_step_is_nothing_beside_a_step(paper: tuple[Config, Captioner, StepBudget]) -> None:
    _, _, step = paper
    fused = fused_step(4, 64, 20, 768, 50)
    products = 3 * (6 * 4 * 64 * 20 * 768)  # similarity and both attends, and twice that backward
    assert products < fused.flop < 2 * products
    assert fused.flop < 0.05 * (step.forward_flop + step.backward_flop)


def test_the_command_prints_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", str(CONFIGS / "tiny.yaml"), "--gpus", "2", "--price-per-hour", "3"]) == 0
    text = capsys.readouterr().out
    assert "visual (prepare only)" in text and "3 USD a GPU hour" in text and "TFLOP forward" in text
    assert main(["budget", str(CONFIGS / "tiny.yaml"), "--set", "train.lr=1"]) == 2
    assert "lavcap budget: unknown key 'lr' in section 'train'" in capsys.readouterr().err
