"""Memory beyond input, output and plan is O(B T (N + M)): measured as the peak of a fresh process."""

import json
import os
import subprocess
import sys

import pytest

SIDE, ROUNDS = 2048, 3
MATRIX = SIDE * SIDE * 4  # one float32 [N, M]
LINES = (SIDE + SIDE) * 8 * (ROUNDS + 30)  # the history, and room for some thirty lines of working memory
SLACK = 2**20  # pages, the allocator's own, Python objects

MEASURE = """
import gc, json, sys
import torch, otfuse

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def peak(run):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts here
    before = status("VmRSS")
    out = run()
    return status("VmHWM") - before, out

torch.set_num_threads(1)
side, rounds = int(sys.argv[1]), int(sys.argv[2])
found = {}
for size in (16, side):  # the first brings in code and data
    for name, epsilon in (("wide", 1.0), ("small", 0.005)):  # in one piece, and by absorption
        cost, x, y = torch.rand(1, size, size), torch.randn(1, size, 16), torch.randn(1, size, 16)
        grad_plan, options = torch.ones_like(cost), {"num_iters": rounds, "backend": "cpu"}
        found[f"nothing {name}"], _ = peak(lambda: None)
        found[f"matrix {name}"], _ = peak(lambda: torch.ones(1, size, size))
        found[f"sinkhorn {name}"], _ = peak(lambda: otfuse.sinkhorn(cost, epsilon, **options))
        found[f"attend {name}"], _ = peak(lambda: otfuse.sinkhorn_attend(x, y, epsilon, **options))
        for grad in ("unroll", "implicit"):
            cost.requires_grad_()
            found[f"{grad} forward {name}"], out = peak(lambda: otfuse.sinkhorn(cost, epsilon, grad=grad, **options))
            backward = lambda: torch.autograd.grad(out.plan, cost, grad_plan, retain_graph=True)
            found[f"{grad} backward {name}"], _ = peak(backward)
            del out
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def peaks():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell the peak memory of a stretch of a process")
    # Every matrix gets pages of its own and gives them back, so that a peak is what is alive at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", MEASURE, str(SIDE), str(ROUNDS)]
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
