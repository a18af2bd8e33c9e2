"""Where the time of a training step of LAVCap goes on this machine: encoder, OT-Att, OT loss, decoder, the rest.

``python -m benchmarks.training_step --out FOLDER`` times each part, forward and backward, with the pieces of
examples/lavcap at the paper's sizes and random weights; writes ``<date>-<machine>-step.json`` and ``step.svg``. Of the
language model one layer and the head are timed, and the layer is counted as often as the model has it: the whole would
not fit most machines. Pictures are encoded before training, so no step encodes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.measuring import CLOCKS
from benchmarks.results import conditions, file_name

SAMPLE_RATE, FRAMES, PROMPT, CAPTION = 16_000, 20, 21, 15
WAY_OUT = "pip install -e examples/lavcap (or put that folder on PYTHONPATH)"


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    seconds: float = 10.0  # of sound
    encoder: str = "base"  # of lavcap.config.CEDSize
    width: int = 4096  # of the decoder; Llama-2-7B's sizes
    mlp: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000


PAPER = Sizes()
TINY = Sizes(1, 1.0, "nano", 64, 128, 2, 2, 100)


@dataclass(frozen=True)
class Part:
    """``forward`` returns the outputs that a backward begins with."""

    name: str
    forward: Callable[[], Sequence[Tensor]]
    times: int = 1  # in a step


def parts(sizes: Sizes, device: torch.device, backend: str) -> list[Part]:
    """In the order of a forward."""
    try:
        from lavcap.audio.encoder import load_audio_encoder
        from lavcap.config import AudioConfig, CEDSize, Config, LossConfig, SolverConfig
        from lavcap.fusion import build_fusion
        from lavcap.lora import ENCODER_TARGETS, tune
    except ImportError as missing:
        sys.exit(f"lavcap cannot be imported ({missing}): {WAY_OUT}")
    audio_config = AudioConfig(size=CEDSize(sizes.encoder), spec_augment=None)
    encoder = load_audio_encoder(audio_config)
    tune(encoder, audio_config.tuning, ENCODER_TARGETS)
    encoder = encoder.to(device).train()
    samples = round(sizes.seconds * SAMPLE_RATE)
    waveform = 0.1 * torch.randn(sizes.batch, samples, device=device)
    counts = torch.full((sizes.batch,), samples, device=device)
    with torch.no_grad():
        tokens, heard = encoder(waveform, counts)
    seen = torch.ones(sizes.batch, FRAMES, dtype=torch.bool, device=device)
    audio, visual = tokens.detach().requires_grad_(), torch.randn(sizes.batch, FRAMES, encoder.width, device=device)
    config = Config(solver=SolverConfig(backend=backend))
    both = build_fusion(config, encoder.width).to(device)
    alone = build_fusion(replace(config, loss=LossConfig(ot_weight=0)), encoder.width).to(device)
    projector = nn.Linear(encoder.width, sizes.width, device=device)
    fused = alone(audio, heard, visual, seen).tokens.detach().requires_grad_()

    def attended_and_loss() -> Sequence[Tensor]:
        out = both(audio, heard, visual, seen)
        return out.tokens, out.loss

    return [
        Part("audio encoder (LoRA)", lambda: encoder(waveform, counts)[:1]),
        Part("OT-Att", lambda: (alone(audio, heard, visual, seen).tokens,)),
        Part("OT-Att and OT loss", attended_and_loss),
        Part("projector", lambda: (projector(fused),)),
        *decoder_parts(sizes, fused.shape[1] + PROMPT + CAPTION, device),
    ]


def decoder_parts(sizes: Sizes, length: int, device: torch.device) -> list[Part]:
    """A layer, frozen, gradients going through, as under LoRA, whose own products are left out; and the head."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=sizes.width, intermediate_size=sizes.mlp, num_attention_heads=sizes.heads, num_hidden_layers=1,
        vocab_size=sizes.vocabulary, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False).to(device)
    rotary = LlamaRotaryEmbedding(config).to(device)
    head = nn.Linear(sizes.width, sizes.vocabulary, bias=False).requires_grad_(False).to(device)
    hidden = torch.randn(sizes.batch, length, sizes.width, device=device, requires_grad=True)
    labels = torch.randint(sizes.vocabulary, (sizes.batch, CAPTION), device=device)

    def one_layer() -> Sequence[Tensor]:
        positions = rotary(hidden, torch.arange(length, device=device)[None])
        out = layer(hidden, position_embeddings=positions)
        return (out[0] if isinstance(out, tuple) else out,)

    def loss() -> Sequence[Tensor]:
        logits = head(hidden[:, -CAPTION:])
        return (nn.functional.cross_entropy(logits.float().mT, labels),)

    return [Part("decoder layers", one_layer, sizes.layers), Part("head and cross-entropy", loss)]


def measure(part: Part, repeats: int, device: torch.device, clock: str) -> dict[str, Any]:
    """Milliseconds in a step, forward and backward."""
    _once(part, device, clock)  # compiles what has to be compiled
    forward, backward = zip(*(_once(part, device, clock) for _ in range(repeats)))
    both = [one + other for one, other in zip(forward, backward)]
    low, _, high = statistics.quantiles(both, n=4)
    in_step = 1e3 * part.times
    times = {"median_ms": both, "forward_ms": forward, "backward_ms": backward}
    return {
        "suite": "step", "case": "training step", "op": "step", "contender": part.name,
        **{name: in_step * statistics.median(seconds) for name, seconds in times.items()},
        "quartiles_ms": [in_step * low, in_step * high], "times": part.times, "turns": repeats,
    }  # fmt: skip


def _once(part: Part, device: torch.device, clock: str) -> tuple[float, float]:
    def now() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return CLOCKS[clock]()

    start = now()
    outputs = part.forward()
    middle = now()
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return middle - start, now() - middle


def budget(sizes: Sizes, device: torch.device, backend: str, repeats: int, clock: str) -> list[dict[str, Any]]:
    """A row for each part; the loss is what OT-Att with it takes longer than without."""
    rows = {part.name: measure(part, repeats, device, clock) for part in parts(sizes, device, backend)}
    attended, both = rows["OT-Att"], rows.pop("OT-Att and OT loss")
    keys = ("median_ms", "forward_ms", "backward_ms")
    loss = {key: max(0.0, both[key] - attended[key]) for key in keys} | {"quartiles_ms": None}
    found = list(rows.values())
    found.insert(2, both | loss | {"contender": "OT loss (beyond OT-Att)"})
    total = sum(row["median_ms"] for row in found)
    return [row | {"share": row["median_ms"] / total, "batch": sizes.batch, "dtype": "float32"} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the rows and the picture")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or hpu")
    parser.add_argument("--backend", default="auto", help="of otfuse (default auto)")
    parser.add_argument("--repeats", type=int, default=3, help="of each part (default 3)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a CPU: wall (default) or processor")
    parser.add_argument("--note", default="", help="what to say of the machine")
    options = parser.parse_args()
    device, sizes = torch.device(options.device), TINY if options.tiny else PAPER
    rows = budget(sizes, device, options.backend, max(2, options.repeats), options.clock)
    facts = conditions(device, options.note, options.clock)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / file_name(facts).replace(".json", "-step.json")
    path.write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    (options.out / "step.svg").write_text(plots.step(rows), encoding="utf-8")
    for row in rows:
        print(f"{row['contender']:28} {row['median_ms']:12.2f} ms {row['share']:9.3%}")
    print(f"written to {path} and {options.out / 'step.svg'}")


if __name__ == "__main__":
    main()
