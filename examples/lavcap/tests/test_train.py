"""lavcap train: what moves and what stays, how losses are averaged, which checkpoint is chosen, what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lavcap import checkpoint, train
from lavcap.captioner import load_captioner
from lavcap.cli import main
from lavcap.config import (
    AudioOnly,
    Concatenation,
    Config,
    CrossAttention,
    DataConfig,
    Engine,
    JointEncoder,
    OTAtt,
    Precision,
    QFormer,
    Tracker,
    VisualOnly,
)
from lavcap.config_file import save_config
from lavcap.data.sample import collate
from lavcap.draws import draw
from lavcap.files import alone_in
from lavcap.language import build_tokenizer
from lavcap.prompts import test_prompt
from lavcap.trainer import Counts, as_model_batch, refuse_sharding
from lavcap.visual import visual_fingerprint
from media import write_split
from small import WORDS, Clips, losses, small_config, small_trainer
from transformers import Trainer, TrainingArguments

import otfuse


def finished(config: Config, clips: int = 8) -> train.Captioning:
    trainer = small_trainer(config, clips=clips)
    train.run(trainer)
    return trainer


def test_frozen_weights_stay_and_trained_ones_move(tmp_path: Path) -> None:
    trainer = small_trainer(small_config(tmp_path))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    modes = set()
    trainer.model.register_forward_pre_hook(lambda module, args: modes.add(module.training))
    train.run(trainer)
    assert modes == {True, False}  # train() was called, again and again, which must not wake what is frozen
    trained = trainer.model.trained_state().keys()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trained)
    assert any("lora_B" in name for name in trained) and "projector.weight" in trained


SEPARATE = [AudioOnly(), VisualOnly(), Concatenation()]
FUSIONS = [*SEPARATE, OTAtt(), QFormer(heads=2), JointEncoder(heads=2), CrossAttention(heads=2)]


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion.kind)
def test_every_trained_weight_gets_a_gradient(tmp_path: Path, fusion: object) -> None:
    """Several processes wait for each other's gradients of every weight: one without would stop them."""
    config = small_config(tmp_path)
    alone = isinstance(fusion, (AudioOnly, VisualOnly))
    config = replace(config, fusion=fusion, loss=replace(config.loss, ot_weight=0.0 if alone else 1.0))  # type: ignore[arg-type]
    tokenizer = build_tokenizer(config.language, [" ".join(WORDS)])
    captioner = load_captioner(config, tokenizer)
    trainer = train.build_trainer(config, train.engine_arguments(config), captioner, tokenizer, Clips(4), Clips(2))
    captioner(**trainer.word(collate([Clips(4)[0], Clips(4)[1]]), 0)).loss.backward()
    assert [name for name, p in captioner.named_parameters() if p.requires_grad and p.grad is None] == []


def test_draws_depend_on_seed_step_and_clip_alone(tmp_path: Path) -> None:
    drawn = [draw(8, 0, step, f"clip {clip}") for step in range(50) for clip in range(50)]
    assert drawn == [draw(8, 0, step, f"clip {clip}") for step in range(50) for clip in range(50)]
    counts = torch.bincount(torch.tensor(drawn), minlength=8).double()
    expected = len(drawn) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi squared with 7 degrees, 0.1 % of honest draws
    assert drawn != [draw(8, 1, step, f"clip {clip}") for step in range(50) for clip in range(50)]
    with pytest.raises(ValueError, match="nothing to draw from for 'a'"):
        draw(0, 0, 0, "a")


def test_a_clip_gets_the_same_words_in_any_batch(tmp_path: Path) -> None:
    trainer, clips = small_trainer(small_config(tmp_path)), Clips(6)
    words = trainer.processing_class.decode

    def texts(batch: dict, item: int) -> list[str]:
        pieces = [ids[item][mask[item]] for ids, mask in zip(batch["prompt_ids"], batch["prompt_masks"])]
        return [words(piece) for piece in [*pieces, batch["labels"][item][batch["labels"][item] >= 0]]]

    seen = set()
    for step in range(12):
        one = texts(trainer.word(collate([clips[2]]), step), 0)
        assert texts(trainer.word(collate([clips[5], clips[0], clips[2]]), step), 2) == one
        seen.add(tuple(one))
    assert len({text[1] for text in seen}) > 3 and len({text[2] for text in seen}) == 3  # prompts, captions


def test_schedule_and_optimiser_are_the_papers(tmp_path: Path) -> None:
    config = small_config(tmp_path, learning_rate=5e-6, epochs=10.0, warmup_epochs=2.0)
    trainer = finished(config)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    warm, total = 8, 40
    for step, rate in enumerate(rates):
        share = step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        assert rate == pytest.approx(5e-6 * share, abs=1e-12)
    group = trainer.optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 1e-6
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert train.training_settings(Config())["max_grad_norm"] == 0.0  # the paper clips nothing


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    whole = finished(small_config(tmp_path / "whole", dropout=0.0, batch_size=4, learning_rate=1e-3))
    parts = finished(small_config(tmp_path / "parts", dropout=0.0, accumulation=2, learning_rate=1e-3))
    assert len(losses(whole)) == 6
    for ours, theirs in zip(losses(parts), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gradient_checkpointing_changes_memory_only(tmp_path: Path) -> None:
    plain = finished(small_config(tmp_path / "plain", epochs=2.0))
    trainer = small_trainer(small_config(tmp_path / "checkpointed", epochs=2.0))
    trainer.model.gradient_checkpointing_enable()
    train.run(trainer)
    for ours, theirs in zip(losses(trainer), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_compiled_model_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo's graphs and without its slow code generator."""
    plain = finished(small_config(tmp_path / "plain", dropout=0.0, epochs=2.0), clips=2)
    settings = train.training_settings
    monkeypatch.setattr(
        train, "training_settings", lambda config: settings(config) | {"torch_compile_backend": "eager"}
    )
    compiled = finished(small_config(tmp_path / "compiled", dropout=0.0, epochs=2.0, compile=True), clips=2)
    assert isinstance(compiled.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert losses(compiled)[0] == pytest.approx(losses(plain)[0], rel=1e-4)
    assert (tmp_path / "compiled" / "checkpoint-2" / checkpoint.WEIGHTS).exists()


def test_bfloat16_leaves_the_solver_in_float32(tmp_path: Path) -> None:
    trainer = small_trainer(small_config(tmp_path / "half", dropout=0.0, precision=Precision.BFLOAT16, epochs=2.0))
    errors = []

    def measure(module: torch.nn.Module, args: object, out: otfuse.nn.OTFusionOutput) -> None:
        columns = out.plan.sum(1)  # of as many as there are pictures
        errors.append((columns - (columns > 0) / (columns > 0).sum(1, keepdim=True)).abs().max().item())

    trainer.model.fusion.ot.register_forward_hook(measure)
    train.run(trainer)
    assert max(errors) < 1e-6  # columns of a plan are exact to a rounding: a relative 1e-7, in bfloat16 4e-3
    full = finished(small_config(tmp_path / "full", dropout=0.0, epochs=2.0))
    # bfloat16 has 8 bits: tokens differ by 0.4 %, and what is computed of them by some of that.
    assert losses(trainer)[0] == pytest.approx(losses(full)[0], rel=0.02)


def test_validation_counts_every_caption_and_clip_once(tmp_path: Path) -> None:
    trainer = small_trainer(small_config(tmp_path, batch_size=2), validation=5)
    measured = trainer.evaluate()["eval_loss"]
    prompt, expected = test_prompt(trainer.config.prompts), []
    for sample in trainer.eval_dataset:
        own = []
        for caption in sample.captions:
            batch = as_model_batch(trainer.processing_class, collate([sample]), [prompt], [caption])
            with torch.no_grad():
                own.append(trainer.model(**batch).ce_loss.item())
        expected.append(sum(own) / len(own))
    assert measured == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_the_checkpoint_with_the_best_validation_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(small_config(tmp_path, keep_checkpoints=1))
    measured = iter([3.0, 1.0, 2.0])
    evaluate = type(trainer).evaluate

    def pretend(self: train.Captioning, *args: object, **kwargs: object) -> dict[str, float]:
        evaluate(self)
        return {"eval_loss": next(measured)}

    monkeypatch.setattr(type(trainer), "evaluate", pretend)
    train.run(trainer)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]
    assert checkpoint.best_checkpoint(tmp_path).name == "checkpoint-8"


def test_a_checkpoint_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    trainer = finished(small_config(tmp_path, sample_captions=2))
    loaded = checkpoint.load_checkpoint(tmp_path / "checkpoint-12")
    assert loaded.config == trainer.config and not loaded.captioner.training
    batch = trainer.word(collate([Clips(2)[0], Clips(2)[1]]), 0)
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(**batch).logits, loaded.captioner(**batch).logits
    assert torch.equal(ours, theirs)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-12").rglob("*"))
    assert size < 200_000  # LoRA of rank 2 and the projector, twice more in the optimiser, and the tokenizer
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["clip_id"]) for line in lines[-2:]] == [(12, "clip_0"), (12, "clip_1")]
    assert lines[-1]["reference"] == Clips(3, seed=1)[1].captions[0]


def test_tensorboard_gets_the_losses(tmp_path: Path) -> None:
    finished(small_config(tmp_path, epochs=2.0, tracker=Tracker.TENSORBOARD))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"train/ot_loss" in events.read_bytes()


def test_a_nan_is_shown_and_not_averaged_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(small_config(tmp_path, epochs=2.0))
    trainer.model.projector.weight.data.fill_(math.nan)
    train.run(trainer)
    assert math.isnan(losses(trainer)[0][0])


def test_the_command_says_what_to_do_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    assert main(["train", str(config), "--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert "make it with 'lavcap prepare'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def other(config: Config, section: str, **values: object) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"epochs": 0.0}, "train.epochs must be positive, got 0.0"),
        ("train", {"batch_size": -1}, "train.batch_size must be positive, got -1"),
        ("train", {"checkpoint_steps": 0}, "train.checkpoint_steps must be positive or null, got 0"),
        ("train", {"warmup_epochs": 100.0}, "train.warmup_epochs must be from 0 to below train.epochs, 100.0"),
        ("data", {"validation_split": "test"}, "both 'test': the checkpoint would be chosen on the test set"),
    ],
)
def test_settings_that_no_run_can_have(section: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.check(other(Config(), section, **values))


def test_memorising_may_use_one_split_for_all() -> None:
    train.check(Config(data=DataConfig(train_split="clips", validation_split="clips", test_split="clips")))


def test_too_few_clips_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 training clips do not fill one batch of 16"):
        small_trainer(small_config(tmp_path, batch_size=16))


def test_a_run_is_not_continued_with_another_config(tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=2.0)
    train.claim(tmp_path, config)
    train.claim(tmp_path, other(config, "train", learning_rate=1.0))  # nothing is trained yet
    train.claim(tmp_path, config)
    finished(config)
    train.claim(tmp_path, other(other(config, "train", log_steps=7), "data", folder="moved"))
    with pytest.raises(ValueError, match=r"another config, which differs in audio.size, train.learning_rate: name"):
        train.claim(tmp_path, other(other(config, "train", learning_rate=1.0), "audio", size=train.Config().audio.size))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.WEIGHTS])
def test_a_run_does_not_go_on_from_half_a_checkpoint(tmp_path: Path, name: str) -> None:
    """With a new optimiser, schedule or random state it would end with other weights, and nothing would show."""
    finished(small_config(tmp_path, epochs=1.0, warmup_epochs=0.5, checkpoint_steps=2), clips=6)
    newest, older = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    assert checkpoint.checkpoints(tmp_path) == [older, newest]
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing.*, and {older} is taken"):
        finished(small_config(tmp_path, epochs=1.0, warmup_epochs=0.5, checkpoint_steps=2), clips=6)
    (newest / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged.*, and {older} is taken"):
        finished(small_config(tmp_path, epochs=1.0, warmup_epochs=0.5, checkpoint_steps=2), clips=6)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second says so before it touches what the first is writing; when the first has ended, it may."""
    data, run = tmp_path / "data", tmp_path / "run"
    for split in ("clips", "others"):
        write_split(data, split, 4, clips_per_shard=4)
    config = other(small_config(run), "data", folder=str(data), train_split="clips", validation_split="others")
    save_config(config, tmp_path / "config.yaml")
    for split in ("clips", "others"):
        settings = data / split / "settings.json"
        settings.write_text(
            json.dumps(json.loads(settings.read_text()) | {"visual": visual_fingerprint(config.visual)})
        )
    half_written = run / ".unfinished-checkpoint-4"
    half_written.mkdir(parents=True)
    holder = (
        "import sys; from pathlib import Path; from lavcap.files import alone_in\n"
        "with alone_in(Path(sys.argv[1]), 'lavcap train'): print('at work', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "at work\n"
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        first.communicate("")
    error = capsys.readouterr().err
    assert f"lavcap train: another 'lavcap train' is at work in {run}: wait for it, or end it\n" in error
    assert half_written.is_dir() and sorted(path.name for path in run.iterdir()) == [".lock", half_written.name]
    with alone_in(run, "lavcap train"):
        train.claim(run, config)
    assert not half_written.exists()


def test_ways_of_sharing_that_are_refused() -> None:
    refuse_sharding(types.SimpleNamespace(fsdp_plugin=None))
    refuse_sharding(types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(fsdp_version=2)))
    refuse_sharding(types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=2)))
    with pytest.raises(ValueError, match="set fsdp_version: 2"):
        refuse_sharding(types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        refuse_sharding(types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=3)))


def test_counts_stay_on_the_device_of_the_batch() -> None:
    lengths = torch.empty(2, dtype=torch.long, device="meta")
    batch = {"labels": torch.empty(2, 5, device="meta"), "num_samples": lengths, "num_frames": lengths}
    assert torch.stack(Counts.of(batch)).device.type == "meta"  # stands for a GPU: nothing comes from elsewhere


def test_a_run_goes_on_with_as_many_processes(tmp_path: Path) -> None:
    config = small_config(tmp_path, epochs=2.0)
    finished(config)
    (tmp_path / "checkpoint-8" / "rng_state_1.pth").touch()
    with pytest.raises(ValueError, match="was written by 2 processes and now there are 1"):
        finished(config)


def test_sharded_optimisers_are_written_without_frozen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of FSDP and DeepSpeed, which need GPUs; what they are called on and with is ours."""
    trainer, calls = small_trainer(small_config(tmp_path)), []
    trainer.create_optimizer_and_scheduler(4)
    monkeypatch.setattr("lavcap.trainer.save_fsdp_optimizer", lambda *args: calls.append(args[2:]))
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", "plugin", raising=False)
    trainer.is_fsdp_enabled = True
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    assert calls.pop() == (trainer.optimizer, trainer.model, str(tmp_path))
    assert torch.load(tmp_path / "scheduler.pt", weights_only=True)["last_epoch"] == 0

    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = False, True
    trainer.model_wrapped = types.SimpleNamespace(
        save_checkpoint=lambda folder, **options: calls.append((folder, options)),
        load_checkpoint=lambda folder, **options: calls.append((folder, options)),
    )
    monkeypatch.setattr(Trainer, "_prepare_for_training", lambda self, *args: calls.append(args) or "ready")
    trainer._save_optimizer_and_scheduler("there")
    assert calls.pop() == ("there", {"exclude_frozen_parameters": True})
    assert trainer._prepare_for_training(4, "loader", "there") == "ready"
    assert calls == [(4, "loader", None), ("there", {"load_module_strict": False})]


def gaudi(recorded: list[object]) -> types.ModuleType:
    """What optimum-habana offers, on transformers' own Trainer, with the loop's other name for its batches."""
    module = types.ModuleType("optimum.habana")

    class GaudiConfig:
        def __init__(self, **settings: object) -> None:
            recorded.append(settings)

    class GaudiTrainingArguments(TrainingArguments):
        def __init__(self, use_habana: bool, **settings: object) -> None:
            recorded.append(use_habana)
            super().__init__(**settings)  # type: ignore[arg-type]

    class GaudiTrainer(Trainer):
        def __init__(self, gaudi_config: GaudiConfig, **parts: object) -> None:
            super().__init__(**parts)  # type: ignore[arg-type]

        def _run_epoch(self, **settings: object) -> None:
            self.get_batch_samples = self.get_batch_samples_transformers  # type: ignore[attr-defined, method-assign]
            super()._run_epoch(**settings)

    module.GaudiConfig, module.GaudiTrainer = GaudiConfig, GaudiTrainer  # type: ignore[attr-defined]
    module.GaudiTrainingArguments = GaudiTrainingArguments  # type: ignore[attr-defined]
    return module


def test_optimum_habana_runs_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.delitem(sys.modules, "lavcap.habana", raising=False)
    monkeypatch.setitem(sys.modules, "optimum.habana", gaudi(recorded))
    trainer = finished(small_config(tmp_path / "gaudi", engine=Engine.OPTIMUM_HABANA))
    assert type(trainer).__name__ == "GaudiCaptionTrainer"
    assert recorded == [True, {"use_fused_adam": True, "use_fused_clip_norm": False, "use_torch_autocast": False}]
    assert losses(trainer) == losses(finished(small_config(tmp_path / "stock")))
    monkeypatch.delitem(sys.modules, "lavcap.habana")


def test_optimum_habana_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lavcap.habana", raising=False)
    monkeypatch.setitem(sys.modules, "optimum.habana", None)
    with pytest.raises(ValueError, match=r"Install lavcap\[habana\] in an environment of its own"):
        train.engine_arguments(small_config(tmp_path, engine=Engine.OPTIMUM_HABANA))
