"""Memory beyond input, output and plan is O(B T (N + M)): measured as the peak of a fresh process.

The peak of a process counts pages of code and the buffers that a library keeps from its first large product on, too. A
call needs the same each time, and those come once: the least of several calls on the very same tensors is measured.
"""

import json
import os
import subprocess
import sys

import pytest

SIDE, ROUNDS = 2048, 3
CALLS = 3
MATRIX = SIDE * SIDE * 4  # one float32 [N, M]
LINES = (SIDE + SIDE) * 8 * (ROUNDS + 30)  # the history, and room for some thirty lines of working memory
SLACK = 2**20  # pages, the allocator's own, Python objects

MEASURE = """
import gc, json, sys
import torch, otfuse

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def peak_once(run):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts here
    before = status("VmRSS")
    out = run()  # alive while the peak is read
    return status("VmHWM") - before

def peak(run):
    return min(peak_once(run) for _ in range(calls))

torch.set_num_threads(1)
side, rounds, calls = map(int, sys.argv[1:])
found = {}
for name, epsilon in (("wide", 1.0), ("small", 0.005)):  # in one piece, and by absorption
    cost, x, y = torch.rand(1, side, side), torch.randn(1, side, 16), torch.randn(1, side, 16)
    grad_plan, options = torch.ones_like(cost), {"num_iters": rounds, "backend": "cpu"}
    found[f"nothing {name}"] = peak(lambda: None)
    found[f"matrix {name}"] = peak(lambda: torch.ones(1, side, side))
    found[f"sinkhorn {name}"] = peak(lambda: otfuse.sinkhorn(cost, epsilon, **options))
    found[f"attend {name}"] = peak(lambda: otfuse.sinkhorn_attend(x, y, epsilon, **options))
    for grad in ("unroll", "implicit"):
        forward = lambda: otfuse.sinkhorn(cost.requires_grad_(), epsilon, grad=grad, **options)
        found[f"{grad} forward {name}"] = peak(forward)
        out = forward()
        found[f"{grad} backward {name}"] = peak(
            lambda: torch.autograd.grad(out.plan, cost, grad_plan, retain_graph=True)
        )
        del out
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def peaks():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell the peak memory of a stretch of a process")
    # Every matrix gets pages of its own and gives them back, so that a peak is what is alive at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", MEASURE, str(SIDE), str(ROUNDS), str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def matrices(peak):
    """How many [N, M] fit into what was taken beyond lines."""
    return max(0, peak - LINES - SLACK) / MATRIX


def test_that_the_measure_sees_a_matrix(peaks):
    for domain in ("wide", "small"):
        assert peaks[f"nothing {domain}"] < SLACK
        assert 0.9 * MATRIX < peaks[f"matrix {domain}"] < MATRIX + SLACK


@pytest.mark.parametrize("domain", ["wide", "small"])
def test_forward_holds_the_plan_and_no_other_matrix(peaks, domain):
    assert matrices(peaks[f"sinkhorn {domain}"]) <= 1


@pytest.mark.parametrize("domain", ["wide", "small"])
def test_attention_holds_the_similarity_and_the_plan(peaks, domain):
    assert matrices(peaks[f"attend {domain}"]) <= 2


@pytest.mark.parametrize("domain", ["wide", "small"])
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_forward_for_a_gradient_holds_the_plan_and_the_history(peaks, grad, domain):
    assert matrices(peaks[f"{grad} forward {domain}"]) <= 1


@pytest.mark.parametrize("domain", ["wide", "small"])
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_backward_holds_the_gradient_and_no_other_matrix(peaks, grad, domain):
    assert matrices(peaks[f"{grad} backward {domain}"]) <= 1
