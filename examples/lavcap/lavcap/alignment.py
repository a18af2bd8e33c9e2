"""What is shown of a clip: its sound, its pictures and the plan between them, over the same seconds; and its picture.

Letters: K mel bins, W windows of the spectrogram, T moments of sound, F pictures.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavcap.audio.ced import NUM_ROWS
from lavcap.audio.front_ends import HOP, PATCH, build_front_end
from lavcap.config import Config, Weights
from lavcap.data.decode import FRAMES_PER_SECOND
from lavcap.data.sample import SAMPLE_RATE
from otfuse.demo.output import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS_PER_SECOND = SAMPLE_RATE // HOP
LONGEST_TITLE = 92  # characters that the picture has room for


class Alignment(NamedTuple):
    """Times are in seconds from the clip's beginning."""

    seconds: float  # what spectrogram, pictures and plan are spread over
    spectrogram: np.ndarray | None  # [K, W] of the captioner's own front end; None without sound
    band_hertz: np.ndarray  # [K]
    frames: np.ndarray  # [F, P, P, 3] uint8; F = 0 without pictures
    frame_times: np.ndarray  # [F]
    plan: np.ndarray | None  # [T, F], the mass of a moment's tokens added up; None without a transport plan
    moment_times: np.ndarray  # [T], their middles


def align(config: Config, waveform: Tensor, frames: np.ndarray, plan: Tensor | None) -> Alignment:
    """What a captioner of ``config`` saw of a clip.

    Args:
        config: of the captioner.
        waveform: [S]; S = 0 without sound.
        frames: [F, P, P, 3] uint8.
        plan: [N, F], of the clip's own tokens.
    """
    front_end = build_front_end(config.audio.front_end)
    rows = 1 if config.audio.pool_frequency else NUM_ROWS
    moments = None if plan is None else plan.unflatten(0, (rows, -1)).sum(0).numpy()  # tokens are frequency-major
    num_pictures = len(frames) if moments is None else moments.shape[1]
    num_moments = 0 if moments is None else len(moments)
    moment_times = front_end.first_frame + (np.arange(num_moments) * PATCH + (PATCH - 1) / 2) / WINDOWS_PER_SECOND
    ends = [len(waveform) / SAMPLE_RATE, num_pictures / FRAMES_PER_SECOND, *moment_times[-1:]]
    seconds = float(max(ends))
    spectrogram = None
    if len(waveform):
        mel = front_end(waveform[None], torch.tensor([len(waveform)])).mel[0].numpy()  # [K, W]
        spectrogram = _spread(mel[:, : len(waveform) // HOP + 1], round(seconds * WINDOWS_PER_SECOND))
    frame_times = np.arange(num_pictures) / FRAMES_PER_SECOND
    return Alignment(seconds, spectrogram, front_end.band_hertz.numpy(), frames, frame_times, moments, moment_times)


def _spread(mel: np.ndarray, windows: int) -> np.ndarray:
    """Cut, or filled up with the least that there is."""
    missing = max(0, windows - mel.shape[1])
    return np.pad(mel[:, :windows], ((0, 0), (0, missing)), constant_values=float(mel.min()))


def marginal_error(plan: Tensor) -> float:
    """otfuse's: the L1 error of the plan's row sums, over a clip's own tokens [N, M], which weigh the same."""
    return float((plan.double().sum(1) - 1 / len(plan)).abs().sum())


def describe_plan(config: Config, plan: Tensor | None) -> str:
    """One line on where the plan is from, or why there is none."""
    if plan is None:
        return why_no_plan(config)
    solver = config.solver
    weights = "" if getattr(config.fusion, "weights", Weights.PLAN) is Weights.PLAN else ", barycentric weights"
    rows = "" if config.audio.pool_frequency else f", {NUM_ROWS} tokens a moment added up"
    return (
        f"{config.fusion.kind}: plan of {plan.shape[0]} × {plan.shape[1]} tokens, ε = {solver.epsilon:g}, "
        f"{solver.num_iters} rounds, marginal error {marginal_error(plan):.0e}{weights}{rows}"
    )


def why_no_plan(config: Config) -> str:
    return f"fusion {config.fusion.kind} has no transport plan: none is drawn"


def draw(path: Path, alignment: Alignment, *, title: str, lines: Sequence[str]) -> None:
    """Write the picture as PNG, whole or not at all: the title, then up to two lines, above and below the picture."""
    with warnings.catch_warnings():  # a sign that the font lacks is a box in the picture, and no more than that
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        _save(path, _figure(alignment, title, lines))


def one_line(text: str) -> str:
    """As it can be printed or drawn: no line breaks, and no signs that steer a terminal."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(text.split()))


def _figure(alignment: Alignment, title: str, lines: Sequence[str]) -> Figure:
    from otfuse.viz import alignment_figure

    return alignment_figure(
        alignment.plan,
        alignment.spectrogram,
        alignment.frames,
        sound_times=alignment.moment_times,
        picture_times=alignment.frame_times,
        seconds=alignment.seconds,
        title=textwrap.shorten(one_line(title), LONGEST_TITLE, placeholder=" …"),
        caption=lines[0],
        footnote=lines[1] if len(lines) > 1 else "",
        band_hertz=alignment.band_hertz,
    )


def _save(path: Path, figure: Figure) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format="png")
