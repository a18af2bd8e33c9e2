"""Rows of the ahead-of-time table: packed tokens (``otfuse.backends.triton_varlen``)."""

from __future__ import annotations

from variant import SAMPLED, SOLUTION, TOKENS, WEIGHTS, Family, Variant

from otfuse.backends._triton_configurations import block_sizes
from otfuse.backends._triton_varlen_long import LINES_TILE, LONG_TILE, LONG_TILE_BACKWARD

_TOKENS_OUT = "x_ptr y_ptr x_out_ptr y_out_ptr"
_GRADIENTS = "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr"
_ROUNDS_BACKWARD = ("varlen_long_backward", "_varlen_rounds_bwd_kernel", "varlen_long")
_OF_ROUNDS = "L_ptr from_x_ptr from_y_ptr history_ptr vector_x_ptr vector_y_ptr"
_PRODUCTS = ("varlen_long", "_varlen_products_kernel", "varlen_long")
_OF_PRODUCTS = {"COSINE": True, "PRECISION": "ieee"}

# On chip the kernels of padded tokens within others, configured as those.
VARIANTS = {
    "packed": Variant(
        "varlen", "_varlen_fwd_kernel", "forward", _TOKENS_OUT, SOLUTION, TOKENS | {"STOPS": False, "HISTORY": 2}, False
    ),
    "packed, backward": Variant(
        "varlen", "_varlen_bwd_kernel", "backward", _GRADIENTS, "history_ptr", TOKENS | {"MODE": 1}, False
    ),
    "packed, products": Variant(*_PRODUCTS, "x_ptr y_ptr", "L_ptr", _OF_PRODUCTS),
    "packed, rounds": Variant(
        "varlen_long", "_varlen_rounds_kernel", "varlen_long", "", "L_ptr next_ptr " + SOLUTION,
        {"STOPS": False, "HISTORY": 2},
    ),
    "packed, attend": Variant(
        "varlen_long", "_varlen_attend_kernel", "varlen_long", _TOKENS_OUT, "plan_ptr error_ptr",
        {"BARYCENTRIC": False, "PRECISION": "ieee"},
    ),
    "packed, products backward": Variant(
        *_PRODUCTS, "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr",
        "L_ptr from_x_ptr from_y_ptr inverse_x_ptr inverse_y_ptr", _OF_PRODUCTS,
    ),
    "packed, rounds backward": Variant(*_ROUNDS_BACKWARD, "", _OF_ROUNDS, {"BARYCENTRIC": False, "MODE": 1}),
    "packed, rounds backward implicit": Variant(
        *_ROUNDS_BACKWARD, WEIGHTS + "grad_a_ptr grad_b_ptr", _OF_ROUNDS, {"BARYCENTRIC": True, "MODE": 2}, False
    ),
    "packed, tokens backward": Variant(
        "varlen_long_backward", "_varlen_tokens_bwd_kernel", "varlen_long_backward", _GRADIENTS,
        "L_ptr G_ptr plan_ptr inverse_x_ptr inverse_y_ptr", TOKENS,
    ),
}  # fmt: skip


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    variant, itemsize = VARIANTS[name], 8 if dtype == "float64" else 4
    if variant.module == "varlen":
        return SAMPLED.get(dtype, [])
    if "rounds" in variant.kernel:
        return [LINES_TILE[itemsize]]
    return [(LONG_TILE_BACKWARD if variant.configured == "varlen_long_backward" else LONG_TILE)[itemsize]]


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    return block_sizes(VARIANTS[name].configured, dtype, *tile, target)


def sources(name: str) -> tuple[str, ...]:
    """A packed kernel calls the ones on chip."""
    modules = ("varlen", "varlen_long", "varlen_long_backward")
    return "rounds", "attend", "attend_backward", *modules[: 1 + modules.index(VARIANTS[name].module)]


FAMILY = Family(VARIANTS, tiles, blocks, lambda name: "backward" not in name, sources)
