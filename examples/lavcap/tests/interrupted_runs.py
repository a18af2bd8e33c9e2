"""One run in one go, and the same run killed over and over; argument: a folder for both. Used by test_resume.py.

A process of its own, so that it can fork: each attempt is a real process that SIGKILL really ends, and none of them
has to import transformers again.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import small
import torch
from lavcap import checkpoint
from lavcap.config import DataConfig
from lavcap.train import run
from transformers import TrainerCallback


class KillAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(output: Path, prepare: Callable[[small.Captioning], None] = lambda trainer: None) -> bool:
    """Whether the run came to its end in this attempt."""
    child = os.fork()
    if child == 0:
        try:
            config = small.small_config(output, accumulation=2, checkpoint_steps=2, keep_checkpoints=1)
            config = replace(config, data=DataConfig(workers=1))
            trainer = small.small_trainer(config, clips=10)
            checkpoint.remove_unfinished(output)
            prepare(trainer)
            run(trainer)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "an attempt failed without being killed"
        return True
    assert os.WTERMSIG(status) == signal.SIGKILL
    return False


def kill_at_step(step: int) -> Callable[[small.Captioning], None]:
    return lambda trainer: trainer.add_callback(KillAtStep(step))


def kill_while_writing(trainer: small.Captioning) -> None:
    """At the rename, when all of a checkpoint is written and none of it has its name."""
    checkpoint.os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds: float) -> Callable[[small.Captioning], None]:
    def prepare(trainer: small.Captioning) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return prepare


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    assert attempt(folder / "whole")
    killed = folder / "killed"
    assert not attempt(killed, kill_while_writing)  # before there is any checkpoint
    assert not attempt(killed, kill_at_step(3))  # the first epoch's end, before its checkpoint
    assert not attempt(killed, kill_while_writing)
    delays = random.Random(0)
    for _ in range(8):
        if attempt(killed, kill_after(delays.uniform(0.2, 1.2))):
            break
    else:
        assert attempt(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
