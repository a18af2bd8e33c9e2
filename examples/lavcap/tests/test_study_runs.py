"""Runs of the study: every arm takes steps, the same weights to begin with, resuming, intervals, tables, the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lavcap.study import __main__ as study
from lavcap.study import training
from lavcap.study.conditions import LOSSES, SEEDS, Condition, arms, everything, package_config, sweeps
from lavcap.study.statistics import _T, Estimate, estimate, paired
from lavcap.study.store import read_runs
from lavcap.study.tables import chosen_rate, fill_page, mean_by_seed, table_arms, table_contrasts, table_sweep
from lavcap.study.task import draw_clips
from lavcap.study.words import caption_ids

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "examples" / "lavcap" / "results" / "study" / "runs.json"
PAGE = ROOT / "docs" / "study.md"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TEACHING_STEPS", 3)
    training._taught.cache_clear()


VARIANTS = [
    *arms(),
    Condition("barycentric", one_clock=True),
    Condition("barycentric", "similarity", pool=False, gradient="implicit"),
    Condition("barycentric", "similarity", gradient="detach", rounds=1, epsilon=0.02),
]


@pytest.mark.parametrize("condition", VARIANTS, ids=lambda one: one.key)
def test_every_arm_takes_steps_and_is_scored(condition: Condition) -> None:
    result = training.run(replace(condition, steps=3), test_clips=8)
    assert [step for step, *_ in result["losses"]] == [1, 2, 3]
    assert all((ot is not None) == (condition.loss != "none") for _, _, ot in result["losses"])
    assert result["losses"][-1][1] < result["losses"][0][1]
    assert 0 <= result["alignment"]["right_frame"] <= 1 and set(result["test"]) == set(result["validation"])
    assert json.loads(json.dumps(result)) == result


def test_a_run_is_the_same_every_time() -> None:
    first = training.run(Condition("barycentric", "similarity", steps=2), test_clips=8)
    training._taught.cache_clear()
    again = training.run(Condition("barycentric", "similarity", steps=2), test_clips=8)
    del first["seconds"], again["seconds"]
    assert first == again


def test_arms_of_a_seed_begin_with_the_same_weights_and_clips() -> None:
    models = [training.build(Condition(fusion, seed=1)) for fusion in ("concatenation", "cross_attention", "plan")]
    shared = [{k: v for k, v in model.state_dict().items() if not k.startswith("fusion.")} for model in models]
    for other in shared[1:]:
        assert other.keys() == shared[0].keys() and all(torch.equal(shared[0][k], other[k]) for k in other)
    assert not torch.equal(shared[0]["projector.weight"], training.build(Condition("plan")).projector.weight)


def test_one_clock_gives_both_sides_the_same_places() -> None:
    model = training._started(Condition("plan", one_clock=True))
    assert torch.equal(model.audio.time_place[::2], model.visual.time_place)
    assert torch.equal(model.audio.time_place[1::2], model.visual.time_place)
    assert not torch.equal(training._started(Condition("plan")).audio.time_place[::2], model.visual.time_place)


def test_training_test_and_validation_clips_differ() -> None:
    captions = [caption_ids(draw_clips(4, seed).script) for seed in (0, training.TEST_SEED, training.VALIDATION_SEED)]
    assert not torch.equal(captions[0], captions[1]) and not torch.equal(captions[1], captions[2])
    last = (max(one.seed for one in everything()) + 1) * training.SEEDS_A_RUN
    assert max(one.steps for one in everything()) < training.TEACHING_SEED and last < training.VALIDATION_SEED


def test_each_side_is_taught_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TEACHING_STEPS", 40)
    model = training.build(Condition("concatenation"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taught = training._taught(0, True)
    moved = {name for name, value in taught.items() if not torch.equal(value, before[name])}
    assert moved == {f"{side}.{name}" for side, names in TAUGHT.items() for name in names}


TAUGHT = {
    "audio": ("embed.weight", "embed.bias", "row_place", "net.1.weight", "net.1.bias"),
    "visual": ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"),
}


def test_keys_are_one_for_each_condition() -> None:
    runs = everything()
    assert len({one.key for one in runs}) == len(runs) == len(set(runs))
    assert Condition("plan").key == "plan none seed=0"
    assert Condition("plan", epsilon=0.2, seed=3).key == "plan none epsilon=0.2 seed=3"


def test_both_forms_of_the_loss_are_the_packages() -> None:
    public, default = package_config(Condition("plan", "assignment")).loss, package_config(Condition("plan")).loss
    assert (public.assignment.value, public.contrast.value) == ("log_plan", "assignment")
    assert public.temperature == pytest.approx(0.376, abs=1e-3) and default.ot_weight == 0
    assert {loss.contrast.value for loss in LOSSES.values()} == {"similarity", "assignment"}


def made_up(condition: Condition) -> dict[str, Any]:
    value = 0.1 * condition.seed + 0.05 * len(condition.loss)
    scores = dict.fromkeys(("pair", "object", "sound", "order", "exact"), value)
    alignment = {"right_frame": value, "marginal_error": 1e-3}
    losses = [[50, 1.0, None], [100, 0.5, None]]
    return condition.settings() | {"test": scores, "validation": scores, "alignment": alignment, "losses": losses}


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    conditions, file, calls = everything()[:5], tmp_path / "study" / "runs.json", []

    def one(condition: Condition) -> dict[str, Any]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(condition)
        return made_up(condition)

    with pytest.raises(KeyboardInterrupt):
        study.run_missing(conditions, file, "test", one=one)
    assert list(read_runs(file)) == [one.key for one in conditions[:2]]
    study.run_missing(conditions, file, "test", one=made_up)
    assert read_runs(file) == {one.key: made_up(one) for one in conditions}
    study.run_missing(conditions, file, "test", one=one)  # would raise if anything were run again
    assert json.loads(file.read_text())["conditions"]["machine"] == "test"
    assert [path.name for path in file.parent.iterdir()] == ["runs.json"]


def test_no_run_begins_after_the_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.run_missing(everything()[:3], tmp_path / "runs.json", "test", minutes=-1, one=made_up)
    assert "3 runs left" in capsys.readouterr().out and not read_runs(tmp_path / "runs.json")


def test_intervals_have_known_answers() -> None:
    from scipy import stats

    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, len(_T) + 1)], abs=5e-5) == _T
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx(Estimate(2.0, 4.3027 / math.sqrt(3), 3))
    assert estimate([5.0]) == Estimate(5.0, math.inf, 1)
    values = [0.31, 0.52, 0.44, 0.38]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    mean, half, _ = estimate(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-5)
    for values in ([], [0.0] * 99):
        with pytest.raises(ValueError, match=f"got {len(values)}"):
            estimate(values)


def test_differences_are_of_the_same_seeds() -> None:
    """A constant gain over noisy seeds is certain, though the two intervals overlap."""
    one, other = {0: 0.2, 1: 0.9, 2: 0.5, 7: 0.0}, {0: 0.1, 1: 0.8, 2: 0.4, 8: 1.0}
    gain = paired(one, other)
    assert gain is not None and gain.mean == pytest.approx(0.1) and gain.seeds == 3 and gain.excludes_zero
    assert paired({0: 1.0}, {1: 1.0}) is None
    single = paired({0: 1.0}, {0: 0.5})
    assert single is not None and not single.excludes_zero


def test_tables_show_means_intervals_and_what_was_not_run() -> None:
    runs = {one.key: made_up(one) for one in everything() if one.fusion != "cross_attention"}
    lines = table_arms(runs).splitlines()
    assert len(lines) == 2 + len(arms())
    plain = next(line for line in lines if line.startswith("| concatenation | none"))
    assert "| 30.0 ± 24.8 |" in plain and "not run" not in plain
    gain = next(line for line in lines if line.startswith("| OT-Att, `plan` | similarity"))
    assert "**+30.0 ± 0.0**" in gain
    assert "not run" in next(line for line in lines if line.startswith("| cross-attention"))
    assert mean_by_seed(runs, [Condition("plan"), Condition("plan", "similarity")], "pair", "test") == pytest.approx(
        {seed: 0.1 * seed + 0.35 for seed in SEEDS}
    )
    contrasts = table_contrasts({one.key: made_up(one) for one in everything()})
    assert "| OT loss: similarity, less none | 3 | **+30.0 ± 0.0** | **+30.0 ± 0.0** |" in contrasts
    assert table_sweep(runs, "epsilon").count("\n") == 1 + len(sweeps()["epsilon"])
    with pytest.raises(ValueError, match="'speed'"):
        fill_page("<!-- speed -->\n<!-- end -->", runs)


def test_pictures_are_drawn_of_whatever_was_run_and_are_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lavcap.study.plots import write_plots

    runs = {one.key: made_up(one) for one in everything() if one.seed == 0 and one.fusion != "plan"}
    pictures = {path.name: path.read_text() for path in write_plots(runs, tmp_path)}
    assert pictures == {path.name: path.read_text() for path in write_plots(runs, tmp_path)}
    assert set(pictures) == {"study-arms.svg", "study-learning.svg", "study-sweeps.svg"}
    assert all(text.rstrip().endswith("</svg>") for text in pictures.values())


def test_a_clip_is_drawn_with_what_two_captioners_make_of_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lavcap.study.sample import SHOWN, write_sample

    write_sample(tmp_path / "sample.svg", [training.build(condition) for condition in SHOWN])
    assert "</svg>" in (tmp_path / "sample.svg").read_text()


# What is committed.


def test_the_page_holds_the_tables_of_the_result_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- end -->") >= 7
    assert fill_page(page, read_runs(RESULTS)) == page


def test_the_committed_runs_are_whole_and_the_learning_rate_is_the_one_chosen() -> None:
    runs = read_runs(RESULTS)
    assert runs.keys() == {one.key for one in everything()}
    assert chosen_rate(runs) == Condition("plan").learning_rate
    assert all(run["losses"][-1][0] == run["steps"] for run in runs.values())


def test_what_the_page_says_in_words_is_in_the_runs() -> None:
    runs = read_runs(RESULTS)

    def of(condition: Condition, measure: str = "pair", group: str = "test") -> list[float]:
        return [runs[replace(condition, seed=seed).key][group][measure] for seed in SEEDS]

    fusions = ("concatenation", "cross_attention", "plan", "barycentric")
    gains = [
        with_loss - without
        for fusion in fusions
        for loss in ("similarity", "assignment")
        for with_loss, without in zip(of(Condition(fusion, loss)), of(Condition(fusion)))
    ]
    assert (sum(gain > 0 for gain in gains), len(gains)) == (22, 24)
    for fusion in fusions:
        aligned = of(Condition(fusion, "similarity"), "right_frame", "alignment")
        losses = [runs[Condition(fusion, "similarity", seed=seed).key]["losses"][-1][2] for seed in SEEDS]
        assert max(losses) < 0.2 and sum(aligned) / len(aligned) == pytest.approx(1 / 8, abs=0.02)
    for loss in ("none", "similarity"):
        assert min(of(Condition("barycentric", loss, one_clock=True))) > 0.98
    assert max(of(Condition("concatenation", one_clock=True))) < 0.5
