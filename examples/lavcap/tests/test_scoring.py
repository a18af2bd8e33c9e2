"""Scores against pycocoevalcap's own classes, resampling against scoring again, and the figures that people reach."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from lavcap.cli import main
from lavcap.data.captions import read_captions
from lavcap.scoring import java, spice
from lavcap.scoring.agreement import human_agreement
from lavcap.scoring.bootstrap import intervals
from lavcap.scoring.metrics import MeteorScorer, Metric, Scores, score_captions, score_tokens
from lavcap.scoring.report import markdown, score_report
from lavcap.scoring.tokens import tokenise
from media import REAL_DATA

needs_java = pytest.mark.usefixtures("java")
RESULTS = Path(__file__).parents[1] / "results"

# Human agreement on AudioCaps test, as measured elsewhere with pycocoevalcap 1.2's own classes on Java 17.
PUBLISHED = {
    "all": (0.6541, 0.4884, 0.3729, 0.2905, 0.4949, 0.2878, 0.9076),
    "subset": (0.6538, 0.4880, 0.3725, 0.2900, 0.4951, 0.2878, 0.9105),
}
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr-D")

REFERENCES = {
    "a_1": ["A man speaks, and a dog barks.", "A dog is barking while a man talks"],
    "b_2": ["Rain falls on a tin roof", "Heavy rain falling", "It's raining (hard)"],
    "c_3": ["An engine idles", "A truck engine runs idle - then stops!"],
    "d_4": ["Birds chirp", "Birds are chirping in the distance"],
    "e_5": ["A crowd cheers and claps", "People applaud"],
}
PREDICTIONS = {
    "a_1": "a man talks as a dog barks",
    "b_2": "rain falls on a tin roof",  # is a reference: METEOR counts its chunk apart
    "c_3": "a vehicle engine is running",
    "d_4": "Birds chirping, far away",
    "e_5": "",  # a captioner may say nothing
}


@pytest.fixture
def scores(java: None) -> Scores:
    return score_captions(PREDICTIONS, REFERENCES)


def figures(scores: Scores) -> dict[str, float]:
    return {metric.name: metric.score for metric in scores.metrics}


def test_scores_are_pycocoevalcaps(scores: Scores, meteor: MeteorScorer) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def own(captions: dict[str, list[str]]) -> dict[str, list[str]]:
        return PTBTokenizer().tokenize({k: [{"caption": text} for text in texts] for k, texts in captions.items()})

    truths, guesses = own(REFERENCES), own({k: [text] for k, text in PREDICTIONS.items()})
    assert tokenise(REFERENCES) == truths and truths["b_2"][2] == "it 's raining -lrb- hard -rrb-"
    expected = dict(zip(NAMES, Bleu(4).compute_score(truths, guesses, verbose=0)[0]))
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr-D", Cider())):
        expected[name] = float(scorer.compute_score(truths, guesses)[0])
    expected["METEOR"] = Meteor.compute_score(meteor, truths, guesses)[0]
    assert figures(scores) == expected


@needs_java
def test_line_ends_inside_a_caption_do_not_shift_the_others() -> None:
    """Java takes more characters for the end of a line than captions should suffer from."""
    odd = {"a": ["one\rtwo\u2028three"], "b": ["four\n\x85five"], "c": ["..."], "d": ["six"]}
    assert tokenise(odd) == {"a": ["one two three"], "b": ["four five"], "c": [""], "d": ["six"]}


def test_sums_give_the_scores(scores: Scores) -> None:
    assert tuple(metric.name for metric in scores.metrics) == NAMES
    for metric in scores.metrics:
        assert metric.of_sums(metric.summands.sum(0)) == pytest.approx(metric.score, rel=1e-12)
        assert metric.of_sums(metric.summands) == pytest.approx(metric.per_clip, rel=1e-12, abs=1e-12)


def test_a_resample_is_scored_as_the_scorers_would(scores: Scores, meteor: MeteorScorer) -> None:
    """Clips drawn twice and not at all; CIDEr-D is apart, whose document frequencies stay those of the whole set."""
    drawn = ["a_1", "a_1", "b_2", "c_3", "b_2"]
    copies = {f"{clip_id} {i}": clip_id for i, clip_id in enumerate(drawn)}
    truths, guesses = tokenise(REFERENCES), tokenise({k: [text] for k, text in PREDICTIONS.items()})
    again = score_tokens({k: guesses[v] for k, v in copies.items()}, {k: truths[v] for k, v in copies.items()}, meteor)
    counts = np.array([drawn.count(clip_id) for clip_id in REFERENCES])
    for metric, expected in zip(scores.metrics, again.metrics):
        if metric.name != "CIDEr-D":
            assert metric.of_sums(counts @ metric.summands) == pytest.approx(expected.score, rel=1e-12), metric.name


def test_intervals_are_those_of_theory() -> None:
    """Of a mean of many independent values: ± 1.96 standard errors."""
    values = np.random.default_rng(5).normal(0.4, 0.2, size=1000)
    summands = np.stack([values, np.ones_like(values)], 1)
    metric = Metric("mean", float(values.mean()), values, summands, lambda sums: sums[..., 0] / sums[..., 1])
    low, high = intervals([metric], resamples=3000, seed=1)["mean"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert intervals([metric], resamples=50, seed=1) == intervals([metric], resamples=50, seed=1)
    assert intervals([metric], resamples=50, seed=1) != intervals([metric], resamples=50, seed=2)
    with pytest.raises(ValueError, match="got 0 and"):
        intervals([metric], resamples=0)


@needs_java
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="AudioCaps' captions (../shared/data) are not here")
def test_human_agreement_of_some_clips(meteor: MeteorScorer) -> None:
    """Fast: a mean over the captions left out, and subsets scored as sets of their own. The whole: a test below."""
    clips = dict(list(read_captions(REAL_DATA / "audiocaps" / "test.csv").items())[:12])
    half = frozenset(list(clips)[:6])
    found = human_agreement(clips, half)
    alone = human_agreement({clip_id: clips[clip_id] for clip_id in half})
    assert found["subset"] == pytest.approx(alone["all"], rel=1e-12)
    tokens = tokenise(clips)
    one = [
        score_tokens({k: [v[i]] for k, v in tokens.items()}, {k: v[:i] + v[i + 1 :] for k, v in tokens.items()}, meteor)
        for i in range(5)
    ]
    for name in NAMES:
        assert found["all"][name] == pytest.approx(np.mean([figures(scores)[name] for scores in one]), rel=1e-12)
    assert found["all"]["clips"] == 12 and found["subset"]["clips"] == 6


def test_human_agreement_on_all_of_audiocaps_is_as_published() -> None:
    """Measured by 'make human-agreement'; its result is in the repository."""
    result = json.loads((RESULTS / "human-agreement.json").read_text())
    assert {name: figures["clips"] for name, figures in result["figures"].items()} == {"all": 975, "subset": 944}
    for name, expected in PUBLISHED.items():
        assert tuple(round(result["figures"][name][metric], 4) for metric in NAMES) == expected


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "pred.csv", tmp_path / "refs.csv"
    write(predictions, ["clip_id", "caption"], PREDICTIONS.items())
    rows = [(0, *k.split("_"), text) for k, texts in REFERENCES.items() for text in texts]
    write(references, ["audiocap_id", "youtube_id", "start_time", "caption"], rows)
    return predictions, references


def write(path: Path, header: list[str], rows) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@needs_java
def test_the_command_scores_anyones_captions(
    files: tuple[Path, Path], scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *map(str, files), "--out", str(tmp_path / "out"), "--resamples", "50"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "scores.md").read_text()
    assert "| LAVCap | 72.3 | – | – | 29.7 | 51.0 | 26.2 | 84.9 | 18.5 | 51.7 |" in printed
    assert f"**{100 * figures(scores)['BLEU-1']:.1f}**" in printed and "5 clips" in printed
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {name: figure["score"] for name, figure in report["metrics"].items()} == figures(scores)
    assert all(figure["low"] <= figure["score"] <= figure["high"] for figure in report["metrics"].values())

    rows = list(csv.DictReader((tmp_path / "out" / "captions.csv").read_text().splitlines()))
    assert rows[1]["clip_id"] == "b_2" and rows[1]["reference_3"] == "It's raining (hard)"
    assert float(rows[1]["METEOR"]) == 1.0
    capsys.readouterr()
    assert main(["score", str(tmp_path / "out" / "captions.csv"), str(files[1]), "--resamples", "50"]) == 0
    assert printed.splitlines()[2].split("|")[2:] == capsys.readouterr().out.splitlines()[2].split("|")[2:]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*PREDICTIONS.items()][:3], r"2 clips of the references have no prediction (d_4, e_5)"),
        ([*PREDICTIONS.items(), ("a_1", "again")], r"1 clips have more than one prediction (a_1)"),
        ([*PREDICTIONS.items(), ("z_9", "x")], r"1 predictions are of clips that the references do not have (z_9)"),
    ],
)
def test_ids_that_do_not_fit(files: tuple[Path, Path], rows, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(files[0], ["clip_id", "caption"], rows)
    assert main(["score", *map(str, files)]) == 2
    assert message in capsys.readouterr().err


def test_files_that_do_not_fit(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write(files[0], ["name", "text"], [("a_1", "x")])
    assert main(["score", *map(str, files)]) == 2
    assert "has the columns ['name', 'text']; it must have clip_id,caption or" in capsys.readouterr().err
    assert main(["score", "nowhere.csv", str(files[1])]) == 2
    assert "no caption file nowhere.csv" in capsys.readouterr().err


def test_without_java_it_says_what_to_install(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["score", *map(str, files)]) == 2
    assert "apt-get install default-jre-headless" in capsys.readouterr().err


def test_a_java_that_dies_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no memory left' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"METEOR's Java process ended: no memory left"), MeteorScorer() as dead:
        dead.score({"a": ["x"]}, {"a": ["y"]})
    with pytest.raises(RuntimeError, match=r"0 lines for 1 captions \(exit status 1\): no memory left"):
        tokenise({"a": ["x"]})


SCORE = """
import sys
from lavcap.scoring.metrics import score_captions
from pycocoevalcap.meteor import meteor
print(meteor.__file__, file=sys.stderr)
references = {"a": ["the dog barks"], "b": ["rain is falling"]}
for metric in score_captions({"a": "a dog barks", "b": "rain falls"}, references).metrics:
    print(metric.name, repr(float(metric.score)))
"""


def scored(**environment: str) -> tuple[str, str]:
    """Scores from a process of its own, with its own Java, and where it has pycocoevalcap from."""
    done = subprocess.run(
        [sys.executable, "-c", SCORE], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def plainly_scored(meteor: MeteorScorer) -> str:
    scores = scored()[0]
    assert 0 < float(scores.split("METEOR ")[1].split()[0]) < 1
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {"JAVA_TOOL_OPTIONS": "-Duser.language=de -Duser.country=DE"},
        {"_JAVA_OPTIONS": "-Xmx3g -Duser.language=fr"},
        {"JDK_JAVA_OPTIONS": "-Duser.language=ar -Duser.country=EG"},
        {"LC_ALL": "de_DE.UTF-8"},
    ],
    ids=str,
)
def test_scores_are_the_same_in_every_locale(plainly_scored: str, options: dict[str, str]) -> None:
    """German and French write decimal commas, Egyptian Arabic other digits: METEOR cannot read its own counts then."""
    assert scored(**options)[0] == plainly_scored


def test_scores_are_the_same_wherever_packages_lie(plainly_scored: str, tmp_path: Path) -> None:
    """Also with a folder for temporary files of such a name."""
    odd = tmp_path / "sp ace #1 50% m\u00fc"
    odd.mkdir()
    shutil.copytree(Path(spice.pycocoevalcap.__path__[0]), odd / "pycocoevalcap")
    path = os.pathsep.join([str(odd), *filter(None, [os.environ.get("PYTHONPATH")])])
    scores, where = scored(PYTHONPATH=path, TMPDIR=str(odd))
    assert str(odd) in where and scores == plainly_scored
    assert [entry.name for entry in odd.iterdir()] == ["pycocoevalcap"]


def test_what_java_gets_is_the_users_own_and_then_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPICE's Java is started by pycocoevalcap, from this process's environment."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx1g -Duser.language=de")
    monkeypatch.delenv("_JAVA_OPTIONS", raising=False)
    before = dict(os.environ)
    ours = "-Duser.language=en -Duser.country=US"
    with pytest.raises(KeyError), java.java_locale():
        assert os.environ["JAVA_TOOL_OPTIONS"] == f"-Xmx1g -Duser.language=de {ours}"
        assert os.environ["_JAVA_OPTIONS"] == ours
        raise KeyError
    assert dict(os.environ) == before


def test_a_java_that_does_not_run_is_named_and_before_the_search(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a bare macOS, where there is a ``java`` that only says where to get one."""
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in (["evaluate", str(tmp_path)], ["score", *map(str, files)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{stub} does not run (Unable to locate a Java Runtime.): install one" in error


def test_spice_says_what_is_missing(scores: Scores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spice, "_library", lambda: tmp_path)
    assert "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar not found" in str(spice.why_no_spice())
    (tmp_path / spice.JARS[0]).touch()
    assert str(spice.why_no_spice()).startswith("stanford-corenlp-3.6.0-models.jar not found")
    (tmp_path / spice.JARS[1]).touch()
    monkeypatch.setattr(spice, "java_version", lambda: 17)
    assert spice.why_no_spice() == "it runs on Java 8 or 11, and 'java' here is 17"
    monkeypatch.setattr(spice, "java_version", lambda: 11)
    assert spice.why_no_spice() is None


@needs_java
def test_spice_and_spider_where_they_can_run(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pycocoevalcap's Spice, which needs CoreNLP's models; it sorts the ids, as that does."""
    f_scores = {"a_1": 0.5, "b_2": 1.0, "c_3": 0.25, "d_4": 0.0, "e_5": 0.0}

    class Spice:
        def compute_score(self, truths, guesses):
            assert truths["b_2"][1] == "heavy rain falling" and guesses["e_5"] == [""]
            return 0.35, [{"All": {"f": f_scores[clip_id]}} for clip_id in sorted(truths)]

    module = types.ModuleType("pycocoevalcap.spice.spice")
    module.Spice = Spice  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", module)
    monkeypatch.setattr("lavcap.scoring.metrics.why_no_spice", lambda: None)
    backwards = dict(reversed(REFERENCES.items()))
    found, report = score_report(PREDICTIONS, backwards, name="test", resamples=20)
    by_name = {metric.name: metric for metric in found.metrics}
    assert by_name["SPICE"].per_clip.tolist() == [0.0, 0.0, 0.25, 1.0, 0.5] and not found.missing
    assert by_name["SPIDEr"].score == pytest.approx((0.35 + figures(scores)["CIDEr-D"]) / 2)
    assert "missing" not in markdown(report)
