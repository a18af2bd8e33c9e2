"""Rows of the compiler's table: many small costs (``otfuse._backends.triton.small``)."""

from __future__ import annotations

import torch

from benchmarks.compiler.launches import SOLUTION, WEIGHTS, Launch
from otfuse._backends.triton.small import small_blocks

_FORWARD = ("small", "_small_fwd_kernel")
_BACKWARD = ("small_backward", "_small_bwd_kernel")
LAUNCHES = {
    "small": Launch(*_FORWARD, "small", "cost_ptr plan_ptr", SOLUTION, {"STOPS": False, "HISTORY": 2}),
    "small, inference": Launch(
        *_FORWARD, "small", "cost_ptr plan_ptr", "f_ptr g_ptr error_ptr", {"STOPS": False, "HISTORY": 0}
    ),
    "small, everything": Launch(
        *_FORWARD, "small, everything", WEIGHTS + "cost_ptr plan_ptr", SOLUTION, {"STOPS": True, "HISTORY": 1}, False
    ),
    "small, backward": Launch(
        *_BACKWARD, "small, backward", "cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr",
        {"STOPS": False, "MODE": 1},
    ),
    "small, backward, everything": Launch(
        *_BACKWARD, "small, backward, everything",
        WEIGHTS + "grad_a_ptr grad_b_ptr cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr grad_f_ptr grad_g_ptr",
        {"STOPS": True, "MODE": 1}, False,
    ),
}  # fmt: skip

# A square of every class; in float32 the forward of the other pairs of sides too, and what keeps nothing.
SIDES = (2, 4, 8, 16)
SQUARES = [(side, side) for side in SIDES]
OTHERS = [(N, M) for N in SIDES for M in SIDES if N != M]


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if not LAUNCHES[name].everywhere:
        return SQUARES if dtype in ("float64", "float32") else []
    if name == "small, inference":
        return SQUARES if dtype == "float32" else []
    return SQUARES + (OTHERS if (name, dtype) == ("small", "float32") else [])


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    found = small_blocks(LAUNCHES[name].configured, *tile, getattr(torch, dtype))
    return found | {"EXACT": found["EXACT"] and LAUNCHES[name].everywhere}
