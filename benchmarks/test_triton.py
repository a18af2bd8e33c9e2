"""The Triton backend on a GPU beside its peers: forward, and forward with backward, on the device's clock.

The cases run with ``--device cuda``. One small case takes the same road through Triton's interpreter, untimed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import GPU_CASES, SMALL, Case
from device_time import quiet
from fusion import FORWARD, MODES, Attend, Job, Judge, inputs, ours, run
from peers import CROSS_ATTENTION, cross_attention, fusions
from torch import Tensor

from otfuse.backends.triton import INTERPRETED

FEW = ("forward", "unroll")  # what everybody asks first
COMPILED = Job(GPU_CASES[0], FORWARD, torch.bfloat16)


def by_worth() -> list[Job]:
    """All jobs, so ordered that a run which is cut short has the most useful: bfloat16 first, then the usual modes."""
    jobs = [Job(case, mode, dtype) for dtype in (torch.bfloat16, torch.float32) for mode in MODES for case in GPU_CASES]
    return sorted(jobs, key=lambda job: (job.mode not in FEW, job.dtype != torch.bfloat16))


def contenders(job: Job, compiled: bool) -> tuple[dict[str, Attend], dict[str, str]]:
    others, absent = fusions(job.case.epsilon, job.case.T, compiled)
    if job.mode not in FEW:  # their plan is differentiated by autograd, which is the unrolled gradient
        others = {}
    return {"otfuse triton": ours(job, "triton"), "otfuse torch": ours(job, "torch"), **others}, absent


def checked(
    job: Job, attends: dict[str, Attend], tensors: tuple[Tensor, ...]
) -> tuple[dict[str, float], dict[str, str]]:
    """Errors of the contenders that are right, and why the others are not timed; ours must be right."""
    judge, (first, *_) = Judge(job, tensors), attends
    errors, wrong = {}, {}
    for name, attend in attends.items():
        try:
            with quiet():
                answer = run(job, attend, *tensors)
            judge.check(answer)
            errors[name] = judge.error(answer)
        except Exception as reason:  # a peer may fail in its own ways
            if name == first:
                raise
            wrong[name] = f"{type(reason).__name__}: {str(reason)[:200]}"
    return errors, wrong


@pytest.mark.parametrize("job", by_worth(), ids=lambda job: str(job).replace(" ", "-"))
def test_on_gpu(job: Job, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "cuda":
        pytest.skip("needs --device cuda")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    compare: Callable[..., None] = request.getfixturevalue("compare_on_gpu")
    tensors = inputs(job, "cuda")
    timing = request.config.getoption("benchmark_enable")
    attends, absent = contenders(job, compiled=timing and job == COMPILED)
    errors, wrong = checked(job, attends, tensors)
    attends = {name: attends[name] for name in errors} | {CROSS_ATTENTION: cross_attention}
    calls = {name: lambda *t, attend=attend: run(job, attend, *t) for name, attend in attends.items()}
    size = {"B": job.case.B, "shape": f"{job.case.N}x{job.case.M}x{job.case.D}", "name": job.case.name}
    facts = {"mode": job.mode, "dtype": str(job.dtype).removeprefix("torch."), "absent": absent, "wrong": wrong}
    all_errors = {**errors, CROSS_ATTENTION: None}
    compare(f"attend {job}", calls, tensors, all_errors, job.traffic(), job.flops(), **size, **facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_small(mode: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    device = request.config.getoption("--device")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("on the CPU this needs Triton's interpreter (TRITON_INTERPRET=1)")
    pytest.importorskip("triton")
    job = Job(SMALL, mode, dtype)
    tensors = inputs(job, device)
    attends, _ = contenders(job, compiled=False)
    errors, wrong = checked(job, attends, tensors)
    assert set(errors) == set(attends), wrong
    assert len(run(job, cross_attention, *tensors)) == (2 if mode == FORWARD else 4)


def test_traffic_of_the_main_size() -> None:
    case = Case("lavcap", 64, 64, 20, 768)
    tokens = 64 * 84 * 768  # numbers in x and y together
    forward = Job(case, FORWARD, torch.bfloat16).traffic()
    assert forward == 2 * tokens * 2 + 64 * (84 * 4 + 8)
    assert Job(case, "detach", torch.bfloat16).traffic() == forward + 3 * tokens * 2
    assert Job(case, FORWARD, torch.float32).flops() == 64 * 64 * 20 * (6 * 768 + 200)
