"""One run: encoders taught each side by itself, then the captioner trained, then its captions scored."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import otfuse
from lavcap.study.conditions import Condition, package_config
from lavcap.study.model import Sizes, StudyCaptioner
from lavcap.study.task import NUM_FRAMES, OBJECTS, SOUNDS, Clips, draw_clips, what_is_when
from lavcap.study.words import caption_ids, score

BATCH = 32
WARMUP_STEPS = 50
TEACHING_STEPS = 150
TEACHING_BATCH = 64
TEACHING_RATE = 3e-3
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
# Where the clips of a run's seed s begin, and those that all runs share.
SEEDS_A_RUN = 1_000_000
TEACHING_SEED = 500_000
VALIDATION_SEED, VALIDATION_CLIPS = 10**9, 500
TEST_SEED, TEST_CLIPS = 10**9 + 1, 1000


def run(condition: Condition, test_clips: int = TEST_CLIPS) -> dict[str, Any]:
    """Train and score; what goes into the result file."""
    started = time.process_time()
    model = _started(condition)
    losses = train(model, condition)
    test = draw_clips(test_clips, TEST_SEED)
    validation = draw_clips(min(VALIDATION_CLIPS, test_clips), VALIDATION_SEED)
    return condition.settings() | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fusion_parameters": sum(p.numel() for p in model.fusion.parameters()),
        "test": _rounded(captions_scored(model, test)),
        "validation": _rounded(captions_scored(model, validation)),
        "alignment": _rounded(alignment(model, test, condition)),
        "losses": [[step, *(None if x is None else round(x, 4) for x in pair)] for step, *pair in losses],
        "seconds": round(time.process_time() - started, 1),
    }


def trained(condition: Condition) -> StudyCaptioner:
    """The captioner that a run of the study scores."""
    model = _started(condition)
    train(model, condition)
    return model


def _started(condition: Condition) -> StudyCaptioner:
    model = build(condition)
    model.load_state_dict(_taught(condition.seed, condition.pool), strict=False)
    if condition.one_clock:
        model.share_places()
    return model


def build(condition: Condition, sizes: Sizes = Sizes()) -> StudyCaptioner:  # noqa: B008 (a constant)
    """Random weights by the condition's seed; what is not the fusion's is the same for all fusions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(condition.seed)
        return StudyCaptioner(package_config(condition), sizes)


def train(model: StudyCaptioner, condition: Condition) -> list[tuple[int, float, float | None]]:
    """AdamW, warm-up and cosine; fresh clips at every step. Step, cross-entropy and OT loss, ten times."""
    weight = package_config(condition).loss.ot_weight
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    log, steps = [], condition.steps
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = condition.learning_rate * _schedule(step, steps)
        clips = draw_clips(BATCH, condition.seed * SEEDS_A_RUN + step)
        out = model(clips.spectrogram, clips.pictures, caption_ids(clips.script))
        loss = out.ce_loss if out.ot_loss is None else out.ce_loss + weight * out.ot_loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimiser.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            log.append((step + 1, out.ce_loss.item(), None if out.ot_loss is None else out.ot_loss.item()))
    return log


def _schedule(step: int, steps: int) -> float:
    return min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / steps)))


@cache
def _taught(seed: int, pool: bool) -> dict[str, Tensor]:
    """Weights of both encoders after each has learned to name what is heard, or seen to flash, at a moment.

    It stands for what CED and CLIP bring along: each knows its own side, and nothing of the other. The same for
    all conditions of a seed; places in time are left as drawn.
    """
    model = build(Condition("concatenation", pool=pool, seed=seed))
    width = model.projector.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList([nn.Linear(width, len(SOUNDS) + 1), nn.Linear(width, len(OBJECTS) + 1)])
    parts = nn.ModuleDict({"audio": model.audio, "visual": model.visual})
    optimiser = torch.optim.AdamW([*parts.parameters(), *heads.parameters()], lr=TEACHING_RATE)
    for step in range(TEACHING_STEPS):
        clips = draw_clips(TEACHING_BATCH, seed * SEEDS_A_RUN + TEACHING_SEED + step)
        sides = zip(heads, _features(model, clips), what_is_when(clips.script))
        loss = torch.stack([nn.functional.cross_entropy(head(of).mT, truth) for head, of, truth in sides]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: value.detach() for name, value in parts.state_dict().items()}


def _features(model: StudyCaptioner, clips: Clips) -> tuple[Tensor, Tensor]:
    """[B, NUM_FRAMES, D] of either side, without places in time."""
    sound = model.audio.features(clips.spectrogram).mean(1)  # [B, columns, D]
    return sound.unflatten(1, (NUM_FRAMES, -1)).mean(2), model.visual.features(clips.pictures)


def captions_scored(model: StudyCaptioner, clips: Clips) -> dict[str, float]:
    written = model.generate(clips.spectrogram, clips.pictures)
    return score(written, caption_ids(clips.script))._asdict()


@torch.no_grad()
def alignment(model: StudyCaptioner, clips: Clips, condition: Condition) -> dict[str, float]:
    """What the plan between the encoders' tokens does, whether the fusion uses one or not.

    ``right_frame`` is the share of a sound token's mass that goes to the frame of its own moment; 1 / NUM_FRAMES
    without alignment. ``marginal_error`` is the plan's, as :func:`otfuse.sinkhorn` returns it.
    """
    audio, visual = model.encode(clips.spectrogram, clips.pictures)
    out = otfuse.sinkhorn(-otfuse.similarity_matrix(audio, visual), condition.epsilon, num_iters=condition.rounds)
    rows = out.plan / out.plan.sum(2, keepdim=True)
    tokens_a_frame = model.audio.columns // NUM_FRAMES
    own = (
        torch.arange(rows.shape[1]) % model.audio.columns // tokens_a_frame
    )  # [N]: rows of unpooled tokens repeat time
    right = rows[:, torch.arange(len(own)), own]
    return {"right_frame": right.mean().item(), "marginal_error": out.marginal_error.mean().item()}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}
