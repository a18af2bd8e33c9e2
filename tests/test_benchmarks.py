"""The suite of benchmarks: what it chooses, who takes part, that a wrong answer has no time, how turns are shared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import otfuse
from benchmarks import answers, cases, contenders, measuring
from benchmarks.answers import Answers, inputs_of
from benchmarks.cases import Case, Workload, lavcap
from benchmarks.packed import MAIN, MIXES, PackedWorkload

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_a_full_run_has_the_whole_table():
    found = cases.attends("cpu", full=True)
    whole = {(m.case.name, m.case.B, m.case.N, m.case.M, m.case.D) for m in found}
    assert {("lavcap", B, 64, 20, 768) for B in (4, 32, 64, 256)} <= whole
    assert {("lavcap_patches", B, 256, 20, 768) for B in (8, 64)} | {("long_video", 8, 1024, 512, 768)} <= whole
    assert {("matching", 4, 2048, 2048, 256)} | {
        ("large", 1, n, n, D) for n in (4096, 16384) for D in (64, 768)
    } <= whole
    options = {(m.grad, m.dtype_name, m.kind, m.tol) for m in found if m.case == lavcap(64)}
    assert len(options) == 4 * 3 * 2 * 2
    solves = {(m.case.name, m.case.B, m.case.N) for m in cases.solves("cpu", full=True)}
    assert {("many_small", B, side) for B in (65_536, 1_048_576) for side in (4, 8)} <= solves
    for device in ("cpu", "cuda"):  # timed without --full too
        found = cases.solves(device)
        sizes = {(m.case.B, m.case.N, m.case.T, m.dtype_name) for m in found if m.case.name == "many_small"}
        assert (1_048_576, 4, 20, "float32") in sizes
    liger = {side for _, side, T, _ in sizes if T == 20}
    assert liger == set(contenders.HYPER), "each of the sizes that Liger-Kernel has"
    axes = cases.axes("cuda")
    ends = {axis: (points[0], points[-1]) for axis in ("B", "N = M", "iterations", "D") if (points := sorted(
        at for name, at, _ in axes if name == axis))}  # fmt: skip
    work = {m.case.B * m.case.N * m.case.M * m.case.T for name, _, m in axes if name == cases.EQUAL_WORK}
    sides = [at for name, at, _ in axes if name == cases.EQUAL_WORK]
    assert len(work) == 1 and sides == [2**power for power in range(1, 14)]
    assert ends["B"] == (1, 4096) and ends["N = M"] == (8, 16384) and {"iterations", "D"} <= ends.keys()


def test_everybody_takes_part_or_says_why_not():
    workload = Workload(Case("small", 2, 8, 8, 0, T=4), op="solve")
    inputs = inputs_of(workload, CPU)
    present, absent = contenders.contenders_of(workload, inputs, contenders.Compiler(0))
    names = {contender.name for contender in present}
    assert {f"otfuse {name}" for name in otfuse.backends()} <= names | absent.keys()
    assert set(contenders.SOLVERS) <= names | absent.keys() and not names & absent.keys()
    assert all(absent.values())
    if contenders.INTERPRETED:
        assert "interpreter or emulator" in absent["otfuse triton"]


@pytest.mark.filterwarnings("ignore")  # of Liger's imports
@pytest.mark.parametrize("side", [4, 8])
def test_liger_computes_the_same_plan(side):
    """In Triton's interpreter: what its row would hold on a GPU is right."""
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    if not contenders.INTERPRETED:
        pytest.skip("here its kernels run on the GPU, in the benchmarks themselves")
    workload = Workload(cases.many_small(3, side), op="solve")
    workload = replace(workload, case=replace(workload.case, T=4))
    inputs = inputs_of(workload, CPU)
    contender = contenders.liger(workload, CPU)
    answer = Answers(workload, inputs).of(contender.follows)
    plan = contender.read(contender.call(*contender.prepare(*inputs)))
    assert answer.error(plan) <= answer.allowed
    assert not answer.error((plan[0].mT,)) <= answer.allowed


def test_a_wrong_answer_has_no_time():
    workload = Workload(Case("small", 2, 8, 6, 16, T=4), op="solve")
    inputs = inputs_of(workload, CPU)
    right, call = Answers(workload, inputs), answers.ours(workload, "torch")
    wrong = contenders.Contender("ours", lambda cost: (call(cost)[0] * (1 + 1e-5),))
    arguments = (inputs, 10**9, right)
    check = measuring.check
    with pytest.raises(AssertionError, match=r"ours is off by .* not timed"):
        check(wrong, *arguments, ours=True, clock="wall")
    checked = check(contenders.Contender("ours", call), *arguments, ours=True, clock="wall")
    assert 0 <= checked.error <= right.of("rows first").allowed


def test_elements_that_are_not_looked_at_do_not_matter(monkeypatch):
    monkeypatch.setitem(answers.LARGEST_CHECK, "cpu", 8 * 6 * 4 * 2)
    workload = Workload(Case("small", 6, 8, 6, 16, T=4), op="solve")
    inputs = inputs_of(workload, CPU)
    right = Answers(workload, inputs)
    assert right.every == 3 and len(right.of("rows first").exact[0]) == 2
    answer, plan = right.of("rows first"), answers.ours(workload, "torch")(*inputs)[0]
    plan[1] = 0
    assert answer.error((plan,)) <= answer.allowed
    plan[3] = 0
    assert not answer.error((plan,)) <= answer.allowed


@pytest.mark.parametrize("follows", ["rows first", "columns first"])
def test_rows_of_a_large_plan_are_the_specifications(monkeypatch, follows):
    workload = Workload(Case("small", 1, 40, 24, 16, T=7), op="solve")
    inputs = inputs_of(workload, CPU)
    plan = answers.specified(workload, follows)(inputs[0].double())[0]
    whole = Answers(workload, inputs).of(follows)
    monkeypatch.setattr(cases, "CHECK", 1)
    answer = Answers(workload, inputs).of(follows)
    assert [len(one.exact[0][0]) for one in (whole, answer)] == [40, 3]
    assert answer.error((plan,)) < 1e-13
    assert answer.allowed == pytest.approx(whole.allowed, rel=3), "plain float32 is as far off either way"
    plan[:, 32] *= 1 + 1e-5
    assert not answer.error((plan,)) <= answer.allowed


class Turn:
    """Takes ``seconds``, and notes when it was timed."""

    def __init__(self, name, seconds, seen):
        self.name, self.seconds, self.seen = name, seconds, seen

    def timed(self):
        self.seen.append(self.name)


class Pedantic:
    def pedantic(self, function, setup, rounds):
        for _ in range(rounds):
            setup()
            function()


def test_turns_are_taken_in_between_and_shared_by_time():
    seen: list[str] = []
    turns = [Turn("ours", 0.01, seen), Turn("peer", 0.01, seen), Turn("slow", 0.1, seen)]
    measuring.take_turns(Pedantic(), turns, seconds=0.9, dry=False)
    assert {name: seen.count(name) for name in ("ours", "peer", "slow")} == {"ours": 30, "peer": 30, "slow": 5}
    first, last = seen.index("slow"), len(seen) - 1 - seen[::-1].index("slow")
    assert last - first > 0.7 * len(seen), "spread over the whole time"
    assert "ours ours" not in " ".join(seen) and "peer peer" not in " ".join(seen)


def test_limits_are_the_best_of_the_run(monkeypatch):
    limits = measuring.MachineLimits(CPU, small=True)
    times = iter((3.0, 2.0, 5.0))
    monkeypatch.setattr(limits, "_measured", lambda name, turns: next(times))
    slow = limits.copy()
    limits.again()
    assert limits.copy() == pytest.approx(1.5 * slow)
    limits.again()  # slower this time
    assert limits.copy() == pytest.approx(1.5 * slow)
    assert measuring.MachineLimits(CPU, small=True).product(torch.float32) > 0


def test_shares_of_the_limit():
    limits = measuring.MachineLimits(CPU, small=True)
    limits.best = {"copy": 2 * 2**12 / 10e9, "float32": 2 * 16**3 / 40e9}  # 10 GB/s and 40 GFLOP/s
    row = {"dtype": "float32"} | measuring.rates(2.0, traffic=10_000_000, flops=20_000_000)
    assert row["gb_per_s"] == pytest.approx(5) and row["gflop_per_s"] == pytest.approx(10)
    found = measuring.shares(row, limits)
    assert (found["share_of_copy"], found["share_of_product"]) == pytest.approx((0.5, 0.25))
    assert found["limit"] == "copy" and found["share_of_limit"] == pytest.approx(0.5)
    assert measuring.shares({"dtype": "float32"}, limits) == {}


def test_traffic_of_the_main_case():
    """The 16.5 MB that the goals of the project were set by, and what a backward adds."""
    main = lavcap(64)
    tokens = 64 * (64 + 20) * 768 * 2
    assert main.attend_traffic(2) == 2 * tokens == 16_515_072
    assert main.attend_traffic(2, "detach") == 5 * tokens
    assert main.attend_traffic(2, "unroll") == 5 * tokens + 2 * 64 * 50 * 84 * 4
    assert main.attend_flops() == 64 * 64 * 20 * (3 * 2 * 768 + 4 * 50)


def test_traffic_of_packed_tokens_is_of_valid_ones_alone():
    """Against the padded operator's: less by the padding, and offsets besides."""
    packed = PackedWorkload.of("lavcap")
    assert len(packed.lengths) == 256 and packed.lengths[1] == (64, 20) and packed.lengths[0] == (4, 1)
    assert packed.tokens == sum(n + m for n, m in packed.lengths) and 0.9 < packed.valid < 0.92
    assert packed.traffic == 2 * packed.tokens * 768 * 2 + 8 * 257
    assert packed.traffic < 0.95 * MAIN.attend_traffic(2)
    backward = replace(packed, grad="unroll")
    assert backward.traffic == 5 * packed.tokens * 768 * 2 + 8 * 257 + 2 * 4 * 50 * packed.tokens
    one, four = (replace(packed, case=replace(MAIN, B=B)).flops(50) for B in (1, 4))
    assert one + four > 3 * replace(MAIN, B=1).attend_flops()


def test_mixes_of_lengths():
    """What their names say: a share of valid tokens each, and every length as often, or one longer by sixteen times."""
    valid = {mix: PackedWorkload.of(mix).valid for mix in MIXES[:3]}
    assert valid["full"] == 1 and 0.9 < valid["lavcap"] < 0.92 and 0.48 < valid["uniform"] < 0.51
    counts = [n for n, _ in PackedWorkload.of("uniform").lengths]
    assert {counts.count(length) for length in range(1, 65)} == {4}
    first, *others = PackedWorkload.of("one long").lengths
    assert first == (1024, 512) and others == PackedWorkload.of("lavcap").lengths
    first, *others = PackedWorkload.of("thousandfold").lengths
    assert first == (1024, 512) and others.count((1, 1)) > 60 and max(others) <= (16, 7)


def run_step(*arguments, without=()):
    """In a fresh Python, where the packages of ``without`` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); sys.argv[1:] = {list(map(str, arguments))!r}"
    code += "; from benchmarks import training_step; training_step.main()"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_a_step_without_lavcap_says_how_to_get_it(tmp_path):
    done = run_step("--tiny", "--out", tmp_path, without=("lavcap", "lavcap.audio", "lavcap.audio.encoder"))
    assert done.returncode == 1 and "pip install -e examples/lavcap" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_tiny_step(tmp_path):
    pytest.importorskip("lavcap", reason="lavcap is not installed: pip install -e examples/lavcap")
    done = run_step("--tiny", "--repeats", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*-step.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["contender"].split(" ")[0] for row in rows] == ["audio", "OT-Att", "OT", "projector", "decoder", "head"]
    assert sum(row["share"] for row in rows) == pytest.approx(1) and all(row["median_ms"] > 0 for row in rows[:2])
    assert "<svg" in (tmp_path / "step.svg").read_text()
