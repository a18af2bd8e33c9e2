"""The report of benchmarks, from fabricated result files: what it says, draws and calls slower."""

from __future__ import annotations

import copy
import json
import re
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import plots
from benchmarks import report as reporter


def conditions(**changes):
    versions = {"otfuse": "0.1.0", "torch": "2.13.0", "POT": "0.9.7", "geomloss": None}
    facts = {"date": "2026-01-02", "device": "cpu", "machine": "A machine", "note": "shared", "cores": 2, "threads": 1}
    limits = {"copy_gb_per_s": 10.0, "product_gflop_per_s": {"float32": 40.0}}
    return {**facts, "python": "3.11", "versions": versions, "commit": "abc", "limits": limits, **changes}


def row(suite, contender, median, *, B=4, **changes):
    op = "solve" if suite in ("solve", "accuracy") else "attend"
    facts = {"op": op, "size": "lavcap", "B": B, "N": 64, "M": 20, "D": 768, "epsilon": 0.1, "dtype": "float32"}
    timed = {"median_ms": median, "quartiles_ms": [0.98 * median, 1.02 * median], "times_ours": median, "turns": 9}
    rated = {"share_of_limit": 0.5 / median, "limit": "copy", "gb_per_s": 5.0, "gflop_per_s": 7.0}
    name = {"case": f"{op} lavcap-{B}x64x20x768 float32 forward", "contender": contender, "suite": suite}
    more = {"grad": None, "tol": None, "tokens": "clustered", "iterations": 50, "error": 1e-7, "against": "rows first"}
    return {**facts, **timed, **rated, **name, **more, "note": "", **changes}


def memory_row(contender, matrices, promised):
    sizes = {"inputs_mb": 1.0, "outputs_mb": 1.0, "extra_mb": 4.0 * matrices, "promised_mb": promised}
    found = row("memory", contender, 1.0, case="memory of attend", matrices=matrices, **sizes)
    return {key: value for key, value in found.items() if key not in ("median_ms", "quartiles_ms", "times_ours")}


def step_row(part, median, times=1):
    return {
        "suite": "step", "case": "training step", "contender": part, "median_ms": median, "quartiles_ms": None,
        "forward_ms": median / 3, "backward_ms": 2 * median / 3, "times": times, "share": median / 1111, "batch": 4,
        "op": "step",
    }  # fmt: skip


def fabricated():
    peer, ours = "POT ot.batch sinkhorn", "otfuse cpu"
    rows = [row("solve", ours, 1.0, B=B) for B in (4, 32)] + [row("attend", ours, 2.0), row("attend", peer, 4.0)]
    rows.insert(1, row("solve", peer, 8.0, note="its own way"))
    for iterations in (10, 100):
        case = f"solve lavcap-4x64x20x768-{iterations}iterations float32 forward"
        rows.append(
            row("accuracy", ours, iterations / 50, case=case, iterations=iterations, from_converged=10 / iterations**3)
        )
        rows.append(
            row("accuracy", peer, iterations / 5, case=case, iterations=iterations, from_converged=1 / iterations)
        )
    for B in (1, 4, 16, 64, 256, 1024):
        rows.append(row("scaling", ours, 0.5 + 0.001 * B, B=B, axis="B", at=B))
    for side in (2, 4, 8):
        case, axis = f"solve square-{64 // side**2}x{side}x{side} float32 forward", "N = M, equal B N M"
        rows.append(row("scaling", ours, 1.0 + side, case=case, axis=axis, at=side))
    rows += [memory_row(ours, 0.0, 2.0), memory_row("log domain, eager", 24.0, None)]
    rows += [step_row("audio encoder", 1000.0), step_row("OT-Att", 1.0), step_row("decoder layers", 110.0, 32)]
    absent = {"Liger-Kernel mHC": {"it runs on CUDA only": ["a", "b"]}}
    return {
        "conditions": conditions(),
        "rows": rows,
        "absent": absent,
        "not_run": {"solve large": "the check takes long"},
    }


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "2026-01-02-a-machine.json", fabricated())


def written(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """``report.py`` with arguments: its exit code, and what it printed."""

    def report(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        try:
            reporter.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "")
        return types.SimpleNamespace(returncode=code, stdout=capsys.readouterr().out)

    return report


def test_the_page_says_what_was_measured(run, tmp_path, file):
    done = run(
        file, "--page", tmp_path / "page.md", "--html", tmp_path / "page.html", "--speed", tmp_path / "speed.svg"
    )
    assert done.returncode == 0, done.stdout
    page = (tmp_path / "page.md").read_text()
    for said in (
        "A machine (shared)", "torch 2.13.0", "commit abc", "a copy reached 10 GB/s", "40 in float32",
        "| solve lavcap-4x64x20x768 float32 forward | POT ot.batch sinkhorn (its own way) | 8 | 7.84 … 8.16 | 8 |",
        "| otfuse cpu | 0.2 | 0.2 | 2 | 2 | 2 | – |",  # milliseconds to a distance of 1e-1, 1e-2, …
        "`otfuse cpu`: time hardly grows from 1 to 64",
        "24.00", "it runs on CUDA only (2 cases)", "solve large: the check takes long", "**Owed:**", "an NVIDIA GPU",
    ):  # fmt: skip
        assert said in page, said
    pictures = re.findall(r"\]\((images/[^)]+\.svg)\)", page)
    kinds = (
        "solve-forward",
        "attend-forward",
        "limit",
        "accuracy-0.1",
        "memory",
        "growth-b",
        "growth-nmequalbnm",
        "budget",
    )
    assert [name for name in kinds if not any(name in picture for picture in pictures)] == []
    for picture in [*pictures, "speed.svg"]:
        assert ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")


def test_the_html_page_needs_no_other_file(run, tmp_path, file):
    assert run(file, "--html", tmp_path / "page.html").returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] in (["page.html", file.name], [file.name, "page.html"])
    assert page.count("<svg") == 8 and "POT ot.batch sinkhorn" in page
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', page) == []
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) > 50
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(names)


def test_a_page_is_made_alike_every_time(run, tmp_path, file):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert run(file, "--page", tmp_path / name / "page.md").returncode == 0
    made = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two")]
    assert made[0] == made[1] and len(made[0]) == 9


def test_a_file_that_holds_no_results_is_named(run, tmp_path):
    for text in ("not json", "[]", '{"rows": []}', '{"rows": [{}], "conditions": {}}'):
        (tmp_path / "wrong.json").write_text(text)
        done = run(tmp_path / "wrong.json")
        assert done.returncode == 1 and "wrong.json is no file of results" in done.stdout, text
    assert run(tmp_path / "none.json").returncode == 1
    assert run().returncode == 2


@pytest.mark.parametrize(
    ("exponent", "words"),
    [(0.02, "hardly"), (0.5, "less than in proportion"), (1.0, "in proportion"), (1.5, "faster"), (2.0, "the square")],
)
def test_slopes_in_words(exponent, words):
    points = [(float(size), 3.0 * size**exponent) for size in (1, 2, 4, 8, 16, 32)]
    assert reporter.slope(points) == pytest.approx(exponent)
    assert words in reporter.in_words(points, "B")
    assert "too few" in reporter.in_words(points[:3], "B")


def test_a_cliff_is_named():
    points = [(32, 1.1), (2, 1.0), (8, 1.2), (16, 6.0), (4, 1.0)]
    assert reporter.largest_step(points) == "the largest step is × 5.00, from 8 to 16"


def slowed(factor, contender="otfuse cpu", machine=1.0, width=0.02):
    """The fabricated file again, on a machine that takes ``machine`` times as long, with one contender changed."""
    content = copy.deepcopy(fabricated())
    for one in content["rows"]:
        if one.get("quartiles_ms"):
            one["median_ms"] *= machine * (factor if one["contender"] == contender else 1)
            one["quartiles_ms"] = [(1 - width) * one["median_ms"], (1 + width) * one["median_ms"]]
    return content


@pytest.mark.parametrize(
    ("new", "code", "says"),
    [
        (slowed(1.0), 0, "0 of "),
        (slowed(1.5), 1, "SLOWER"),
        (slowed(0.5), 0, "faster"),
        (slowed(1.04), 0, "0 of "),  # within what never counts
        (slowed(1.15, width=0.2), 0, "0 of "),  # within the spread of the rows
        (slowed(1.0, machine=2.0), 0, "took 2.00 × as long"),  # the machine, not the code
        (slowed(1.5, machine=2.0), 1, "SLOWER"),
    ],
)
def test_slower_means_beyond_the_noise(run, tmp_path, file, new, code, says):
    done = run("--compare", file, written(tmp_path / "new.json", new))
    assert done.returncode == code and says in done.stdout, done.stdout


def test_what_cannot_be_compared_is_said(run, tmp_path, file):
    other = fabricated() | {"conditions": conditions(machine="Another")}
    done = run("--compare", file, written(tmp_path / "other.json", other))
    assert done.returncode == 2 and "Another" in done.stdout
    peers_alone = fabricated()
    peers_alone["rows"] = [one for one in peers_alone["rows"] if not one["contender"].startswith("otfuse")]
    done = run("--compare", file, written(tmp_path / "peers.json", peers_alone))
    assert done.returncode == 2 and "no row of ours in common" in done.stdout


def test_a_row_that_is_gone_is_named(run, tmp_path, file):
    fewer = fabricated()
    gone = fewer["rows"].pop(0)
    done = run("--compare", file, written(tmp_path / "fewer.json", fewer), "--all")
    assert f"gone    solve | {gone['case']} | otfuse cpu" in done.stdout
    assert done.stdout.count("same") == 13  # an attend, a solve, two of a curve, nine that grow


def test_pictures_leave_matplotlib_as_it_was():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    assert plots.step([row for row in fabricated()["rows"] if row["suite"] == "step"]).startswith("<?xml")
    assert dict(matplotlib.rcParams) | {"backend": None} == before | {"backend": None}
