"""Runs of two processes for test_distributed.py, started by ``torchrun``; argument: a folder for them."""

from __future__ import annotations

import sys
from pathlib import Path

import small
import torch
from accelerate import PartialState
from lavcap import checkpoint
from lavcap.train import run
from small import CASES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        trainer = small.small_trainer(case(folder / name, 2), clips=11)
        assert trainer.accelerator.num_processes == 2
        run(trainer)
    save_sharded(trainer.model, folder)


def save_sharded(captioner: torch.nn.Module, folder: Path) -> None:
    """Share the trained captioner out as FSDP does, write it, and read it back into the shards."""
    state, first = PartialState(), PartialState().is_main_process
    captioner.requires_grad_(True)  # one kind of tensors only: all of them sharded
    before = {key: value.clone() for key, value in captioner.trained_state().items()}
    fully_shard(captioner, mesh=init_device_mesh("cpu", (2,)))
    if first:
        checkpoint.start_folder(folder / "checkpoint-1")
    state.wait_for_everyone()
    checkpoint.save_trained(captioner, checkpoint.unfinished(folder / "checkpoint-1"), write=first)
    if first:
        checkpoint.finish_folder(folder / "checkpoint-1")
    state.wait_for_everyone()
    with torch.no_grad():
        for shard in captioner.trained_state().values():
            shard.zero_()
    checkpoint.load_trained(captioner, folder / "checkpoint-1")
    state_of_shards = captioner.trained_state()
    assert {isinstance(value, DTensor) for value in state_of_shards.values()} == {True, False}  # weights, statistics
    for key, value in state_of_shards.items():
        assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, before[key]), key


if __name__ == "__main__":
    main(Path(sys.argv[1]))
