"""Threads, forks, copies of modules, and compiled code that a second process finds ready."""

import copy
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from ctypes import c_int64
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import otfuse
from otfuse._backends.cpu import launch as cpu
from otfuse.testing import clustered_tokens


def assert_equal(actual, expected):
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads for work of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "WORK_PER_THREAD", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def solve_with_gradient(seed, B=6):
    x, y = (t.requires_grad_() for t in clustered_tokens(B, 9, 7, 8, seed=seed))
    out = otfuse.sinkhorn_attend(x, y, num_iters=20, return_plan=True, backend="cpu")
    return tuple(t.detach() for t in (*out, *torch.autograd.grad(out.x.square().sum() + out.plan.sum(), (x, y))))


def test_a_pool_gives_what_one_thread_gives(two_threads):
    parallel = solve_with_gradient(0)
    torch.set_num_threads(1)
    assert_equal(parallel, solve_with_gradient(0))
    names = {thread.name.split("_")[0] for thread in threading.enumerate()}
    assert "otfuse" in names  # the first solve did run on the pool


@pytest.mark.parametrize("pool", [False, True])
def test_two_python_threads_at_once(pool, request):
    if pool:
        request.getfixturevalue("two_threads")
    expected = [solve_with_gradient(seed) for seed in range(2)]
    found = [[], []]
    start = threading.Barrier(2)

    def work(seed):
        start.wait()
        found[seed] += [solve_with_gradient(seed) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(2):
        assert len(found[seed]) == 20
        for result in found[seed]:
            assert_equal(result, expected[seed])


def test_an_interrupted_call_writes_to_no_memory_of_others():
    """Its last part is a call that would never end."""
    script = Path(__file__).with_name("interrupted.py")
    done = subprocess.run([sys.executable, script, "12", "0"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["interrupted"] == 12 and found["overwritten"] == 0
    assert found["as before"] and found["ended"]


def test_a_piece_that_fails_ends_the_others():
    """Those not begun are not begun, those that run are waited for."""
    stop, begun, ended = c_int64(0), [], []
    both = threading.Barrier(2)

    def solve(first, last):
        begun.append(first)
        if first < 2:
            both.wait(60)
        if first == 0:
            raise MemoryError("of the first piece")
        deadline = time.monotonic() + 3
        while not stop.value and time.monotonic() < deadline:  # as the compiled code looks at it
            time.sleep(0.001)
        time.sleep(0.05)
        ended.append(first)

    with pytest.raises(MemoryError, match="of the first piece"):
        cpu._on_threads(2, deque(pairwise(range(9))), solve, stop)
    assert begun == [0, 1] or begun == [1, 0]
    assert ended == [1]


@pytest.mark.parametrize("accepted", [0, 1])
def test_where_no_thread_can_be_started(accepted, two_threads, monkeypatch):
    """An executor raises when the system has no thread to give, and when the interpreter is ending."""
    expected = solve_cost_with_gradient()
    submitted = []

    class Full:
        def submit(self, work):
            if len(submitted) == accepted:
                raise RuntimeError("can't start new thread")
            submitted.append(threading.Thread(target=work))
            submitted[-1].start()

    monkeypatch.setattr(cpu, "_pool", lambda process, threads: Full())
    found = []
    for _ in range(5):
        found.append(solve_cost_with_gradient())
        for thread in submitted:
            thread.join()
        submitted.clear()
    for result in found:
        assert_equal(result, expected)


AT_THE_END = """
import atexit, threading
import torch, otfuse
from otfuse._backends.cpu import launch as cpu
torch.set_num_threads(2)
cpu.WORK_PER_THREAD = 1
cost = torch.rand(6, 66, 256)
solve = lambda: otfuse.sinkhorn(cost, 0.1, backend="cpu").plan
expected = solve()
assert any(thread.name.startswith("otfuse") for thread in threading.enumerate())
main = threading.main_thread()
def outlive():
    main.join()
    print("thread", torch.equal(solve(), expected))
atexit.register(lambda: print("atexit", torch.equal(solve(), expected)))
threading.Thread(target=outlive).start()
"""


def test_after_the_main_thread_has_ended():
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=500)
    assert sorted(done.stdout.splitlines()) == ["atexit True", "thread True"], done.stderr


def solve_cost_with_gradient():
    """Without products of matrices: torch's own threads do not survive a fork."""
    cost = clustered_tokens(6, 9, 7, 8)[0].requires_grad_()
    out = otfuse.sinkhorn(cost, 0.5, num_iters=20, backend="cpu")
    return out.plan.detach(), *torch.autograd.grad(out.plan.square().sum(), cost)


def _solve_in_child(connection):
    connection.send([t.numpy() for t in solve_cost_with_gradient()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")  # the point
@pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning")  # by JAX, which POT imports where it is
def test_after_a_fork(two_threads):
    """Threads do not survive a fork: the child must not wait for those of its parent."""
    expected = solve_cost_with_gradient()
    assert any(thread.name.startswith("otfuse") for thread in threading.enumerate())
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_solve_in_child, args=(theirs,))
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert_equal([torch.from_numpy(array) for array in ours.recv()], expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    assert_equal(solve_cost_with_gradient(), expected)  # and the parent goes on


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize(
    "module",
    [
        otfuse.nn.OTAttention(0.2, similarity="dot", num_iters=7, tol=1e-3, weights="barycentric", grad="implicit"),
        otfuse.nn.OTFusion(0.2, temperature=0.3, assignment="plan", contrast="assignment", reduction="sum"),
    ],
    ids=["attention", "fusion"],
)
def test_a_copy_of_a_module_does_the_same(module, clone):
    x, y = clustered_tokens(2, 5, 4, 6)
    copied = clone(module)
    assert copied is not module and repr(copied) == repr(module)
    assert_equal([t for t in copied(x, y) if t is not None], [t for t in module(x, y) if t is not None])
    assert not list(module.parameters()) and not module.state_dict()


def test_results_pickle():
    out = otfuse.sinkhorn(torch.rand(1, 2, 3), 0.3)
    restored = pickled(out)
    assert type(restored) is otfuse.SinkhornOutput
    assert_equal(restored, out)


CACHE = """
import json, sys
import torch, otfuse
for dtype in (torch.float32, torch.float64):
    cost = torch.rand(2, 3, 4, dtype=dtype, requires_grad=True)
    for epsilon in (1.0, 1e-3):
        for grad in ("unroll", "implicit"):
            otfuse.sinkhorn(cost, epsilon, grad=grad, backend="cpu").plan.square().sum().backward()
            otfuse.sinkhorn_attend(cost, cost, epsilon, grad=grad, backend="cpu").x.square().sum().backward()
from numba.core.dispatcher import Dispatcher
from otfuse._backends.cpu import kernels
compiled = {name: value for name, value in vars(kernels).items() if isinstance(value, Dispatcher)}
hits = sum(sum(function.stats.cache_hits.values()) for function in compiled.values())
misses = sum(sum(function.stats.cache_misses.values()) for function in compiled.values())
json.dump({"functions": len(compiled), "hits": hits, "misses": misses}, sys.stdout)
"""


OWN = """
import json, sys
from own import double
double(1)
json.dump([sum(count.values()) for count in (double.stats.cache_hits, double.stats.cache_misses)], sys.stdout)
"""


def in_a_process(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_process_compiles_nothing():
    """By numba's own count of what it took from its cache."""
    in_a_process(CACHE)
    second = in_a_process(CACHE)
    assert second["misses"] == 0
    assert second["hits"] >= 8 and second["functions"] >= 4


def test_that_compiling_is_counted(tmp_path):
    (tmp_path / "own.py").write_text("import numba\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    assert in_a_process(OWN, **environment) == [0, 1]
    assert in_a_process(OWN, **environment) == [1, 0]
