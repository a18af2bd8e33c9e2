"""What the Triton kernels take of a GPU, found without one: registers, stack, shared memory, by compiling them.

``python benchmarks/ahead_of_time.py`` writes kernels/triton/resources.json, ``--check`` compares with it and says what
differs, of all rows or of those that have all the words of ``--only WORD …``. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from otfuse.backends._triton_configurations import CLASSES, SHARED_MEMORY, block_sizes
from otfuse.backends._triton_varlen_long import LINES_TILE, LONG_TILE, LONG_TILE_BACKWARD

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"
RESOURCES = KERNELS / "resources.json"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


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


class Variant(NamedTuple):
    """A way in which a launcher calls a kernel: the pointers that are not None, the constants, the table's row."""

    module: str
    kernel: str
    configured: str
    tokens: str  # pointers in the dtype of the tokens (or cost)
    solution: str  # those in the dtype of the solve
    constants: dict[str, Any]
    everywhere: bool = True  # or in the classes of 64 x 32 and 128 x 128 only


_SOLUTION = "f_ptr g_ptr error_ptr history_ptr"
_WEIGHTS = "a_ptr b_ptr "
_TOKENS = {"COSINE": True, "BARYCENTRIC": False, "PRECISION": "ieee"}
_COST = {"COSINE": False, "BARYCENTRIC": False, "PRECISION": "ieee"}
_FORWARD = ("attend", "_attend_fwd_kernel", "forward")
_BACKWARD = ("attend_backward", "_attend_bwd_kernel", "backward")
_LOSS = {"ASSIGNMENT": 0, "CONTRAST": 0, "MEAN": True, "PRECISION": "ieee"}

VARIANTS = {
    "forward": Variant(
        *_FORWARD, "x_ptr y_ptr x_out_ptr y_out_ptr", _SOLUTION, _TOKENS | {"STOPS": False, "HISTORY": 2}
    ),
    "forward, everything": Variant(
        *_FORWARD,
        _WEIGHTS + "x_ptr y_ptr x_out_ptr y_out_ptr plan_ptr",
        "f_ptr g_ptr error_ptr",
        _TOKENS | {"STOPS": True, "HISTORY": 0, "BARYCENTRIC": True},
        False,
    ),
    "forward, cost": Variant(
        *_FORWARD, "similarity_ptr plan_ptr", _SOLUTION, _COST | {"STOPS": False, "HISTORY": 2}, False
    ),
    "backward": Variant(
        *_BACKWARD,
        "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr",
        "history_ptr",
        _TOKENS | {"MODE": 1},
    ),
    "backward, implicit": Variant(
        *_BACKWARD,
        _WEIGHTS + "grad_a_ptr grad_b_ptr x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr",
        "history_ptr",
        _TOKENS | {"MODE": 2, "BARYCENTRIC": True},
        False,
    ),
    "backward, cost": Variant(
        *_BACKWARD, "cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr", _COST | {"MODE": 1}, False
    ),
    "similarity": Variant(
        "attend",
        "_similarity_kernel",
        "similarity",
        "x_ptr y_ptr",
        "similarity_ptr",
        {"COSINE": True, "PRECISION": "ieee"},
    ),
    "loss": Variant(
        "loss", "_alignment_loss_fwd_kernel", "loss", "plan_ptr similarity_ptr", "terms_ptr normaliser_ptr", _LOSS
    ),
    "loss, backward": Variant(
        "loss",
        "_alignment_loss_bwd_kernel",
        "loss_backward",
        "plan_ptr similarity_ptr grad_plan_ptr grad_similarity_ptr",
        "normaliser_ptr grad_terms_ptr",
        _LOSS,
    ),
}  # fmt: skip

_TOKENS_OUT = "x_ptr y_ptr x_out_ptr y_out_ptr"
_GRADIENTS = "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr"
_BACKWARD_LONG = ("varlen_long_backward", "_varlen_rounds_bwd_kernel", "varlen_long")
_OF_ROUNDS = "L_ptr from_x_ptr from_y_ptr history_ptr vector_x_ptr vector_y_ptr"
_PRODUCTS = {"COSINE": True, "PRECISION": "ieee"}

# Of packed tokens: on chip the kernels above within others, configured as those.
PACKED = {
    "packed": Variant(
        "varlen", "_varlen_fwd_kernel", "forward", _TOKENS_OUT, _SOLUTION, VARIANTS["forward"].constants, False
    ),
    "packed, backward": Variant(
        "varlen", "_varlen_bwd_kernel", "backward", _GRADIENTS, "history_ptr", VARIANTS["backward"].constants, False
    ),
    "packed, products": Variant(
        "varlen_long", "_varlen_products_kernel", "varlen_long", "x_ptr y_ptr", "L_ptr", _PRODUCTS
    ),
    "packed, rounds": Variant(
        "varlen_long",
        "_varlen_rounds_kernel",
        "varlen_long",
        "",
        "L_ptr next_ptr " + _SOLUTION,
        {"STOPS": False, "HISTORY": 2},
    ),
    "packed, attend": Variant(
        "varlen_long",
        "_varlen_attend_kernel",
        "varlen_long",
        _TOKENS_OUT,
        "plan_ptr error_ptr",
        {"BARYCENTRIC": False, "PRECISION": "ieee"},
    ),
    "packed, products backward": Variant(
        "varlen_long",
        "_varlen_products_kernel",
        "varlen_long",
        "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr",
        "L_ptr from_x_ptr from_y_ptr inverse_x_ptr inverse_y_ptr",
        _PRODUCTS,
    ),
    "packed, rounds backward": Variant(*_BACKWARD_LONG, "", _OF_ROUNDS, {"BARYCENTRIC": False, "MODE": 1}),
    "packed, rounds backward implicit": Variant(
        *_BACKWARD_LONG, _WEIGHTS + "grad_a_ptr grad_b_ptr", _OF_ROUNDS, {"BARYCENTRIC": True, "MODE": 2}, False
    ),
    "packed, tokens backward": Variant(
        "varlen_long_backward",
        "_varlen_tokens_bwd_kernel",
        "varlen_long_backward",
        _GRADIENTS,
        "L_ptr G_ptr plan_ptr inverse_x_ptr inverse_y_ptr",
        _TOKENS,
    ),
}
VARIANTS |= PACKED

# A tile of every class, and others of the same size that lie the other way or are thin: their blocks of tokens are the
# largest that are launched.
TILES = {512: (16, 16), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}
_OTHERS = [(256, 32), (32, 256), (64, 128)]
OTHERS = {"float64": [(32, 64)], "float32": _OTHERS, "bfloat16": _OTHERS, "float16": _OTHERS}
OF_A_COST = [(256, 64), (64, 256)]  # as tokens these do not fit
SQUARES = TILES | {1024: (32, 32)}  # of the kernels that cut what is larger

# The other variants: in two dtypes and two classes, but for the forward with a cost, which is in all that it solves in.
SAMPLED = {"float32": [(64, 32), (128, 128)], "bfloat16": [(64, 32), (128, 128)]}


def rows() -> list[Row]:
    """Every row of the table, the main variants first."""
    names = sorted(VARIANTS, key=lambda name: not VARIANTS[name].everywhere)
    return [
        Row(name, dtype, tile, target)
        for name in names
        for dtype in DTYPES
        for tile in tiles(VARIANTS[name], dtype)
        for target in TARGETS
    ]


def tiles(variant: Variant, dtype: str) -> list[tuple[int, int]]:
    if variant.module.startswith("varlen_long"):
        return [packed_tile(variant, dtype)]
    sizes = CLASSES[variant.configured][dtype]
    if variant == VARIANTS["forward, cost"] and dtype in ("float64", "float32"):
        return [TILES[size] for size in sizes] + (OTHERS[dtype] + OF_A_COST if dtype == "float32" else [])
    if not variant.everywhere:
        return SAMPLED.get(dtype, [])
    if variant.configured in ("forward", "backward"):
        return [TILES[size] for size in sizes] + OTHERS[dtype]
    return [SQUARES[size] for size in sizes]


def packed_tile(variant: Variant, dtype: str) -> tuple[int, int]:
    """The one tile of a kernel for packed items that fit none on chip."""
    itemsize = 8 if dtype == "float64" else 4
    if "rounds" in variant.kernel:
        return LINES_TILE[itemsize]
    return (LONG_TILE_BACKWARD if variant.configured == "varlen_long_backward" else LONG_TILE)[itemsize]


def must_not_spill(row: Row) -> bool:
    """Forward kernels never; what a backward kernel spills is pinned by the table."""
    variant = VARIANTS[row.variant]
    return variant.configured == "forward" or (variant.module == "varlen_long" and "backward" not in row.variant)


def compile_row(row: Row, configuration: dict[str, int] | None = None) -> Resources:
    """Of this row, as the committed table configures it or otherwise."""
    variant = VARIANTS[row.variant]
    blocks = dict(configuration or configured(row))
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    source = _source(variant, row.dtype, variant.constants | blocks)
    compiled = triton.compile(source, target=TARGETS[row.target], options=options | {"enable_fp_fusion": True})
    read: Callable[..., tuple[int, int]] = _of_cubin if "cubin" in compiled.asm else _of_amdgcn
    return Resources(*read(compiled.asm), compiled.metadata.shared)


def configured(row: Row) -> dict[str, int]:
    """What the committed table launches it with."""
    # A cost is widened as it is read: its kernels are configured as those of the dtype that they solve in.
    dtype = "float32" if row.variant.endswith("cost") and row.dtype != "float64" else row.dtype
    return block_sizes(VARIANTS[row.variant].configured, dtype, *row.tile, row.target)


def _source(variant: Variant, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types that its launcher passes; pointers are aligned, and so are rows of tokens."""
    module = __import__(f"otfuse.kernels.triton.{variant.module}", fromlist=[variant.kernel])
    kernel = getattr(module, variant.kernel)
    tokens, solve = "*" + DTYPES[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = dict.fromkeys(variant.tokens.split(), tokens) | dict.fromkeys(variant.solution.split(), solve)
    types |= dict.fromkeys(("rounds_ptr", "has_mass_ptr", "cu_seqlens_x_ptr", "cu_seqlens_y_ptr"), "*i32")
    types |= {"scale": "fp64", "tol": "fp64"}
    signature, constant, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or (name.endswith("_ptr") and name not in types):
            signature[name], constant[(place,)] = "constexpr", constants.get(name)
            continue
        signature[name] = types.get(name, "i32")
        if name.endswith("_ptr") or name in ("D", "part_features"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constant, attributes)


def _of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    return _number(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"]), _number(
        r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"]
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return int(found[1])


def try_row(row: Row, configuration: dict[str, int] | None) -> Resources | str:
    try:
        return compile_row(row, configuration)
    except Exception as error:  # one row that does not compile is a finding, and hides no other
        return f"{type(error).__name__}: {str(error)[-300:]}"


def compile_rows(
    wanted: Sequence[Row], configurations: Sequence[dict[str, int] | None] | None = None, processes: int = 2
) -> Iterator[Resources | str]:
    """The resources of each row, or why it does not compile."""
    with compiling(processes) as pool:
        yield from pool.map(try_row, wanted, configurations or [None] * len(wanted))


@contextlib.contextmanager
def compiling(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile anew: nothing is taken from the disk cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield pool


def problems(row: Row, found: Resources | str) -> list[str]:
    """What is wrong with a row by itself."""
    if isinstance(found, str):
        return [f"{row}: {found}"]
    wrong = []
    limit = SHARED_MEMORY[row.target]
    if found.shared > limit:
        wrong.append(f"{row}: {found.shared} bytes of shared memory, of {limit}")
    if found.stack and must_not_spill(row):
        wrong.append(f"{row}: a stack of {found.stack} bytes, in a forward kernel")
    return wrong


def differences(row: Row, found: Resources | str, table: dict[str, Any]) -> list[str]:
    """What is not as in the table; from another Triton, registers and stacks may differ."""
    if isinstance(found, str):
        return []
    expected = committed(row, table)
    if expected is None:
        return [f"{row}: not in the table"]
    if table["triton"] != triton.__version__ or expected == found:
        return []
    return [f"{row}: {tuple(found)}, in the table {tuple(expected)}"]


def committed(row: Row, table: dict[str, Any]) -> Resources | None:
    tile = f"{row.tile[0]}x{row.tile[1]}"
    found = table["rows"].get(row.variant, {}).get(row.dtype, {}).get(tile, {}).get(row.target)
    return None if found is None else Resources(*found[:3])


def is_current(row: Row, table: dict[str, Any]) -> bool:
    """Whether the table has the row, of these sources and as it is configured now."""
    tile, kernel = f"{row.tile[0]}x{row.tile[1]}", source_of(VARIANTS[row.variant])
    found = table["rows"].get(row.variant, {}).get(row.dtype, {}).get(tile, {}).get(row.target, [])
    return table["sources"].get(kernel) == sources_hash(kernel) and found[3:] == _steps(row)


def _steps(row: Row) -> list[int]:
    return [configured(row).get(name, 0) for name in ("BLOCK_D", "num_warps", "num_stages")]


def source_of(variant: Variant) -> str:
    """The name under which the table has the hash of a variant's sources."""
    return variant.module if variant.module.startswith("varlen") else variant.configured


def sources_hash(kernel: str) -> str:
    """Of the sources that a kernel's rows are made of."""
    modules: tuple[str, ...]
    modules = ("rounds", "loss") if kernel.startswith("loss") else ("rounds", "attend", "attend_backward")
    if kernel in ("forward", "similarity"):
        modules = modules[:2]
    if kernel.startswith("varlen"):
        modules += ("varlen", "varlen_long", "varlen_long_backward")[: 1 + kernel.count("_")]
    digest = hashlib.sha256()
    for module in modules:
        digest.update((KERNELS / f"{module}.py").read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def sources_hashes() -> dict[str, str]:
    return {kernel: sources_hash(kernel) for kernel in dict.fromkeys(map(source_of, VARIANTS.values()))}


def load_table() -> dict[str, Any]:
    return json.loads(RESOURCES.read_text())


def write_table(found: dict[Row, Resources], sources: dict[str, str]) -> None:
    """One line a tile, its targets side by side."""
    table: dict[str, Any] = {}
    for row, resources in found.items():
        tile = f"{row.tile[0]}x{row.tile[1]}"
        sides = table.setdefault(row.variant, {}).setdefault(row.dtype, {})
        sides.setdefault(tile, {})[row.target] = [*resources, *_steps(row)]
    variants = []
    for variant, dtypes in table.items():
        blocks = []
        for dtype, sides in dtypes.items():
            lines = [f"        {json.dumps(tile)}: {json.dumps(targets)}" for tile, targets in sides.items()]
            blocks.append(f"      {json.dumps(dtype)}: {{\n" + ",\n".join(lines) + "\n      }")
        variants.append(f"    {json.dumps(variant)}: {{\n" + ",\n".join(blocks) + "\n    }")
    head = {
        "note": "Registers and bytes of stack a thread, bytes of shared memory; and with what: BLOCK_D, warps, stages.",
        "triton": triton.__version__,
        "sources": sources,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    RESOURCES.write_text("{\n" + ",\n".join([*lines, '  "rows": {\n' + ",\n".join(variants) + "\n  }"]) + "\n}\n")


def make_table(processes: int) -> list[str]:
    """Writes the table as it grows, keeping the rows whose sources have not changed. What is wrong with it."""
    sources = sources_hashes()
    old = load_table()
    current = old["triton"] == triton.__version__
    kept = {row: committed(row, old) if current and is_current(row, old) else None for row in rows()}
    found = {row: resources for row, resources in kept.items() if resources}
    missing = sorted((row for row in kept if row not in found), key=lambda row: not must_not_spill(row))
    wrong = [line for row, resources in found.items() for line in problems(row, resources)]
    for row, resources in zip(missing, compile_rows(missing, processes=processes)):
        wrong += problems(row, resources)
        if not isinstance(resources, str):
            found[row] = resources
            write_table(found, sources)
    return wrong


def check(wanted: list[Row], table: dict[str, Any]) -> list[str]:
    """What is wrong with these rows, compiled anew, or not as in the table."""
    wrong = []
    for row, resources in zip(wanted, compile_rows(wanted)):
        wrong += problems(row, resources) + differences(row, resources, table)
    wrong += [f"{row}: changed since the table was made" for row in wanted if not is_current(row, table)]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="check rows that have all of these")
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side")
    options = parser.parse_args()
    wanted = [row for row in rows() if set(options.only) <= set(str(row).split())]
    wrong = check(wanted, load_table()) if options.check or options.only else make_table(options.processes)
    print(*wrong, f"{len(wanted)} rows, {len(wrong)} problems", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
