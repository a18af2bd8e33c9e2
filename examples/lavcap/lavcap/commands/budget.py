"""``lavcap budget``: what a config costs at its real sizes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lavcap.budget import Assumptions, ModuleBudget, RunBudget, StepBudget
    from lavcap.config import Config

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, such as configs/lavcap.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting on top of the file")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs to count for (default 1 8)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of one GPU, bfloat16 (default: an H100's 989)")
    parser.add_argument("--utilisation", type=float, help="share of the peak that a step reaches (default 0.35)")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU, USD (default 2.5)")
    parser.add_argument("--measure", action="store_true", help="also time the fused step's share here, on the CPU")


def run(args: argparse.Namespace) -> int:
    from lavcap import budget
    from lavcap.captioner import skeleton_captioner
    from lavcap.config_file import load_config

    config = load_config(args.config, args.set)
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(budget.Assumptions)}
    assumed = budget.Assumptions(**{name: value for name, value in given.items() if value is not None})
    captioner = skeleton_captioner(config)
    _print_modules([*budget.module_budgets(captioner), *budget.frozen_parts(config)])
    if config.train.gradient_checkpointing:
        captioner.gradient_checkpointing_enable()
    step = budget.count_step(captioner, config.train.batch_size)
    _print_step(config, step)
    _print_fused(config, captioner.projector.in_features, step)
    _print_runs(config, [budget.run_budget(config, captioner, step, gpus, assumed) for gpus in args.gpus], assumed)
    if args.measure:
        from lavcap.measure import measure_share

        print("\n" + measure_share(config).describe())
    return 0


def _print_modules(modules: list[ModuleBudget]) -> None:
    print(
        f"{'module':22} {'parameters':>13} {'trained':>11} {'dtypes':18} {'weights':>9} {'gradients':>9} {'AdamW':>8}"
    )
    for m in modules:
        print(
            f"{m.name:22} {m.parameters:13,} {m.trained:11,} {'+'.join(m.dtypes):18} "
            f"{m.weight_bytes / GIB:5.2f} GiB {m.gradient_bytes / GIB:5.3f} GiB {m.optimizer_bytes / GIB:5.3f} GiB"
        )


def _print_step(config: Config, step: StepBudget) -> None:
    print(
        f"\none step of {config.train.batch_size} clips of 10 s on one device: {step.forward_flop / 1e12:.2f} TFLOP "
        f"forward, {step.backward_flop / 1e12:.2f} backward, in {step.operations:,} operations; "
        f"at most {step.activation_bytes / GIB:.2f} GiB kept for the backward pass"
    )


def _print_fused(config: Config, width: int, step: StepBudget) -> None:
    from lavcap.budget import FRAMES, fused_step

    fused = fused_step(config.train.batch_size, 64, FRAMES, width, config.solver.num_iters)
    share = fused.flop / (step.forward_flop + step.backward_flop)
    print(
        f"the fused step on 64 x {FRAMES} tokens, forward and backward: {fused.flop / 1e9:.3f} GFLOP, "
        f"{100 * share:.5f} % of the step's; {fused.tensor_bytes / 1e6:.1f} MB of tokens"
    )


def _print_runs(config: Config, runs: list[RunBudget], assumed: Assumptions) -> None:
    print(
        f"\n{config.train.epochs:g} epochs of {assumed.clips:,} clips, data parallel, assuming {assumed.peak_tflops:g} "
        f"TFLOP/s, {100 * assumed.utilisation:g} % of it reached, {assumed.operation_us:g} us an operation, "
        f"{assumed.price_per_hour:g} USD a GPU hour:"
    )
    print(f"{'GPUs':>4} {'memory a GPU':>13} {'steps':>10} {'a step':>9} {'hours':>7} {'GPU hours':>10} {'USD':>7}")
    for r in runs:
        print(
            f"{r.gpus:4} {r.memory_bytes / GIB:9.1f} GiB {r.steps:10,} {1e3 * r.step_seconds:6.1f} ms {r.hours:7.1f} "
            f"{r.gpu_hours:10.1f} {r.price:7.0f}"
        )
    print("memory: weights, gradients, AdamW's moments and what is kept; not the allocator's and the driver's own.")
    print("hours: training steps alone, without validation, and with the loader keeping up.")
