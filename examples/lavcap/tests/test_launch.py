"""The files for ``accelerate launch``: read as accelerate reads them, up to what each process would be told."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

FOLDER = Path(__file__).parents[1] / "accelerate"


def launched(name: str):
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "lavcap.cli", "train", "CONFIG"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == 8 and args.module and args.training_script == "lavcap.cli"
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as the launcher goes on
    return args


def test_every_file_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == ["ddp", "deepspeed", "fsdp", "hpu"]


@pytest.mark.parametrize("name", ["ddp", "hpu"])
def test_whole_models_in_step(name: str) -> None:
    args = launched(name)
    assert args.multi_gpu and not (args.use_fsdp or args.use_deepspeed)
    assert "ACCELERATE_USE_FSDP" not in prepare_multi_gpu_env(args)


def test_fsdp_shares_out_decoder_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in prepare_multi_gpu_env(launched("fsdp")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT
    assert plugin.transformer_cls_names_to_wrap == [LlamaDecoderLayer.__name__]


def test_deepspeed_shares_out_the_optimiser() -> None:
    args = launched("deepspeed")
    _, environment = prepare_deepspeed_cmd_env(args)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
