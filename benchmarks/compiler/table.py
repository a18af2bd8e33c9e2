"""What the Triton kernels take of a GPU, found without one: registers, spills, shared memory, by compiling them.

``python -m benchmarks.compiler.table`` (``make resources``) compiles every row anew (hours) and writes resources.json
with the version of Triton and the commit that it was made with. Nothing reads that file, neither at run time nor in a
test. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
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

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from benchmarks.compiler import cluster, on_chip, packed, small, streaming
from benchmarks.compiler.launches import Launch, Resources, Row
from otfuse._backends.triton.configurations import SHARED_MEMORY

PACKAGE = "otfuse.kernels.triton"
RESOURCES = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
INTEGERS = "rounds", "has_mass", "stopped", "done", "cu_seqlens_x", "cu_seqlens_y"  # pointers
# A module for each path: LAUNCHES by name, the ``tiles`` of one in a dtype, and the ``blocks`` it is launched with.
PATH_OF = {name: path for path in (on_chip, small, streaming, packed, cluster) for name in path.LAUNCHES}
LAUNCHES = {name: path.LAUNCHES[name] for name, path in PATH_OF.items()}
# Bytes a thread, of forward tiles that no configuration without is found for: offsets of rows beside the largest; and
# addresses, stored at the start and read back outside the iterations, which tokens of any length need (2026-12-01).
SPILLS = {
    Row("forward, cost", "float32", (128, 128), "sm_100"): 24,
    Row("forward", "bfloat16", (128, 128), "sm_90"): 24,
    Row("forward", "bfloat16", (128, 128), "sm_100"): 24,
    Row("forward", "float64", (64, 64), "sm_90"): 64,
}


def rows() -> list[Row]:
    """Every row of the table, the main launches first."""
    return [
        Row(name, dtype, tile, target)
        for name in sorted(LAUNCHES, key=lambda name: not LAUNCHES[name].everywhere)
        for dtype in DTYPES
        for tile in tiles(name, dtype)
        for target in TARGETS
        if PATH_OF[name] is not cluster or cluster.runs(dtype, tile, target)
    ]


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    return PATH_OF[name].tiles(name, dtype)


def typical_row(name: str) -> Row:
    """One of a launch, in bfloat16 where it has that."""
    dtype = "bfloat16" if tiles(name, "bfloat16") else "float32"
    if PATH_OF[name] is on_chip:
        return Row(name, dtype, (32, 32) if "loss" in name else (64, 32), "sm_90")
    return Row(name, dtype, tiles(name, dtype)[0], "sm_90")


def must_not_spill(name: str) -> bool:
    """Forward kernels never, but for SPILLS."""
    return "backward" not in name and name not in ("similarity", "loss")


def configured(row: Row) -> dict[str, int]:
    """What it is launched with."""
    return PATH_OF[row.launch].blocks(*row)


def compile_row(row: Row, configuration: dict[str, int] | None = None) -> Resources:
    """Of this row, as the committed table configures it or otherwise."""
    compiled = compile_launch(LAUNCHES[row.launch], row.dtype, configuration or configured(row), row.target)
    read: Callable[..., tuple[int, int]] = _of_cubin if "cubin" in compiled.asm else _of_amdgcn
    return Resources(*read(compiled.asm), compiled.metadata.shared)


def compile_launch(launch: Launch, dtype: str, configuration: dict[str, int], target: str) -> Any:
    """Triton's compiled kernel, with the texts of all its stages."""
    options, constants = launched_with(launch, configuration)
    return triton.compile(source(launch, dtype, constants), target=TARGETS[target], options=options)


def launched_with(launch: Launch, configuration: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Triton's own, and the kernel's constants."""
    own = ("num_warps", "num_stages", "num_ctas")
    options = {name: configuration[name] for name in own if name in configuration} | {"enable_fp_fusion": True}
    return options, launch.constants | {name: size for name, size in configuration.items() if name not in own}


def configuration_of(row: Row) -> tuple[int, int, int]:
    """Of ``configured``, what is chosen."""
    blocks = configured(row)
    return blocks.get("BLOCK_D", 0), blocks["num_warps"], blocks["num_stages"]


def source(launch: Launch, dtype: str, constants: dict[str, Any], package: str = PACKAGE) -> ASTSource:
    """The kernel with the types that its launcher passes; pointers are aligned, and so are rows of tokens."""
    module = importlib.import_module(f"{package}.{launch.module}")
    kernel = getattr(module, launch.kernel)
    tokens, solve = "*" + DTYPES[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = dict.fromkeys(launch.tokens.split(), tokens) | dict.fromkeys(launch.solution.split(), solve)
    types |= {name + "_ptr": "*i32" for name in INTEGERS} | dict.fromkeys(launch.integers.split(), "*i32")
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
    rows: Sequence[Row], configurations: Sequence[dict[str, int] | None] | None = None, processes: int = 2
) -> Iterator[Resources | str]:
    """The resources of each row, or why it does not compile."""
    with compiling(processes) as pool:
        yield from pool.map(try_row, rows, configurations or [None] * len(rows))


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
    available = SHARED_MEMORY[row.target]
    if found.shared > available:
        wrong.append(f"{row}: {found.shared} bytes of shared memory, of {available}")
    if found.spills > SPILLS.get(row, 0) and must_not_spill(row.launch):
        wrong.append(f"{row}: {found.spills} bytes spilled, in a forward kernel")
    return wrong


def _steps(blocks: dict[str, int]) -> list[int]:
    """BLOCK_D, or of small costs the elements; warps and stages."""
    return [blocks.get("BLOCK_D", blocks.get("ITEMS", 0)), blocks["num_warps"], blocks["num_stages"]]


def write_table(found: dict[Row, Resources]) -> None:
    """One line a tile, its targets side by side."""
    table: dict[str, Any] = {}
    for row in [row for row in rows() if row in found]:
        tile = f"{row.tile[0]}x{row.tile[1]}"
        sides = table.setdefault(row.launch, {}).setdefault(row.dtype, {})
        sides.setdefault(tile, {})[row.target] = [*found[row], *_steps(configured(row))]
    launches = []
    for launch, dtypes in table.items():
        blocks = []
        for dtype, sides in dtypes.items():
            lines = [f"        {json.dumps(tile)}: {json.dumps(targets)}" for tile, targets in sides.items()]
            blocks.append(f"      {json.dumps(dtype)}: {{\n" + ",\n".join(lines) + "\n      }")
        launches.append(f"    {json.dumps(launch)}: {{\n" + ",\n".join(blocks) + "\n    }")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESOURCES.parent
    )
    head = {
        "note": "Registers and bytes spilled a thread, bytes of shared memory; and BLOCK_D or elements, warps, stages.",
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    RESOURCES.write_text("{\n" + ",\n".join([*lines, '  "rows": {\n' + ",\n".join(launches) + "\n  }"]) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side")
    every, found, wrong = rows(), {}, []
    for row, resources in zip(every, compile_rows(every, processes=parser.parse_args().processes)):
        wrong += problems(row, resources)
        if not isinstance(resources, str):
            found[row] = resources
    write_table(found)
    print(*wrong, f"{len(every)} rows, {len(wrong)} problems", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
