"""``lavcap train CONFIG``: train a captioner on a prepared set."""

from __future__ import annotations

import argparse
from dataclasses import replace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as in examples/lavcap/configs")
    parser.add_argument("--data", metavar="DIR", help="prepared set (default: the config's data.folder)")
    parser.add_argument("--output", metavar="DIR", help="the run's folder (default: the config's train.output)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the config")


def run(args: argparse.Namespace) -> int:
    from lavcap.config_file import load_config
    from lavcap.train import train

    config = load_config(args.config, args.set)
    if args.data is not None:
        config = replace(config, data=replace(config.data, folder=args.data))
    if args.output is not None:
        config = replace(config, train=replace(config.train, output=args.output))
    trainer = train(config)
    if trainer.is_world_process_zero():
        state = trainer.state
        print(f"{state.global_step} updates; best validation loss {state.best_metric:.4f} at {state.best_global_step}")
        print(f"captioner: {trainer.args.output_dir}/checkpoint-{state.best_global_step}")
    return 0
