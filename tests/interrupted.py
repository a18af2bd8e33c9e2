"""Solves on the pool that a signal's handler interrupts at random times; prints what became of other tensors.

Run as ``python tests/interrupted.py <interruptions> <seed>``. The pool's threads write to memory by its address. Guard
tensors are made where the interrupted call has left its own, and looked at once the pool has nothing left to do.
"""

import json
import os
import random
import signal
import sys
import threading
import time

import torch

import otfuse
from otfuse._backends.cpu import launch as cpu

GUARD = 7.0


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no Exception."""


left = 0  # how often the handler still raises


def called(run):
    return run()


def interrupt(_, frame):
    global left
    while frame is not None and left > 0:
        if frame.f_code is called.__code__:  # nowhere else, so that this program itself is not interrupted
            left -= 1
            raise Interrupted
        frame = frame.f_back


def call_interrupted(run, after):
    """Whether it was, and how many seconds after the first signal the call had ended."""
    global left
    interrupted, left = False, 3  # and again while the call waits for its threads
    begun = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, after, 0.002)
        called(run)
    except Interrupted:
        interrupted = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    return interrupted, time.monotonic() - begun - after


def wait_for_the_pool():
    """Until its threads meet: nothing that was handed to them before is running then."""
    threads = torch.get_num_threads()
    meeting = threading.Barrier(threads + 1)
    for _ in range(threads):
        cpu._pool(os.getpid(), threads).submit(meeting.wait)
    meeting.wait()


def forward(cost):
    return otfuse.sinkhorn(cost, 0.1, num_iters=150, backend="cpu").plan


def attend(x, y):
    return otfuse.sinkhorn_attend(x, y, 0.1, num_iters=100, backend="cpu").x


def implicit(cost):
    return otfuse.sinkhorn(cost, 0.1, num_iters=50, grad="implicit", backend="cpu").plan


def packed(x, y):
    ends_x, ends_y = (torch.arange(len(t) + 1, dtype=torch.int32) * t.shape[1] for t in (x, y))
    tokens = x.flatten(0, 1), y.flatten(0, 1)
    return otfuse.sinkhorn_attend_varlen(
        *tokens, ends_x, ends_y, x.shape[1], y.shape[1], num_iters=100, backend="cpu"
    ).x


def loss(x, y):
    return otfuse.nn.OTFusion(0.1, num_iters=100, backend="cpu")(x, y).loss[None]


def backward(run, *inputs):
    """The gradient alone, again and again."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = run(*inputs)
    sent = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, inputs, sent, retain_graph=True)[0]


def main(interruptions, seed):
    signal.signal(signal.SIGALRM, interrupt)
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    cpu.WORK_PER_THREAD = 1
    block = torch.empty(30 << 20, dtype=torch.uint8)  # from now on memory of this size comes from where others free it
    del block
    cost, x, y = torch.rand(96, 66, 256), torch.randn(48, 66, 16), torch.randn(48, 256, 16)
    runs = {
        "forward": lambda: forward(cost),
        "attend": lambda: attend(x, y),
        "packed": lambda: packed(x, y),
        "loss": lambda: loss(x, y),
        "backward": backward(forward, cost[:48]),
        "implicit": backward(implicit, cost),
        "packed backward": backward(packed, x, y),
    }
    expected = {name: run() for name, run in runs.items()}
    durations = {}
    for name, run in runs.items():
        begun = time.monotonic()
        run()
        durations[name] = time.monotonic() - begun
    found = {"interrupted": 0, "overwritten": 0, "slowest": 0.0, "durations": durations}
    while found["interrupted"] < interruptions:
        name = rng.choice(list(runs))
        interrupted, seconds = call_interrupted(runs[name], rng.uniform(0, durations[name]))
        if interrupted:
            guards = [torch.full((size, 66, 256), GUARD) for size in (96, 48, 48, 96)]
            wait_for_the_pool()
            found["interrupted"] += 1
            found["overwritten"] += sum(int((guard != GUARD).sum()) for guard in guards)
            found["slowest"] = max(found["slowest"], seconds)
            del guards
    found["as before"] = [name for name, run in runs.items() if torch.equal(run(), expected[name])] == list(runs)
    endless = lambda: otfuse.sinkhorn(cost[:2], 0.1, num_iters=2**62, backend="cpu")  # noqa: E731
    found["ended"], seconds = call_interrupted(endless, 0.1)
    found["seconds to end what is endless"] = seconds
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
