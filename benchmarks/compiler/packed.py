"""Rows of the compiler's table: packed tokens (``otfuse._backends.triton.varlen``)."""

from __future__ import annotations

from benchmarks.compiler import streaming
from benchmarks.compiler.launches import SAMPLE_TILES, SOLUTION, TOKENS, Launch
from otfuse._backends.triton.configurations import block_sizes
from otfuse._backends.triton.places import MADE
from otfuse._backends.triton.varlen import _MOVED as MOVED

# What is launched for items that no tile holds, with a table instead of one size for all.
_LONG = (
    "streaming: weights", "streaming: norms", "streaming: similarity", "streaming: strip, similarity",
    "streaming: gather", "streaming: finish", "streaming: attend, similarity",
    "streaming, backward: start", "streaming, backward: started", "streaming, backward: round, similarity",
    "streaming, backward: gather", "streaming, backward: gradients", "streaming, backward: similarity",
    "streaming, backward: pull, similarity", "streaming, backward: weights",
)  # fmt: skip
LONG = {
    name.replace("streaming", "packed, long"): streaming.LAUNCHES[name]._replace(everywhere=False, integers="table_ptr")
    for name in _LONG
}

# On chip the kernels of padded tokens within others, configured as those.
LAUNCHES = {
    "packed": Launch(
        "varlen", "_varlen_fwd_kernel", "forward", "x_ptr y_ptr x_out_ptr y_out_ptr", SOLUTION,
        TOKENS | {"STOPS": False, "HISTORY": 2}, False,
    ),
    "packed, backward": Launch(
        "varlen", "_varlen_bwd_kernel", "backward",
        "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr", "history_ptr", TOKENS | {"MODE": 1}, False,
    ),
    "packed: matrix": Launch(
        "varlen", "_varlen_matrix_kernel", "matrix", "", "packed_ptr padded_ptr error_ptr", {"PACK": False}, False
    ),
    "packed, long: table": Launch(
        "places", "_table_kernel", "table", "", "", {"ROWS": 16, "COLUMNS": 0, "STRIP": 16}, False, "table_ptr"
    ),
} | LONG  # fmt: skip


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if name in LONG:
        return streaming.tiles(_padded(name), dtype) if dtype in SAMPLE_TILES else []
    if LAUNCHES[name].configured == "table":
        return [(MADE["PLACES"], MADE["ITEMS"])] if dtype == "float32" else []
    if LAUNCHES[name].configured == "matrix":
        return [(MOVED["BLOCK_N"], MOVED["BLOCK_M"])] if dtype == "float32" else []
    return SAMPLE_TILES.get(dtype, [])


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    if name in LONG:
        return streaming.blocks(_padded(name), dtype, tile, target)
    if LAUNCHES[name].configured == "table":
        return {**MADE, "num_stages": 3}
    if LAUNCHES[name].configured == "matrix":
        return MOVED
    return block_sizes(LAUNCHES[name].configured, dtype, *tile, target)


def _padded(name: str) -> str:
    return name.replace("packed, long", "streaming")
