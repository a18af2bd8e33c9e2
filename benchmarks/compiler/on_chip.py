"""Rows of the compiler's table: all on chip, of tokens or a cost, and the loss (``otfuse._backends.triton.attend``)."""

from __future__ import annotations

import itertools

import torch

from benchmarks.compiler.launches import SAMPLE_TILES, SOLUTION, TOKENS, WEIGHTS, Launch
from otfuse._backends.triton.configurations import CLASSES, block_sizes
from otfuse._backends.triton.paths import fits_on_chip

_FORWARD = ("attend", "_attend_fwd_kernel", "forward")
_BACKWARD = ("attend_backward", "_attend_bwd_kernel", "backward")
_OUTPUTS = "x_ptr y_ptr x_out_ptr y_out_ptr"
_GRADIENTS = "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr"
_COST = {"COSINE": False, "BARYCENTRIC": False, "PRECISION": "ieee"}
_LOSS = {"ASSIGNMENT": 0, "CONTRAST": 0, "MEAN": True, "PRECISION": "ieee"}
LAUNCHES = {
    "forward": Launch(*_FORWARD, _OUTPUTS, SOLUTION, TOKENS | {"STOPS": False, "HISTORY": 2}),
    "forward, inference": Launch(
        *_FORWARD, _OUTPUTS, "f_ptr g_ptr error_ptr", TOKENS | {"STOPS": False, "HISTORY": 0}
    ),
    "forward, everything": Launch(
        *_FORWARD, WEIGHTS + _OUTPUTS + " plan_ptr", "f_ptr g_ptr error_ptr",
        TOKENS | {"STOPS": True, "HISTORY": 0, "BARYCENTRIC": True}, False,
    ),
    "forward, cost": Launch(
        *_FORWARD, "similarity_ptr plan_ptr", SOLUTION, _COST | {"STOPS": False, "HISTORY": 2}, False
    ),
    "backward": Launch(*_BACKWARD, _GRADIENTS, "history_ptr", TOKENS | {"MODE": 1}),
    "backward, implicit": Launch(
        *_BACKWARD, WEIGHTS + "grad_a_ptr grad_b_ptr " + _GRADIENTS, "history_ptr",
        TOKENS | {"MODE": 2, "BARYCENTRIC": True}, False,
    ),
    "backward, cost": Launch(
        *_BACKWARD, "cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr", _COST | {"MODE": 1}, False
    ),
    "similarity": Launch(
        "attend", "_similarity_kernel", "similarity", "x_ptr y_ptr", "similarity_ptr",
        {"COSINE": True, "PRECISION": "ieee"},
    ),
    "loss": Launch(
        "loss", "_alignment_loss_fwd_kernel", "loss", "plan_ptr similarity_ptr", "terms_ptr normaliser_ptr", _LOSS
    ),
    "loss, backward": Launch(
        "loss", "_alignment_loss_bwd_kernel", "loss_backward",
        "plan_ptr similarity_ptr grad_plan_ptr grad_similarity_ptr", "normaliser_ptr grad_terms_ptr", _LOSS,
    ),
}  # fmt: skip

# A tile of every class.
TILES = {512: (16, 16), 1024: (32, 32), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}

EVERY_TILE = "forward", "forward, inference", "forward, cost"  # that is launched

# Of the backward, besides, others of the same size, that lie the other way or are thin: their blocks of tokens are the
# largest that are launched; and what is searched through (tune.py).
_OTHERS = [(256, 32), (32, 256), (64, 128), (64, 64)]
OTHERS = {"float64": [(32, 64)], "float32": _OTHERS, "bfloat16": _OTHERS, "float16": _OTHERS}


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if name in EVERY_TILE:
        return launched_tiles(dtype, cost=name == "forward, cost")
    if not LAUNCHES[name].everywhere:
        return SAMPLE_TILES.get(dtype, [])
    of_classes = [TILES[size] for size in CLASSES[LAUNCHES[name].configured][dtype]]
    return of_classes + (OTHERS[dtype] if name == "backward" else [])


def launched_tiles(dtype: str, cost: bool = False) -> list[tuple[int, int]]:
    """Those that the backend launches a solve on chip for, of tokens or a cost of this dtype."""
    sides, features = [16 << power for power in range(5)], 0 if cost else 1
    return [tile for tile in itertools.product(sides, sides) if fits_on_chip(*tile, features, getattr(torch, dtype))]


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    # A cost is widened as it is read: its kernels are configured as those of the dtype that they solve in.
    dtype = "float32" if name.endswith("cost") and dtype != "float64" else dtype
    kernel = name if name == "forward, cost" else LAUNCHES[name].configured
    return block_sizes(kernel, dtype, *tile, target)
