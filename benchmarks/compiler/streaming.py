"""Rows of the compiler's table: problems beyond the chip (``otfuse._backends.triton.streaming``)."""

from __future__ import annotations

import torch

from benchmarks.compiler.launches import Launch
from otfuse._backends.triton.streaming import ATTENDED, LINES, WHOLE_LINES, blocks_of

# Beyond the chip: where tiles come from ("matrix", "tokens", "gradient": streaming.blocks_of) is what is configured.
_FORWARD_STRIP = ("streaming", "_strip_kernel")
_TOKEN_STRIP = {"FIRST": False, "LAST": False, "PRECISION": "ieee"}
_STATE = "weights_ptr exponent_ptr scaling_ptr "
_FOUND = "new_u_ptr part_ptr found_ptr "
_ADJOINT = "weights_ptr history_ptr exponents_ptr start_ptr sums_ptr pull_ptr total_ptr part_ptr "
_MEETING = "weights_ptr history_ptr exponents_ptr "
_UNROLLED = {"MODE": 1, "BARYCENTRIC": True, "PRECISION": "ieee"}
_SENT = "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr "

LAUNCHES = {
    "streaming: strip, tokens": Launch(
        *_FORWARD_STRIP, "tokens", "x_ptr y_ptr", _STATE + _FOUND + "inverse_ptr", _TOKEN_STRIP
    ),
    "streaming: strip, similarity": Launch(
        *_FORWARD_STRIP, "matrix", "", _STATE + _FOUND + "matrix_ptr", _TOKEN_STRIP
    ),
    "streaming: strip, cost": Launch(*_FORWARD_STRIP, "matrix", "matrix_ptr", _STATE + _FOUND, _TOKEN_STRIP),
    "streaming: first strip, tokens": Launch(
        *_FORWARD_STRIP, "tokens", "x_ptr y_ptr", _STATE + _FOUND + "inverse_ptr", _TOKEN_STRIP | {"FIRST": True}
    ),
    "streaming: gather": Launch(
        "streaming", "_gather_kernel", "lines", "", _STATE + _FOUND + "first_ptr items_ptr history_ptr",
        {"FIRST": False, "STOPS": True, "HISTORY": 2},
    ),
    "streaming: finish": Launch(
        "streaming", "_finish_kernel", "lines", "",
        _STATE + "found_ptr items_ptr f_ptr g_ptr error_ptr history_ptr", {"HISTORY": 2},
    ),
    "streaming: weights": Launch("streaming", "_weights_kernel", "lines", "a_ptr b_ptr", "weights_ptr items_ptr", {}),
    "streaming: norms": Launch(
        "streaming", "_norms_kernel", "norms", "x_ptr", "weights_ptr inverse_ptr", {"SWAPPED": False}
    ),
    "streaming: similarity": Launch(
        "streaming", "_matrix_kernel", "tokens", "x_ptr y_ptr",
        _STATE + "inverse_ptr items_ptr similarity_ptr", {"PRECISION": "ieee"},
    ),
    "streaming: plan, cost": Launch(
        "streaming", "_matrix_kernel", "matrix", "matrix_ptr plan_ptr", _STATE + "items_ptr", {"PRECISION": "ieee"}
    ),
    "streaming: attend, tokens": Launch(
        "streaming", "_attend_kernel", "attend", "x_ptr y_ptr out_ptr", _STATE + "inverse_ptr items_ptr",
        {"SWAPPED": False, "BARYCENTRIC": True, "PRECISION": "ieee"},
    ),
    "streaming: attend, similarity": Launch(
        "streaming", "_attend_kernel", "attend", "x_ptr y_ptr out_ptr", _STATE + "matrix_ptr items_ptr",
        {"SWAPPED": False, "BARYCENTRIC": True, "PRECISION": "ieee"},
    ),
    "streaming, backward: start": Launch(
        "streaming_backward", "_start_kernel", "gradient", _SENT, _MEETING + "matrix_ptr rows_ptr part_ptr", _UNROLLED
    ),
    "streaming, backward: started": Launch(
        "streaming_backward", "_started_kernel", "lines", "",
        "weights_ptr rows_ptr part_ptr start_ptr attended_ptr sums_ptr pull_ptr total_ptr",
        {"MODE": 1, "BARYCENTRIC": True},
    ),
    "streaming, backward: round, tokens": Launch(
        "streaming_backward", "_adjoint_strip_kernel", "tokens", "x_ptr y_ptr", _ADJOINT + "inverse_ptr",
        {"PHASE": 0, "PRECISION": "ieee"},
    ),
    "streaming, backward: round, similarity": Launch(
        "streaming_backward", "_adjoint_strip_kernel", "matrix", "", _ADJOINT + "matrix_ptr",
        {"PHASE": 0, "PRECISION": "ieee"},
    ),
    "streaming, backward: step, similarity": Launch(
        "streaming_backward", "_adjoint_strip_kernel", "matrix", "", _ADJOINT + "matrix_ptr",
        {"PHASE": 2, "PRECISION": "ieee"},
    ),
    "streaming, backward: gather": Launch(
        "streaming_backward", "_adjoint_gather_kernel", "lines", "", "weights_ptr part_ptr pull_ptr total_ptr", {}
    ),
    "streaming, backward: gradients": Launch(
        "streaming_backward", "_gradients_kernel", "lines", "",
        "start_ptr sums_ptr part_ptr mapped_ptr residual_ptr direction_ptr total_ptr numbers_ptr", {"FIRST": False},
    ),
    "streaming, backward: cost": Launch(
        "streaming_backward", "_matrix_gradient_kernel", "matrix", "matrix_ptr grad_plan_ptr grad_ptr",
        _MEETING + "pull_ptr total_ptr", _UNROLLED | {"BARYCENTRIC": False},
    ),
    "streaming, backward: similarity": Launch(
        "streaming_backward", "_matrix_gradient_kernel", "gradient", _SENT,
        _MEETING + "matrix_ptr grad_ptr pull_ptr total_ptr", _UNROLLED,
    ),
    "streaming, backward: pull, tokens": Launch(
        "streaming_backward", "_pull_kernel", "pull", _SENT + "grad_x_ptr",
        _MEETING + "inverse_ptr pull_ptr total_ptr", _UNROLLED | {"SWAPPED": True, "COSINE": True},
    ),
    "streaming, backward: pull, similarity": Launch(
        "streaming_backward", "_pull_kernel", "pull", _SENT + "grad_x_ptr",
        _MEETING + "matrix_ptr inverse_ptr grad_ptr pull_ptr total_ptr",
        _UNROLLED | {"SWAPPED": False, "COSINE": True},
    ),
    "streaming, backward: weights": Launch(
        "streaming_backward", "_weight_gradient_kernel", "lines", "grad_ptr",
        "weights_ptr items_ptr history_ptr total_ptr attended_ptr", {"SWAPPED": False, "MODE": 1},
    ),
}  # fmt: skip


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if not LAUNCHES[name].tokens and dtype not in ("float64", "float32"):
        return []  # what sees no tokens is launched in the dtypes of the solve only
    found = _blocks(LAUNCHES[name], dtype)
    return [(found.get("BLOCK_N", found.get("BLOCK", 0)), found.get("BLOCK_M", 1))]


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    return _blocks(LAUNCHES[name], dtype)


def _blocks(launch: Launch, dtype: str) -> dict[str, int]:
    """Block sizes and options as the launchers in streaming.py have them."""
    values = getattr(torch, dtype)
    if launch.configured == "lines":
        lines = WHOLE_LINES if "eights_kernel" in launch.kernel or "weight_g" in launch.kernel else LINES
        return {"BLOCK": lines, "num_warps": 4, "num_stages": 3}
    if launch.configured == "norms":
        return {"BLOCK_N": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
    source = {"pull": "gradient"}.get(launch.configured, launch.configured)
    found = blocks_of(source, values)._asdict()
    if launch.configured in ("attend", "pull"):
        found["BLOCK_F"] = ATTENDED[values.itemsize]
    return found
