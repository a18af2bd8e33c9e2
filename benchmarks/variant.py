"""A row of the ahead-of-time table: which kernel, called how; what it takes. Each path's own: ``variants_*.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """A way in which a launcher calls a kernel: the pointers that are not None, the constants, the table's row."""

    module: str
    kernel: str
    configured: str
    tokens: str  # pointers in the dtype of the tokens (or cost)
    solution: str  # those in the dtype of the solve
    constants: dict[str, Any]
    everywhere: bool = True  # or in a few dtypes and classes only
    integers: str = ""  # pointers to integers that only this way has


class Family(NamedTuple):
    """Kernels of one path, whose launcher has tiles of its own. Functions take the name of a variant and a dtype."""

    variants: dict[str, Variant]
    tiles: Callable[[str, str], list[tuple[int, int]]]
    blocks: Callable[[str, str, tuple[int, int], str], dict[str, int]]  # of a tile on a target, as it is launched
    forward: Callable[[str], bool]  # which must not have a stack
    runs: Callable[[str, tuple[int, int], str], bool] = lambda dtype, tile, target: True  # whether a target has it


class Resources(NamedTuple):
    """Of a thread: registers, and bytes of stack, which is where they spill to. Of a program: bytes shared."""

    registers: int
    stack: int
    shared: int


class Row(NamedTuple):
    variant: str
    dtype: str
    tile: tuple[int, int]
    target: str

    def __str__(self) -> str:
        return f"{self.variant} {self.dtype} {self.tile[0]}x{self.tile[1]} {self.target}"


SOLUTION = "f_ptr g_ptr error_ptr history_ptr"
WEIGHTS = "a_ptr b_ptr "
TOKENS = {"COSINE": True, "BARYCENTRIC": False, "PRECISION": "ieee"}

# Of what is not in every class: two dtypes and two classes.
SAMPLED = {"float32": [(64, 32), (128, 128)], "bfloat16": [(64, 32), (128, 128)]}
