"""Configs: read, override, refuse; every one that we ship is one, and builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavcap.config import (
    AudioOnly,
    Config,
    CrossAttention,
    Freeze,
    FullTuning,
    LoRA,
    LossConfig,
    OTAtt,
    PretrainedLanguage,
    PromptSet,
    QFormer,
)
from lavcap.config_file import config_from_dict, config_to_dict, load_config, save_config

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_config_reads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == config == config_from_dict(config_to_dict(config))


def test_the_papers_numbers() -> None:
    config = load_config(CONFIGS / "lavcap.yaml")
    assert config.audio.tuning == config.language.tuning == LoRA(8, 32.0, 0.1)
    assert (config.solver.epsilon, config.solver.num_iters, config.loss.ot_weight) == (0.1, 50, 1.0)
    train = config.train
    assert (train.epochs, train.warmup_epochs, train.learning_rate, train.weight_decay) == (100, 2, 5e-6, 1e-6)
    assert (train.beta1, train.beta2, train.batch_size) == (0.9, 0.999, 4)
    assert (config.generation.beams, config.generation.max_new_tokens) == (4, 200)


def test_each_row_differs_from_the_paper_in_its_own_setting_only() -> None:
    paper = config_to_dict(load_config(CONFIGS / "lavcap.yaml"))
    changed = {}
    for path in ALL:
        if path.stem.startswith("table"):
            row = config_to_dict(load_config(path))
            changed[path.stem] = {key for key in paper if row[key] != paper[key]}
    assert changed == {
        "table2_audio": {"fusion", "loss"},
        "table2_audio_visual": {"fusion", "loss"},
        "table2_audio_visual_ot_loss": {"fusion"},
        "table3_q_former": {"fusion"},
        "table3_joint_encoder": {"fusion"},
        "table3_cross_attention": {"fusion"},
        "table3_ot_att": set(),
        "table4_full_freeze": {"audio", "language"},
        "table4_lora_freeze": {"language"},
        "table4_full_lora": {"audio"},
        "table4_lora_lora": set(),
        "table6_prompt_i": set(),
        "table6_prompt_ii": {"prompts"},
        "table6_prompt_iii": {"prompts"},
    }
    assert load_config(CONFIGS / "table4_full_freeze.yaml").audio.tuning == FullTuning()
    assert load_config(CONFIGS / "table4_full_freeze.yaml").language.tuning == Freeze()


def test_settings_on_top() -> None:
    config = load_config(
        CONFIGS / "lavcap.yaml",
        ["train.learning_rate=1e-4", "fusion.kind=q_former", "fusion.queries=8"]
        + ["audio.spec_augment=null", "prompts=ii"],
    )
    assert config.train.learning_rate == 1e-4
    assert config.fusion == QFormer(queries=8)
    assert config.audio.spec_augment is None and config.prompts is PromptSet.II
    assert load_config(CONFIGS / "lavcap.yaml", ["language.tuning.kind=full"]).language == PretrainedLanguage(
        tuning=FullTuning()
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.lr=1", r"unknown key 'lr' in section 'train'; it has: .*learning_rate"),
        ("trian.epochs=1", r"unknown key 'trian' in the config; it has: audio, visual, language"),
        ("fusion.kind=attention", r"fusion.kind is one of: audio_only, .*ot_att.*; got 'attention'"),
        ("fusion.queries=3", r"unknown key 'queries' in section 'fusion'"),
        ("audio.size=large", r"audio.size is one of: tiny, mini, small, base, nano; got 'large'"),
        ("train.epochs=true", r"train.epochs takes a number, got True"),
        ("train.batch_size=2.5", r"train.batch_size takes a whole number, got 2.5"),
        ("train.output=3", r"train.output takes text, got 3"),
        ("audio.pool_frequency=1", r"audio.pool_frequency takes true or false, got 1"),
        ("train=3", r"section 'train' takes keys of its own, got 3"),
        ("train.epochs", r"--set takes key.sub=value, got 'train.epochs'"),
    ],
)
def test_errors_name_key_section_and_what_is_known(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS / "lavcap.yaml", [setting])


def test_sections_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"audio_only has nothing to align: set loss.ot_weight=0"):
        Config(fusion=AudioOnly())
    with pytest.raises(ValueError, match=r"prompts iii needs .* cross_attention does not give"):
        Config(fusion=CrossAttention(), prompts=PromptSet.III)
    assert Config(fusion=AudioOnly(), loss=LossConfig(ot_weight=0)).fusion == AudioOnly()
    assert Config(prompts=PromptSet.III).fusion == OTAtt()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*none.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="round in a circle"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"must hold 'section: \.\.\.' lines, got list"):
        load_config(tmp_path / "list.yaml")
