"""One test clip as a picture: what is heard and seen, its caption, and the plans of two captioners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import otfuse
from lavcap.study.conditions import Condition
from lavcap.study.model import StudyCaptioner
from lavcap.study.task import NUM_FRAMES, OBJECTS, SOUNDS, WINDOWS_A_FRAME, Clips, draw_clips, what_is_when
from lavcap.study.training import TEST_SEED
from lavcap.study.words import caption_ids, caption_text
from otfuse.viz import plan_heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIP = 0  # of the test clips
SHOWN = (Condition("barycentric", "similarity"), Condition("barycentric", "similarity", one_clock=True))
INK = "#333333"


def write_sample(path: Path, captioners: Sequence[StudyCaptioner]) -> None:
    """``captioners``: those of SHOWN, trained."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    clips = draw_clips(CLIP + 1, TEST_SEED)
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"“{caption_text(caption_ids(clips.script)[CLIP])}”", fontsize=14, color=INK)
    grid = figure.add_gridspec(3, 3, height_ratios=(1.1, 0.75, 2.2))
    _draw_sound(figure.add_subplot(grid[0, :]), clips)
    _draw_pictures(figure.add_subplot(grid[1, :]), clips)
    plans = [_plan(model, clips, condition.epsilon) for model, condition in zip(captioners, SHOWN)]
    truth = np.kron(np.eye(NUM_FRAMES), np.ones((len(plans[0]) // NUM_FRAMES, 1))) / len(plans[0])
    _draw_plan(figure.add_subplot(grid[2, 0]), truth, "what is true\n")
    for column, (plan, model, condition) in enumerate(zip(plans, captioners, SHOWN), 1):
        said = caption_text(model.generate(clips.spectrogram, clips.pictures)[CLIP])
        clocks = "one clock" if condition.one_clock else "two clocks"
        _draw_plan(figure.add_subplot(grid[2, column]), plan, f"with OT loss, {clocks}\n“{said}”")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "lavcap"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@torch.no_grad()
def _plan(model: StudyCaptioner, clips: Clips, epsilon: float) -> np.ndarray:
    audio, visual = model.encode(clips.spectrogram, clips.pictures)
    return otfuse.sinkhorn(-otfuse.similarity_matrix(audio, visual), epsilon).plan[CLIP].numpy()


def _draw_sound(ax: Axes, clips: Clips) -> None:
    heard, flashing = what_is_when(clips.script)
    spectrogram = clips.spectrogram[CLIP].numpy()
    ax.imshow(spectrogram, origin="lower", aspect="auto", cmap="magma", extent=(0, NUM_FRAMES, 0, len(spectrogram)))
    for frame, sound in enumerate(heard[CLIP].tolist()):
        if sound < len(SOUNDS):
            named = flashing[CLIP, frame] < len(OBJECTS)
            text = SOUNDS[sound] if named else f"({SOUNDS[sound]})"
            ax.text(frame + 0.5, len(spectrogram) + 0.6, text, ha="center", fontweight="bold" if named else "normal")
    _per_frame(ax, "bands")
    ax.set_xticks(np.arange(0, NUM_FRAMES, 1 / WINDOWS_A_FRAME), minor=True)


def _draw_pictures(ax: Axes, clips: Clips) -> None:
    heard, flashing = what_is_when(clips.script)
    pictures = clips.pictures[CLIP].clamp(0, 1).permute(0, 2, 3, 1).numpy()  # [frames, height, width, 3]
    for frame, picture in enumerate(pictures):
        ax.imshow(picture, extent=(frame + 0.04, frame + 0.96, 0, 1), aspect="auto", interpolation="nearest")
        if (thing := int(flashing[CLIP, frame])) < len(OBJECTS):
            named = heard[CLIP, frame] < len(SOUNDS)
            text = OBJECTS[thing] if named else f"({OBJECTS[thing]})"
            ax.text(frame + 0.5, 1.06, text, ha="center", fontweight="bold" if named else "normal")
    ax.set_ylim(0, 1)
    ax.set_yticks([])
    _per_frame(ax, "frames")


def _per_frame(ax: Axes, label: str) -> None:
    ax.set_xlim(0, NUM_FRAMES)
    ax.set_xticks(np.arange(NUM_FRAMES) + 0.5, [str(frame) for frame in range(NUM_FRAMES)], fontsize=8)
    ax.set_ylabel(label)


def _draw_plan(ax: Axes, plan: np.ndarray, title: str) -> None:
    plan_heatmap(ax, plan, row_label="sound token", column_label="frame")
    ax.set_title(title, fontsize=9)
