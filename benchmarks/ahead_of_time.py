"""What the Triton kernels take of a GPU, found without one: registers, stack, shared memory, by compiling them.

``python benchmarks/ahead_of_time.py`` compiles every row anew (hours) and writes resources.json with the version of
Triton and the commit that it was made with; nothing reads it at run time, and an edit of a kernel does not outdate it
for any test. ``--check`` compiles rows, all or those that have all the words of ``--only WORD …``, and says what is
wrong with them and what differs from the file. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
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
from typing import Any

import torch
import triton
import variants_cluster
import variants_packed
import variants_small
import variants_streaming
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from variant import SAMPLED, SOLUTION, TOKENS, WEIGHTS, Resources, Row, Variant

from otfuse._backends.triton.configurations import CLASSES, SHARED_MEMORY, block_sizes
from otfuse._backends.triton.paths import fits_on_chip

PACKAGE = "otfuse.kernels.triton"
KERNELS = Path(__file__).parents[1] / "kernels" / "triton"
RESOURCES = Path(__file__).with_name("resources.json")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


_COST = {"COSINE": False, "BARYCENTRIC": False, "PRECISION": "ieee"}
_FORWARD = ("attend", "_attend_fwd_kernel", "forward")
_BACKWARD = ("attend_backward", "_attend_bwd_kernel", "backward")
_LOSS = {"ASSIGNMENT": 0, "CONTRAST": 0, "MEAN": True, "PRECISION": "ieee"}

VARIANTS = {
    "forward": Variant(
        *_FORWARD, "x_ptr y_ptr x_out_ptr y_out_ptr", SOLUTION, TOKENS | {"STOPS": False, "HISTORY": 2}
    ),
    "forward, inference": Variant(
        *_FORWARD,
        "x_ptr y_ptr x_out_ptr y_out_ptr",
        "f_ptr g_ptr error_ptr",
        TOKENS | {"STOPS": False, "HISTORY": 0},
    ),
    "forward, everything": Variant(
        *_FORWARD,
        WEIGHTS + "x_ptr y_ptr x_out_ptr y_out_ptr plan_ptr",
        "f_ptr g_ptr error_ptr",
        TOKENS | {"STOPS": True, "HISTORY": 0, "BARYCENTRIC": True},
        False,
    ),
    "forward, cost": Variant(
        *_FORWARD, "similarity_ptr plan_ptr", SOLUTION, _COST | {"STOPS": False, "HISTORY": 2}, False
    ),
    "backward": Variant(
        *_BACKWARD,
        "x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr",
        "history_ptr",
        TOKENS | {"MODE": 1},
    ),
    "backward, implicit": Variant(
        *_BACKWARD,
        WEIGHTS + "grad_a_ptr grad_b_ptr x_ptr y_ptr grad_x_out_ptr grad_y_out_ptr grad_x_ptr grad_y_ptr",
        "history_ptr",
        TOKENS | {"MODE": 2, "BARYCENTRIC": True},
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

INTEGERS = "rounds", "has_mass", "stopped", "done", "cu_seqlens_x", "cu_seqlens_y"  # pointers
FAMILIES = variants_small.FAMILY, variants_streaming.FAMILY, variants_packed.FAMILY, variants_cluster.FAMILY
FAMILY_OF = {name: family for family in FAMILIES for name in family.variants}
for _family in FAMILIES:
    VARIANTS |= _family.variants

# A tile of every class.
TILES = {512: (16, 16), 1024: (32, 32), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}

EVERY_TILE = "forward", "forward, inference", "forward, cost"  # that is launched

# Of the backward, besides, others of the same size, that lie the other way or are thin: their blocks of tokens are the
# largest that are launched; and what is searched through (tune_triton.py).
_OTHERS = [(256, 32), (32, 256), (64, 128), (64, 64)]
OTHERS = {"float64": [(32, 64)], "float32": _OTHERS, "bfloat16": _OTHERS, "float16": _OTHERS}


def rows() -> list[Row]:
    """Every row of the table, the main variants first."""
    names = sorted(VARIANTS, key=lambda name: not VARIANTS[name].everywhere)
    return [
        Row(name, dtype, tile, target)
        for name in names
        for dtype in DTYPES
        for tile in tiles(name, dtype)
        for target in TARGETS
        if name not in FAMILY_OF or FAMILY_OF[name].runs(dtype, tile, target)
    ]


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if name in FAMILY_OF:
        return FAMILY_OF[name].tiles(name, dtype)
    if name in EVERY_TILE:
        return launched(dtype, cost=name == "forward, cost")
    if not VARIANTS[name].everywhere:
        return SAMPLED.get(dtype, [])
    of_classes = [TILES[size] for size in CLASSES[VARIANTS[name].configured][dtype]]
    return of_classes + (OTHERS[dtype] if name == "backward" else [])


def launched(dtype: str, cost: bool = False) -> list[tuple[int, int]]:
    """The tiles that the backend launches a solve on chip for, of tokens or a cost of this dtype."""
    sides = [16 << power for power in range(5)]
    features = 0 if cost else 1
    fits = (tile for tile in itertools.product(sides, sides) if fits_on_chip(*tile, features, getattr(torch, dtype)))
    return list(fits)


# Bytes of the one forward tile that no configuration is found for: a row's offset beside the largest tile (2026-12-01).
SPILLS = {Row("forward, cost", "float32", (128, 128), "sm_100"): 24}


def must_not_spill(row: Row) -> bool:
    """Forward kernels never, but for SPILLS."""
    if row.variant in FAMILY_OF:
        return FAMILY_OF[row.variant].forward(row.variant)
    return VARIANTS[row.variant].configured == "forward"


def compile_row(row: Row, configuration: dict[str, int] | None = None) -> Resources:
    """Of this row, as the committed table configures it or otherwise."""
    compiled = compile_variant(VARIANTS[row.variant], row.dtype, configuration or configured(row), row.target)
    read: Callable[..., tuple[int, int]] = _of_cubin if "cubin" in compiled.asm else _of_amdgcn
    return Resources(*read(compiled.asm), compiled.metadata.shared)


def compile_variant(variant: Variant, dtype: str, configuration: dict[str, int], target: str) -> Any:
    """Triton's compiled kernel, with the texts of all its stages."""
    options, constants = launched_with(variant, configuration)
    return triton.compile(source(variant, dtype, constants), target=TARGETS[target], options=options)


def launched_with(variant: Variant, configuration: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Triton's own, and the kernel's constants."""
    own = ("num_warps", "num_stages", "num_ctas")
    options = {name: configuration[name] for name in own if name in configuration} | {"enable_fp_fusion": True}
    return options, variant.constants | {name: size for name, size in configuration.items() if name not in own}


def configured(row: Row) -> dict[str, int]:
    """What the committed table launches it with."""
    if row.variant in FAMILY_OF:
        return FAMILY_OF[row.variant].blocks(row.variant, row.dtype, row.tile, row.target)
    # A cost is widened as it is read: its kernels are configured as those of the dtype that they solve in.
    dtype = "float32" if row.variant.endswith("cost") and row.dtype != "float64" else row.dtype
    kernel = row.variant if row.variant == "forward, cost" else VARIANTS[row.variant].configured
    return block_sizes(kernel, dtype, *row.tile, row.target)


def configuration_of(row: Row) -> tuple[int, int, int]:
    """Of ``configured``, what is chosen."""
    blocks = configured(row)
    return blocks.get("BLOCK_D", 0), blocks["num_warps"], blocks["num_stages"]


def source(variant: Variant, dtype: str, constants: dict[str, Any], package: str = PACKAGE) -> ASTSource:
    """The kernel with the types that its launcher passes; pointers are aligned, and so are rows of tokens."""
    module = importlib.import_module(f"{package}.{variant.module}")
    kernel = getattr(module, variant.kernel)
    tokens, solve = "*" + DTYPES[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = dict.fromkeys(variant.tokens.split(), tokens) | dict.fromkeys(variant.solution.split(), solve)
    types |= {name + "_ptr": "*i32" for name in INTEGERS} | dict.fromkeys(variant.integers.split(), "*i32")
    types |= {"scale": "fp64", "unit": "fp64", "tol": "fp64", "offset_ptr": solve, "passed_ptr": solve}
    signature, constant, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or (name.endswith("_ptr") and name not in types):
            signature[name], constant[(place,)] = "constexpr", constants.get(name)
            continue
        if name == "stride_m":  # of the one side; of the other it is stride_n that is one
            signature[name], constant[(place,)] = "constexpr", 1
            continue
        signature[name] = types.get(name, "i32")
        if name.endswith("_ptr") or name in ("D", "part_features", "stride_n"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constant, attributes)


def intermediate(source: ASTSource, target: Any, options: dict[str, Any]) -> str:
    """Triton's code for the kernel, inlined and simplified, without names and lines."""
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    code = source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    return stages["ttir"](code, {}).str_nodebug()


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
    if found.stack > SPILLS.get(row, 0) and must_not_spill(row):
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


def _steps(row: Row) -> list[int]:
    """With what it is launched: BLOCK_D, or of small costs the items; warps and stages."""
    blocks = configured(row)
    return [blocks.get("BLOCK_D", blocks.get("ITEMS", 0)), blocks["num_warps"], blocks["num_stages"]]


def load_table() -> dict[str, Any]:
    return json.loads(RESOURCES.read_text())


def write_table(found: dict[Row, Resources]) -> None:
    """One line a tile, its targets side by side."""
    table: dict[str, Any] = {}
    for row in [row for row in rows() if row in found]:
        tile = f"{row.tile[0]}x{row.tile[1]}"
        sides = table.setdefault(row.variant, {}).setdefault(row.dtype, {})
        sides.setdefault(tile, {})[row.target] = [*found[row], *_steps(row)]
    variants = []
    for variant, dtypes in table.items():
        blocks = []
        for dtype, sides in dtypes.items():
            lines = [f"        {json.dumps(tile)}: {json.dumps(targets)}" for tile, targets in sides.items()]
            blocks.append(f"      {json.dumps(dtype)}: {{\n" + ",\n".join(lines) + "\n      }")
        variants.append(f"    {json.dumps(variant)}: {{\n" + ",\n".join(blocks) + "\n    }")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=KERNELS)
    head = {
        "note": "Registers and bytes of stack a thread, bytes of shared memory; and BLOCK_D or items, warps, stages.",
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    RESOURCES.write_text("{\n" + ",\n".join([*lines, '  "rows": {\n' + ",\n".join(variants) + "\n  }"]) + "\n}\n")


def make_table(processes: int) -> list[str]:
    """Compiles every row and writes the file. What is wrong with it."""
    wanted, found, wrong = rows(), {}, []
    for row, resources in zip(wanted, compile_rows(wanted, processes=processes)):
        wrong += problems(row, resources)
        if not isinstance(resources, str):
            found[row] = resources
    write_table(found)
    return wrong


def check(wanted: list[Row], table: dict[str, Any]) -> list[str]:
    """What is wrong with these rows, compiled anew, or not as in the table."""
    wrong = []
    for row, resources in zip(wanted, compile_rows(wanted)):
        wrong += problems(row, resources) + differences(row, resources, table)
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
