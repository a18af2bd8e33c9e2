"""The synthetic task: six objects are seen, some flash, some sound, and a caption says which one did both, and when.

A clip has two parts. In each part, at three different moments, one object flashes and sounds (the caption names it
and its sound), one flashes in silence, and one sound comes from off the screen. Everything is drawn uniformly, so
neither side alone says which of its two events is the caption's, nor what the other side's half of the pair is: only
what happens in both at one moment does. :mod:`lavcap.study.ceilings` computes what that allows.

Letters: B clips, P parts, O objects.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OBJECTS = ("ball", "box", "cone", "star", "ring", "cross")
SOUNDS = ("hums", "buzzes", "rings", "whistles", "rattles", "clicks")
NUM_PARTS = 2
FRAMES_A_PART = 4
NUM_FRAMES = NUM_PARTS * FRAMES_A_PART
WINDOWS_A_FRAME = 4
NUM_WINDOWS = NUM_FRAMES * WINDOWS_A_FRAME
NUM_BANDS = 16
CELL = 4  # pixels a side
GRID = (2, 3)  # cells: rows, columns
PICTURE = (CELL * GRID[0], CELL * GRID[1])
BOTH, FLASH, SOUND = range(3)  # the three events of a part: seen and heard, seen only, heard only

_RED, _GREEN, _BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
_COLOURS = (_RED, _GREEN, _BLUE, (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0))
_SHAPES = (
    ".xx. xxxx xxxx .xx.",
    "xxxx xxxx xxxx xxxx",
    "..x. .xx. .xxx xxxx",
    "x..x .xx. .xx. x..x",
    "xxxx x..x x..x xxxx",
    ".x.. xxx. .x.. ....",
)
# Loudness of each sound's bands, low to high, in the three windows that it lasts.
_BANDS = (
    "xxx............. xxx............. xxx.............",
    "x.x.x.x.x....... x.x.x.x.x....... x.x.x.x.x.......",
    ".....x....x....x .....x....x..... .....x..........",
    "..........xx.... ...........xx... ............xx..",
    "....xxxxxxxx.... ................ ....xxxxxxxx....",
    "xxxxxxxxxxxxxxxx ................ ................",
)
SOUND_WINDOWS = 3
DIM, BRIGHT = 0.3, 1.0  # an object's brightness, at rest and flashing


class Script(NamedTuple):
    """What happens in a batch of clips, all that is drawn but noise."""

    frame: Tensor  # [B, P, 3] in 0 to FRAMES_A_PART - 1: when, within its part, each of BOTH, FLASH, SOUND happens
    object: Tensor  # [B, P, 2] in 0 to 5: of BOTH and of FLASH, different
    sound: Tensor  # [B, P, 2] in 0 to 5: of BOTH and of SOUND, different
    cell: Tensor  # [B, O]: which cell of the picture each object stands in


class Noise(NamedTuple):
    """How much is drawn on top; standard deviations, beside a sound of loudness 1 and a flash of brightness 0.7."""

    spectrogram: float = 0.3
    picture: float = 0.15
    loudness: float = 0.3  # loudness is drawn uniformly from 1 - this to 1 + this


class Clips(NamedTuple):
    script: Script
    spectrogram: Tensor  # [B, NUM_BANDS, NUM_WINDOWS]
    pictures: Tensor  # [B, NUM_FRAMES, 3, *PICTURE]


def draw_script(count: int, generator: torch.Generator) -> Script:
    """Every choice uniform and independent of all others, within what :class:`Script` says."""

    def distinct(*shape: int, among: int) -> Tensor:
        return torch.rand(*shape[:-1], among, generator=generator).argsort(-1)[..., : shape[-1]]

    return Script(
        frame=distinct(count, NUM_PARTS, 3, among=FRAMES_A_PART),
        object=distinct(count, NUM_PARTS, 2, among=len(OBJECTS)),
        sound=distinct(count, NUM_PARTS, 2, among=len(SOUNDS)),
        cell=distinct(count, len(OBJECTS), among=len(OBJECTS)),
    )


def draw_clips(count: int, seed: int, noise: Noise = Noise()) -> Clips:  # noqa: B008 (a constant)
    """``count`` clips, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    script = draw_script(count, generator)
    return Clips(script, render_sound(script, noise, generator), render_pictures(script, noise, generator))


def render_sound(script: Script, noise: Noise, generator: torch.Generator) -> Tensor:
    """[B, NUM_BANDS, NUM_WINDOWS]: sounds of different loudness, each begun 0 or 1 windows late, on a noise floor."""
    count = len(script.frame)
    bands = torch.tensor([[[char == "x" for char in row] for row in sound.split()] for sound in _BANDS]).float()
    patterns = bands[script.sound].mT  # [B, P, 2, bands, windows]
    loudness = 1 + noise.loudness * (2 * torch.rand(count, NUM_PARTS, 2, generator=generator) - 1)
    late = torch.randint(WINDOWS_A_FRAME - SOUND_WINDOWS + 1, (count, NUM_PARTS, 2), generator=generator)
    start = _frame_of_clip(script)[..., [BOTH, SOUND]] * WINDOWS_A_FRAME + late  # [B, P, 2]
    windows = start[..., None] + torch.arange(SOUND_WINDOWS)  # [B, P, 2, SOUND_WINDOWS]
    columns = (patterns * loudness[..., None, None]).permute(0, 3, 1, 2, 4).flatten(2)  # [B, bands, P * 2 * windows]
    floor = noise.spectrogram * torch.randn(count, NUM_BANDS, NUM_WINDOWS, generator=generator)
    return floor.scatter_add(2, windows.flatten(1)[:, None].expand_as(columns), columns)


def render_pictures(script: Script, noise: Noise, generator: torch.Generator) -> Tensor:
    """[B, NUM_FRAMES, 3, height, width]: every object in its cell, dim, or bright where it flashes."""
    count = len(script.frame)
    brightness = torch.full((count, NUM_FRAMES, len(OBJECTS)), DIM)
    frames = _frame_of_clip(script)[..., [BOTH, FLASH]].flatten(1)  # [B, P * 2]
    brightness[torch.arange(count)[:, None], frames, script.object.flatten(1)] = BRIGHT
    in_cell = script.cell.argsort(1)  # [B, cells]: the object in each cell
    lit = brightness.gather(2, in_cell[:, None].expand_as(brightness))  # [B, frames, cells]
    cells = _glyphs()[in_cell][:, None] * lit[..., None, None, None]  # [B, frames, cells, 3, CELL, CELL]
    grid = cells.unflatten(2, GRID).permute(0, 1, 4, 2, 5, 3, 6)  # [B, frames, 3, rows, CELL, columns, CELL]
    pictures = grid.flatten(3, 4).flatten(4, 5)
    return pictures + noise.picture * torch.randn(pictures.shape, generator=generator)


def _frame_of_clip(script: Script) -> Tensor:
    """[B, P, 3]: the frame of each event, counted from the clip's start."""
    return script.frame + FRAMES_A_PART * torch.arange(NUM_PARTS)[:, None]


def _glyphs() -> Tensor:
    """[O, 3, CELL, CELL]."""
    shapes = torch.tensor([[[char == "x" for char in row] for row in shape.split()] for shape in _SHAPES]).float()
    return torch.tensor(_COLOURS)[:, :, None, None] * shapes[:, None]


def what_is_when(script: Script) -> tuple[Tensor, Tensor]:
    """[B, NUM_FRAMES] twice: the sound heard in each frame's time, and the object that flashes; 6 where none does."""
    frames = _frame_of_clip(script)
    heard = torch.full((len(frames), NUM_FRAMES), len(SOUNDS))
    flashing = torch.full((len(frames), NUM_FRAMES), len(OBJECTS))
    heard.scatter_(1, frames[..., [BOTH, SOUND]].flatten(1), script.sound.flatten(1))
    flashing.scatter_(1, frames[..., [BOTH, FLASH]].flatten(1), script.object.flatten(1))
    return heard, flashing
