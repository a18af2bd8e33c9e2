"""Rows of the ahead-of-time table: many small costs (``otfuse.backends.triton_small``)."""

from __future__ import annotations

import torch
from variant import SOLUTION, WEIGHTS, Family, Variant

from otfuse.backends.triton_small import small_blocks

_FORWARD = ("small", "_small_fwd_kernel")
_BACKWARD = ("small_backward", "_small_bwd_kernel")
VARIANTS = {
    "small": Variant(*_FORWARD, "small", "cost_ptr plan_ptr", SOLUTION, {"STOPS": False, "HISTORY": 2}),
    "small, everything": Variant(
        *_FORWARD, "small, everything", WEIGHTS + "cost_ptr plan_ptr", SOLUTION, {"STOPS": True, "HISTORY": 1}, False
    ),
    "small, backward": Variant(
        *_BACKWARD, "small, backward", "cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr",
        {"STOPS": False, "MODE": 1},
    ),
    "small, backward, everything": Variant(
        *_BACKWARD, "small, backward, everything",
        WEIGHTS + "grad_a_ptr grad_b_ptr cost_ptr grad_plan_ptr grad_cost_ptr", "history_ptr grad_f_ptr grad_g_ptr",
        {"STOPS": True, "MODE": 1}, False,
    ),
}  # fmt: skip

# A tile of every class, and others of the same size that lie the other way or are thin: their blocks of tokens are the
# largest that are launched.
TILES = {512: (16, 16), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}
_OTHERS = [(256, 32), (32, 256), (64, 128)]
OTHERS = {"float64": [(32, 64)], "float32": _OTHERS, "bfloat16": _OTHERS, "float16": _OTHERS}
OF_A_COST = [(256, 64), (64, 256)]  # as tokens these do not fit
SQUARES = TILES | {1024: (32, 32)}  # of the kernels that cut what is larger

# Of the kernels for many small costs: a square of every class; in float32 the forward of the other pairs of sides too.
SMALL_SIDES = (2, 4, 8, 16)
SMALL_SQUARES = [(side, side) for side in SMALL_SIDES]
SMALL_OTHERS = [(N, M) for N in SMALL_SIDES for M in SMALL_SIDES if N != M]

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
    if variant.configured in HELD:
        if not variant.everywhere:
            return SMALL_SQUARES if dtype in ("float64", "float32") else []
        return SMALL_SQUARES + (SMALL_OTHERS if (variant.configured, dtype) == ("small", "float32") else [])
    sizes = CLASSES[variant.configured][dtype]
    if variant == VARIANTS["forward, cost"] and dtype in ("float64", "float32"):
        return [TILES[size] for size in sizes] + (OTHERS[dtype] + OF_A_COST if dtype == "float32" else [])
    if not variant.everywhere:
        return SAMPLED.get(dtype, [])
    if variant.configured in ("forward", "backward"):
        return [TILES[size] for size in sizes] + OTHERS[dtype]
    return [SQUARES[size] for size in sizes]


def must_not_spill(row: Row) -> bool:
    """Forward kernels never; what a backward kernel spills is pinned by the table."""
    return VARIANTS[row.variant].configured in ("forward", "small", "small, everything")


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
    if row.variant in HELD:
        blocks = small_blocks(row.variant, *row.tile, getattr(torch, row.dtype))
        return blocks | {"EXACT": blocks["EXACT"] and VARIANTS[row.variant].everywhere}
    # A cost is widened as it is read: its kernels are configured as those of the dtype that they solve in.
    dtype = "float32" if row.variant.endswith("cost") and row.dtype != "float64" else row.dtype
    return block_sizes(VARIANTS[row.variant].configured, dtype, *row.tile, row.target)


def _source(variant: Variant, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types that its launcher passes; pointers are aligned, and so are rows of tokens."""
    module = __import__(f"otfuse.kernels.triton.{variant.module}", fromlist=[variant.kernel])
    kernel = getattr(module, variant.kernel)
    tokens, solve = "*" + DTYPES[dtype], "*fp64" if dtype == "float64" else "*fp32"
    types = dict.fromkeys(variant.tokens.split(), tokens) | dict.fromkeys(variant.solution.split(), solve)
    types |= {"rounds_ptr": "*i32", "has_mass_ptr": "*i32", "scale": "fp64", "tol": "fp64"}
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
    tile, kernel = f"{row.tile[0]}x{row.tile[1]}", VARIANTS[row.variant].configured
    found = table["rows"].get(row.variant, {}).get(row.dtype, {}).get(tile, {}).get(row.target, [])
    return table["sources"].get(kernel) == sources_hash(kernel) and found[3:] == _steps(row)


def _steps(row: Row) -> list[int]:
    """With what it is launched: BLOCK_D, or of small costs the items; warps and stages."""
    blocks = configured(row)
    return [blocks.get("BLOCK_D", blocks.get("ITEMS", 0)), blocks["num_warps"], blocks["num_stages"]]


def sources_hash(kernel: str) -> str:
    """Of the sources that a kernel's rows are made of."""
    modules = ("rounds", "loss") if kernel.startswith("loss") else ("rounds", "attend", "attend_backward")
    if kernel in HELD:
        modules = ("rounds", "small", "small_backward") if "backward" in kernel else ("rounds", "small")
    if kernel in ("forward", "similarity"):
        modules = modules[:2]
    digest = hashlib.sha256()
    for module in modules:
        digest.update((KERNELS / f"{module}.py").read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]


def sources_hashes() -> dict[str, str]:
    return {kernel: sources_hash(kernel) for kernel in (*CLASSES, *HELD)}


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
        "note": "Registers and bytes of stack a thread, bytes of shared memory; and BLOCK_D or items, warps, stages.",
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
}  # fmt: skip

# A square of every class; in float32 the forward of the other pairs of sides too.
SIDES = (2, 4, 8, 16)
SQUARES = [(side, side) for side in SIDES]
OTHERS = [(N, M) for N in SIDES for M in SIDES if N != M]


def tiles(name: str, dtype: str) -> list[tuple[int, int]]:
    if not VARIANTS[name].everywhere:
        return SQUARES if dtype in ("float64", "float32") else []
    return SQUARES + (OTHERS if (name, dtype) == ("small", "float32") else [])


def blocks(name: str, dtype: str, tile: tuple[int, int], target: str) -> dict[str, int]:
    found = small_blocks(name, *tile, getattr(torch, dtype))
    return found | {"EXACT": found["EXACT"] and VARIANTS[name].everywhere}


def sources(name: str) -> tuple[str, ...]:
    return ("rounds", "small", "small_backward") if "backward" in name else ("rounds", "small")


FAMILY = Family(VARIANTS, tiles, blocks, lambda name: "backward" not in name, sources)
