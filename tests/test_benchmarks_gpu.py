"""What runs on a GPU only is tried without one: the script in Triton's interpreter, the clockwork on a stand-in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import measuring
from benchmarks.answers import Answers, inputs_of, ours, with_gradient
from benchmarks.cases import Case, Workload
from benchmarks.contenders import Contender
from benchmarks.gpu import goals, sanitize

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu/run.sh"
ON_EVERY_DEVICE = ("Event", "Stream", "current_stream", "stream", "synchronize")
CALL = 12e-6  # seconds that the stand-in takes for a call

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here the script itself runs these tests")


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Run among parallel workers, the pytest in there would take itself for one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | {"PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment)


@needs_bash
@without_gpu
def test_the_script_says_what_is_missing(tmp_path):
    done = run_script(tmp_path / "out")
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run_script().returncode == run_script(tmp_path, "--fast").returncode == 64
    assert "compute-sanitizer" in run_script("--help").stdout


@needs_bash
@without_gpu
def test_every_step_runs_tiny(tmp_path):
    done = run_script(tmp_path, "--dry-run", "--commit", "abc123")
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    steps = [line.split("\t")[:2] for line in (tmp_path / "steps.tsv").read_text().splitlines()]
    assert steps == [[name, "0"] for name in ("tests", "memcheck", "racecheck", "benchmarks", "profile", "report")]
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert result["conditions"]["commit"] == "abc123"
    ours = [row for row in result["rows"] if row["contender"] == "otfuse triton"]
    assert {(row["op"], row["grad"]) for row in ours} == {("attend", None), ("attend", "unroll"), ("solve", "unroll")}
    assert all(row["error"] is not None and row["traffic_mb"] > 0 and row["gflop"] > 0 for row in ours)
    assert [size["grad"] for size in json.loads((tmp_path / "profile.json").read_text())["sizes"]] == [None, "unroll"]
    assert "<svg" in (tmp_path / "report.html").read_text() and list((tmp_path / "images").glob("*.svg"))
    summary = (tmp_path / "summary.txt").read_text()
    assert summary in done.stdout and len(summary.splitlines()) <= 60
    assert all(name in summary for name, _ in steps[:-1])
    assert len(list(tmp_path.iterdir())) <= 8


class StandIn:
    """Streams, events and graphs of a device that takes CALL seconds for a call and nothing else."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.seen = 0.0, None, []
        stand_in = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = stand_in.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                for name in self.calls:
                    stand_in.run(name)

        class Stream:
            def wait_stream(self, other):
                pass

        names = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "graph": self.capture, "current_stream": Stream}
        names |= {"stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def capture(self, graph):
        graph.calls = self.capturing = []
        yield
        self.capturing = None

    def run(self, name):
        self.now += CALL
        self.seen.append(name)

    def call(self, tensor):
        """What a contender does: launched at once, or into the graph that is being captured."""
        self.run(int(tensor)) if self.capturing is None else self.capturing.append(int(tensor))
        return (tensor,)


@pytest.mark.parametrize("api", ["replayed", "launched", "hpu"])
def test_a_turn_takes_every_copy_alike(monkeypatch, api):
    device = StandIn(monkeypatch)
    copies = [(torch.tensor(i),) for i in range(5)]
    contender = Contender("ours", device.call, api != "launched")
    hpu = types.SimpleNamespace(**{name: getattr(torch.cuda, name) for name in ON_EVERY_DEVICE})
    turn = measuring.DeviceTurn(contender, copies, hpu if api == "hpu" else torch.cuda)
    assert (turn.graph is not None) == (api == "replayed")
    assert len(turn.outputs) == 5, "all outputs of a pass are alive together"
    device.seen.clear()
    assert math.isclose(turn.timed(), turn.calls * CALL, rel_tol=1e-6)
    assert math.isclose(turn.per_call()[0], CALL, rel_tol=1e-6)
    assert turn.calls * CALL >= 0.9 * measuring.TURN and turn.calls % 5 == 0
    assert device.seen == list(range(5)) * (len(device.seen) // 5)


def test_a_slow_contender_gets_fewer_copies(monkeypatch):
    device = StandIn(monkeypatch)
    monkeypatch.setattr(measuring, "PASS", 0.0)
    turn = measuring.DeviceTurn(Contender("slow", device.call), [(torch.tensor(i),) for i in range(5)])
    assert turn.copies[0][0] == 0 and len(turn.copies) == 1


def test_copies_exceed_the_cache():
    copies = measuring.copies_beyond_cache((torch.zeros(4), torch.ones(2)), traffic=1_000, cache=50_000)
    assert len(copies) == 100 and len({copy[0].data_ptr() for copy in copies}) == 100
    assert len(measuring.copies_beyond_cache((torch.zeros(4),), traffic=10**9, cache=50_000)) == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_sanitizer_sees_every_way(target):
    """Tokens and costs on every path, packed tokens on chip and beyond, the loss, each with a backward."""
    from otfuse._backends.triton import loss as triton_loss
    from otfuse._backends.triton.cluster import HELD
    from otfuse._backends.triton.paths import Path as Way
    from otfuse._backends.triton.paths import choose, fits_on_chip

    memory = 16 << 30, HELD[target]
    tokens, costs, aligned = set(), set(), 0
    for B, N, M, D, dtype, grad, *_ in sanitize.SHAPES:
        tokens.add((choose(B, N, M, D, dtype, *memory), grad == "unroll"))
        costs.add(choose(B, N, M, 0, dtype, *memory))
        aligned += triton_loss.fits(torch.empty(B, N, M, dtype=dtype, device="meta"))
    assert {way for way, _ in tokens} == {Way.ON_CHIP, Way.CLUSTER, Way.STORED, Way.RECOMPUTED}
    assert {(Way.ON_CHIP, True), (Way.CLUSTER, True), (Way.STORED, True), (Way.RECOMPUTED, True)} <= tokens
    assert (Way.CLUSTER, False) in tokens
    assert costs - {Way.CLUSTER} == {Way.ON_CHIP, Way.SMALL, Way.STORED}
    assert (Way.CLUSTER in costs) == (target == "sm_90")
    beyond = {grad for _, N, M, D, dtype, grad, *_ in sanitize.SHAPES if not fits_on_chip(N, M, D, dtype)}
    assert {"unroll", "implicit"} <= beyond and aligned > 5


WITH_GOALS = (
    ("test_attend", "lavcap-64x64x20x768 bfloat16 forward"),
    ("test_attend", "lavcap-64x64x20x768 bfloat16 unroll"),
    ("test_attend", "lavcap-1024x64x20x768 bfloat16 forward"),
    ("test_attend", "long_video-8x1024x512x768 bfloat16 forward"),
    ("test_attend", "large-1x4096x4096x64 bfloat16 forward"),
    ("test_attend", "large-1x4096x4096x64-10iterations bfloat16 forward"),
    ("test_packed", "forward"),
    ("test_solve", "many_small-1048576x4x4-20iterations float32 forward"),
)


def test_what_a_goal_is_set_for_is_timed_first():
    """A run of ten minutes is cut short. After it comes one size after another at constant work, from 2 to 8192."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--device", "cuda", "--benchmark-enable", "-q"]
    done = subprocess.run([*command, "--collect-only"], capture_output=True, text=True, cwd=ROOT)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 50, done.stdout + done.stderr
    for line, (name, case) in zip(found, WITH_GOALS):
        assert f"::{name}[" in line and line.endswith(f"{case}]")
    sides = [line for line in found[len(WITH_GOALS) :] if "equal_work" in line]
    assert sides == found[len(WITH_GOALS) :][:13] and "-16777216x2x2-" in sides[0] and "-1x8192x8192-" in sides[-1]


def goal_rows():
    """Rows of a run, by contender and suite, that every goal can be read from."""

    def row(contender, size="lavcap", B=64, grad=None, suite="attend", dtype="bfloat16", iterations=50, **values):
        facts = {
            "suite": suite,
            "size": size,
            "B": B,
            "dtype": dtype,
            "grad": grad,
            "tol": None,
            "iterations": iterations,
        }
        return {**facts, "tokens": "clustered", "contender": contender, **values}

    small = {"size": "many_small", "B": 2**20, "suite": "solve", "dtype": "float32", "iterations": 20, "N": 4}
    large = {"size": "large", "B": 1, "N": 4096, "D": 64}
    rows = [
        row("otfuse triton", median_ms=0.0149),
        row("log domain, eager", times_ours=61.0),
        row("log domain, torch.compile", times_ours=5.5),
        row("otfuse triton, forward alone", grad="unroll", times_ours=0.3),
        row("otfuse triton", B=1024, share_of_copy=0.61),
        row("otfuse triton", **small, share_of_copy=0.81),
        row("otfuse triton", **small | {"iterations": 50}, share_of_copy=0.1),
        row("Liger-Kernel mHC", **small, times_ours=1.2),
        row("otfuse triton", size="long_video", B=8, median_ms=1.0),
        row("three matrix products alone", size="long_video", B=8, times_ours=0.7),
        row("otfuse triton", size="varlen", B=256, suite="varlen", lengths="uniform", per_token_of_dense=0.1),
        row("otfuse triton", size="varlen", B=256, suite="varlen", per_token_of_dense=0.95),
    ]
    for name, milliseconds, error in (("otfuse triton", 1.0, 1e-5), ("flash-sinkhorn", 1.5, 2e-5)):
        rows += [
            row(name, **large, iterations=iterations, median_ms=milliseconds * iterations + 3, error=error)
            for iterations in (50, 10)
        ]
    return rows


def test_goals_are_read_from_the_rows():
    rows = goal_rows()
    lines = goals.goals(rows)
    assert len(lines) == 10 and all(line.startswith("met ") for line in lines), lines
    assert "14.9 (H200: <= 15)" in lines[0] and "3.33 (H200: <= 3.5)" in lines[3]
    assert "1.43 (H200: <= 1.5)" in lines[7] and "(errors 2.0e-05 and 1.0e-05): 1.5 (H200: >= 1)" in lines[8]
    worse = {"median_ms": 1.6, "times_ours": 0.2, "share_of_copy": 0.5, "per_token_of_dense": 0.8}
    slower = [
        row | {key: value for key, value in worse.items() if key in row and row["size"] != "large"} for row in rows
    ]
    slower = [
        row | {"median_ms": 1e3} if row["contender"] == "otfuse triton" and row["iterations"] == 50 else row
        for row in slower
    ]
    assert all(line.startswith("MISSED") for line in goals.goals(slower))


def test_a_goal_without_a_row_is_said_to_be_not_measured():
    assert all(line.startswith("not measured: ") for line in goals.goals([]))
    without_flash = [row for row in goal_rows() if row["contender"] != "flash-sinkhorn"]
    (line,) = [line for line in goals.goals(without_flash) if line.startswith("not measured")]
    assert "flash-sinkhorn" in line


@pytest.mark.parametrize("grad", [None, "unroll"])
def test_the_check_misses_no_attend_in_bfloat16(grad):
    """Most of an output is the token that came in: a kernel that adds nothing to it must not pass, nor NaN."""
    workload = Workload(Case("lavcap", 2, 64, 20, 128), torch.bfloat16, grad)
    inputs = inputs_of(workload, torch.device("cpu"))
    right, call = Answers(workload, inputs).of("rows first"), ours(workload, "torch")
    results = call(*inputs) if grad is None else with_gradient(call)(*inputs)
    assert right.error(results) <= right.allowed
    first, second = inputs[-2:]
    assert not right.error((first, results[1])) <= right.allowed
    assert not right.error((results[0], second)) <= right.allowed
    assert not right.error((results[0], results[1] * math.nan)) <= right.allowed
