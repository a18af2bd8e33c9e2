"""The demo from clip to picture, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import otfuse
from otfuse._backends.base import BackendError
from otfuse._backends.select import select
from otfuse._problem import SolveOptions, cost_problem
from otfuse.demo import features, report
from otfuse.demo.check import compare_with_pot
from otfuse.demo.decode import Clip, read_clip
from otfuse.demo.output import whole_file
from otfuse.demo.recovery import NOTHING, recovery, token_labels
from otfuse.demo.shared_space import SharedSpace, share
from otfuse.demo.synthesize import KINDS, Event, write_synthetic_clip
from otfuse.demo.timing import conditions, time_beside_loop
from otfuse.viz import Span, alignment_figure

EPSILON = 0.1
NUM_ITERS = 50
NUM_WRONG_FITS = 9  # fits on shifted pairs that the recovery of events is compared with
PICTURE = "alignment.png"
SYNTHETIC = "synthetic.mp4"


def run(clip_path: Path | None, out: Path, backend: str, max_seconds: float) -> int:
    """Run the demo; returns 0, or 1 where our plan and POT's differ by more than rounding."""
    device = choose_device(backend)
    backend = choose_backend(backend, device)
    events: list[Event] = []
    if clip_path is None:
        out.mkdir(parents=True, exist_ok=True)
        clip_path = out / SYNTHETIC
        events = write_synthetic_clip(clip_path)
    clip = read_clip(clip_path, max_seconds)
    out.mkdir(parents=True, exist_ok=True)
    report.say_clip(clip, bool(events))

    spectrogram = features.log_mel(clip.samples)
    sound, sound_times = features.sound_tokens(spectrogram, clip.seconds)
    pictures = features.picture_tokens(clip.frames)
    space = share(sound, pictures, sound_times, clip.frame_times)
    report.say_tokens(space)

    x, y = space.x.to(device), space.y.to(device)
    plan, marginal_error = solve(x, y, backend)
    report.say_plan(backend, device, EPSILON, NUM_ITERS, marginal_error)
    if events:
        shifts = np.linspace(0, len(sound), NUM_WRONG_FITS + 2).astype(int)[1:-1]
        wrong = [share(sound, pictures, sound_times, clip.frame_times, int(shift)) for shift in shifts]
        wrong_plans = [solve(one.x.to(device), one.y.to(device), backend)[0] for one in wrong]
        scores = [
            recovery(found.cpu().numpy(), events, sound_times, clip.frame_times) for found in [plan, *wrong_plans]
        ]
        report.say_recovery(scores[0], scores[1:])

    agreements = compare_with_pot(x, y, plan, EPSILON, NUM_ITERS, backend)
    report.say_agreement(agreements)
    if not all(agreement.holds for agreement in agreements):
        return 1
    report.say_times(time_beside_loop(x, y, EPSILON, NUM_ITERS, backend), conditions(x.device))

    caption = (
        f"{backend} backend · {len(x)} sound × {len(y)} picture tokens · ε = {EPSILON} · {NUM_ITERS} rounds"
        f" · marginal error {marginal_error:.0e}"
    )
    draw(out / PICTURE, clip, spectrogram, plan, sound_times, space, caption, events)
    report.say("picture", str(out / PICTURE))
    return 0


def choose_device(backend: str) -> str:
    """An accelerator where there is one that the backend may use, else the CPU."""
    if backend != "cpu" and torch.cuda.is_available():
        return "cuda"
    return "cpu"


def choose_backend(name: str, device: str) -> str:
    """The name itself if that backend runs here; for "auto" the first that does, as sinkhorn_attend does it.

    Raises:
        BackendError: with the backend's reasons.
    """
    names = list(otfuse.backends())
    if name != "auto" and name not in names:
        raise BackendError(f"backend must be auto or one of {', '.join(names)}; got '{name}'")
    probe = torch.ones(1, 64, 20, device=device)
    return select(cost_problem(probe, None, None, SolveOptions(EPSILON, NUM_ITERS, grad="detach")), name).name


def solve(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, float]:
    """The plan [N, M] of x [N, D] and y [M, D], and its marginal error."""
    result = otfuse.sinkhorn_attend(x[None], y[None], EPSILON, num_iters=NUM_ITERS, return_plan=True, backend=backend)
    assert result.plan is not None
    return result.plan[0], float(result.marginal_error[0])


def draw(
    path: Path,
    clip: Clip,
    spectrogram: Tensor,
    plan: Tensor,
    sound_times: np.ndarray,
    space: SharedSpace,
    caption: str,
    events: Sequence[Event],
) -> None:
    """Write the alignment's picture, whole or not at all."""
    colours = None
    if events:
        labels = token_labels(events, sound_times, "heard")
        colours = ["#BBBBBB" if label == NOTHING else KINDS[label].colour for label in labels]
    footnote = (
        "Lines: the strongest pairs. What a sound looks like was learned from the rest of the clip alone "
        f"(held-out cosine {space.held_out_cosine:+.2f}; {space.rank} of {len(space.shifted_cosines)} fits "
        "on shifted pairs reach that)." + (" One colour a kind of event." if events else "")
    )
    figure = alignment_figure(
        plan,
        spectrogram,
        clip.frames,
        sound_times=sound_times,
        picture_times=clip.frame_times,
        seconds=clip.seconds,
        title="Which sound goes with which picture",
        caption=f"{clip.path.name} · {caption}",
        band_hertz=features.band_hertz(),
        footnote=footnote,
        sound_spans=_spans(event for event in events if event.heard),
        picture_spans=_spans(event for event in events if event.seen),
        row_colours=colours,
    )
    with whole_file(path) as file:
        figure.savefig(file, format="png")


def _spans(events: Iterable[Event]) -> list[Span]:
    return [Span(event.start, event.end, KINDS[event.kind].name, KINDS[event.kind].colour) for event in events]
