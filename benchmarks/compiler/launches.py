"""A row of the compiler's table: which kernel, called how; what it takes. Each path has its own in a module here."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A way in which a launcher calls a kernel: the pointers that are not None, the constants, the table's row."""

    module: str
    kernel: str
    configured: str
    tokens: str  # pointers in the dtype of the tokens (or cost)
    solution: str  # those in the dtype of the solve
    constants: dict[str, Any]
    everywhere: bool = True  # or in a few dtypes and classes only
    integers: str = ""  # pointers to integers that only this way has


class Resources(NamedTuple):
    """Of a thread: registers, and bytes that spill from them. Of a program: bytes of shared memory."""

    registers: int
    spills: int
    shared: int


class Row(NamedTuple):
    launch: str
    dtype: str
    tile: tuple[int, int]
    target: str

    def __str__(self) -> str:
        return f"{self.launch} {self.dtype} {self.tile[0]}x{self.tile[1]} {self.target}"


SOLUTION = "f_ptr g_ptr error_ptr history_ptr"
WEIGHTS = "a_ptr b_ptr "
TOKENS = {"COSINE": True, "BARYCENTRIC": False, "PRECISION": "ieee"}

# Of what is not in every class: two dtypes and two classes.
SAMPLE_TILES = {"float32": [(64, 32), (128, 128)], "bfloat16": [(64, 32), (128, 128)]}
