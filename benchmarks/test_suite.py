"""The benchmarks, in the order of importance: on any device, every answer checked before it is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import memory, training_step
from benchmarks.answers import converged
from benchmarks.cases import GRADS, Workload, axes, workloads
from benchmarks.contenders import Contender
from benchmarks.packed import MIXES, WITH_LONG, PackedAnswers, PackedWorkload, dense, fill, inputs_of, ours, padded

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours
BESIDE_CURVES = ("otfuse", "POT ot.batch", "ott-jax", "geomloss", "log domain")
BESIDE_GROWTH = ("otfuse", "POT ot.batch", "log domain, eager")
PACKED = [("lavcap", grad) for grad in (None, *GRADS)] + [(mix, None) for mix in MIXES if mix != "lavcap"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    suite = {test_attend: "attend", test_solve: "solve", test_curve: "accuracy"}.get(metafunc.function)
    if suite is not None:
        metafunc.parametrize("workload", workloads(suite, option), ids=str)
    if metafunc.function is test_scaling:
        points = [] if option.dry_run else axes(option.device)
        if not option.benchmark_enable:
            points = list({axis: (axis, at, workload) for axis, at, workload in points}.values())
        metafunc.parametrize(("axis", "at", "workload"), points, ids=str)


def test_attend(workload: Workload, compare: Callable[..., None]) -> None:
    compare(workload, "attend")


@pytest.mark.parametrize("mix, grad", [*PACKED, ("thousandfold", "unroll")], ids=lambda value: value or "forward")
def test_packed(request, results, device, timed, check_and_time, mix, grad) -> None:
    """``per_token_of_dense`` is its rate of valid tokens over the padded operator's on as many full elements."""
    options = request.config.option
    # On a CPU the interpreter of Triton cuts bfloat16 off where a GPU rounds.
    whole = PackedWorkload.of(mix, torch.float32 if device.type == "cpu" else torch.bfloat16, grad)
    if timed and results.out_of_time:
        results.skip(str(whole), "the time for all was spent (--minutes)")
    packed = whole if timed and not options.dry_run else whole.shrunk()
    backend = "triton" if device.type == "cuda" or options.dry_run else "auto"
    inputs = inputs_of(packed, device)
    contenders = [
        Contender(f"otfuse {backend}", ours(packed, backend)),
        Contender(f"otfuse {backend}, padded", padded(packed, backend)),
    ]
    compared = timed and mix not in WITH_LONG  # as many full elements would be a hundred times as many entries
    if compared:
        prepare: Any = lambda *copy: fill(packed, *copy)  # noqa: E731
        full = Contender(f"otfuse {backend}, dense", dense(packed, backend), answers=False, prepare=prepare)
        contenders.append(full)

    def finish(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if compared:
            rows[0]["per_token_of_dense"] = packed.valid * rows[2]["median_ms"] / rows[0]["median_ms"]
        return [row | {"suite": "varlen"} for row in rows]

    assert not check_and_time(str(whole), packed, inputs, contenders, PackedAnswers(packed, inputs), finish, {})


def test_solve(workload: Workload, compare: Callable[..., None]) -> None:
    compare(workload, "solve")


def test_curve(workload: Workload, compare: Callable[..., None], timed: bool, device: torch.device) -> None:
    """Time against accuracy: more and more iterations, each answer held against the converged plan."""
    seen = workload if timed else workload.shrunk()
    answer = converged(replace(seen, case=replace(seen.case, T=1)), device)

    def distance(tensors: Any) -> dict[str, float]:
        return {"from_converged": answer.error(tensors)}

    compare(workload, "accuracy", only=BESIDE_CURVES, extra=distance)


@pytest.fixture(scope="module")
def memory_rows(request: pytest.FixtureRequest, device: torch.device) -> list[dict[str, Any]]:
    if request.config.option.dry_run:
        pytest.skip("an interpreter's memory says nothing")
    if device.type == "cpu" and not os.access(memory.CLEAR, os.W_OK):
        pytest.skip("this system does not tell the peak memory of a stretch of a process")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--device", device.type]
    environment = os.environ | memory.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=request.config.rootpath)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_keeps_the_promises(memory_rows: list[dict[str, Any]], timed: bool, results: Any) -> None:
    """No N x M array where none is promised."""
    if timed:
        results.add(memory_rows)
    promised = [row for row in memory_rows if row["promised_mb"] is not None]
    broken = [row for row in promised if row["extra_mb"] > row["promised_mb"]]
    assert promised and broken == []


def test_that_the_measure_sees_arrays(memory_rows: list[dict[str, Any]]) -> None:
    """What is known to hold some: the loop in plain PyTorch, and more of them for its gradient."""
    plain = [row for row in memory_rows if row["contender"].startswith("log") and row["op"] == "solve"]
    forward, backward = (next(r for r in plain if r["B"] == 1 and r["grad"] == grad) for grad in (None, "unroll"))
    assert 1.9 <= forward["matrices"] < backward["matrices"]  # two, and pages that were there before


def test_scaling(axis: str, at: int, workload: Workload, compare: Callable[..., None]) -> None:
    """Time against batch, size, iterations and features, one at a time."""
    compare(workload, "scaling", only=BESIDE_GROWTH, axis=axis, at=at)


def test_step(request: pytest.FixtureRequest, results: Any, timed: bool, device: torch.device) -> None:
    """Where the time of a training step of LAVCap goes, where examples/lavcap is installed."""
    option = request.config.option
    if option.dry_run:
        pytest.skip("an interpreter's time says nothing")
    try:
        import lavcap  # noqa: F401
    except ImportError as missing:
        reason = f"{missing}: {training_step.WAY_OUT}"
        results.say_absent("training step", {"lavcap": reason})
        results.skip("training step", reason)
    if timed and results.out_of_time:
        results.skip("training step", "the time for all was spent (--minutes)")
    sizes, repeats = (training_step.PAPER, 3) if timed else (training_step.TINY, 2)
    rows = training_step.budget(sizes, device, "auto", repeats, option.clock)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    if timed:
        results.add(rows)
