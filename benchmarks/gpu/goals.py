"""A line for each case timed on a GPU, and the goals set for it: what run.sh prints at the end."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import FEWER_ITERATIONS
from benchmarks.results import Result, Row, by_case, where

OURS, FORWARD_ALONE = "otfuse triton", "otfuse triton, forward alone"
PRODUCTS, FLASH, LIGER = "three matrix products alone", "flash-sinkhorn", "Liger-Kernel mHC"
SHORT = {
    "log domain, eager": "log domain", "log domain, torch.compile": "compiled", "otfuse torch": "torch",
    "cross-attention (sdpa), no transport": "sdpa", "otfuse triton, all iterations": "all iterations",
    FORWARD_ALONE: "forward", PRODUCTS: "products",
}  # fmt: skip


def summary(result: Result) -> str:
    """A line for each case in bfloat16, forward or unrolled; the goals; who was absent. The rest is in the tables."""
    rows = [row for row in result.suite("attend") if row["dtype"] == "bfloat16" and row["grad"] in (None, "unroll")]
    absent = sorted(f"absent: {name}: {why}" for name, reasons in result.absent.items() for why in reasons)
    copies = [f"copy within the device: {row['copy_gb_per_s']:.0f} GB/s" for row in rows if row.get("copy_gb_per_s")]
    return "\n".join([*map(_case_line, by_case(rows).values()), *goals(result.rows), *absent[:6], *copies[:1]])


def _case_line(rows: list[Row]) -> str:
    ours, *others = rows
    share = f" {ours['share_of_copy']:4.0%} of copy" if ours.get("share_of_copy") else ""
    rest = (f"{SHORT.get(row['contender'], row['contender'].split(' ')[0])} x{row['times_ours']:.3g}" for row in others)
    return f"{ours['case'].removeprefix('attend '):52} {ours['median_ms'] * 1e3:9.2f} us{share} | {', '.join(rest)}"


def goals(rows: list[Row]) -> list[str]:
    """What was set for an H200, graph replay and clustered tokens, 50 iterations where nothing else is said."""
    rows = [row for row in rows if row.get("lengths", "lavcap") == "lavcap"]  # other packed tokens have no goal

    def value(key: str, size: str, contender: str = OURS, **more: Any) -> float:
        """NaN where there is no such row."""
        facts = {"suite": "attend", "dtype": "bfloat16", "grad": None, "tol": None, "tokens": "clustered"} | more
        found = (row.get(key) for row in where(rows, **facts, size=size, contender=contender))
        return next((value for value in found if value is not None), float("nan"))

    main, large, small = {"B": 64}, {"N": 4096, "D": 64}, {"suite": "solve", "dtype": "float32", "B": 2**20, "N": 4}
    small |= {"iterations": 20}
    errors = [value("error", "large", name, iterations=50, **large) for name in (OURS, FLASH)]
    beside = (
        f" (errors {errors[1]:.1e} and {errors[0]:.1e})" if errors[0] == errors[0] and errors[1] == errors[1] else ""
    )
    of_flash, of_ours = (
        value("median_ms", "large", name, iterations=50, **large)
        - value("median_ms", "large", name, iterations=FEWER_ITERATIONS, **large)
        for name in (FLASH, OURS)
    )
    lines = (
        ("lavcap B=64 forward, us", "<=", 15, 1e3 * value("median_ms", "lavcap", **main)),
        ("lavcap B=64 forward, log domain eager over ours", ">=", 60,
         value("times_ours", "lavcap", "log domain, eager", **main)),
        ("lavcap B=64 forward, log domain compiled over ours", ">=", 5,
         value("times_ours", "lavcap", "log domain, torch.compile", **main)),
        ("lavcap B=64 unroll, with backward over forward", "<=", 3.5,
         1 / value("times_ours", "lavcap", FORWARD_ALONE, **main | {"grad": "unroll"})),
        ("lavcap B=1024 forward, share of copy bandwidth", ">=", 0.6, value("share_of_copy", "lavcap", B=1024)),
        ("many_small 4x4 B=2^20, 20 iterations, share of copy bandwidth", ">=", 0.8,
         value("share_of_copy", "many_small", **small)),
        ("many_small 4x4 B=2^20, 20 iterations, Liger over ours", ">=", 1,
         value("times_ours", "many_small", LIGER, **small)),
        ("long_video B=8 forward, over its three matrix products", "<=", 1.5,
         1 / value("times_ours", "long_video", PRODUCTS, B=8)),
        (f"large 1x4096^2 D=64, an iteration of flash-sinkhorn over ours{beside}", ">=", 1, of_flash / of_ours),
        ("varlen B=256 forward, rate of a valid token over the padded operator's", ">=", 0.9,
         value("per_token_of_dense", "varlen", suite="varlen", B=256)),
    )  # fmt: skip
    return [_line(*line) for line in lines]


def _line(what: str, relation: str, bound: float, value: float) -> str:
    """One of its own where nothing was measured: a goal that is left out is not met."""
    if value != value:
        return f"not measured: {what} (H200: {relation} {bound:g})"
    met = value <= bound if relation == "<=" else value >= bound
    return f"{'met   ' if met else 'MISSED'} {what}: {value:.3g} (H200: {relation} {bound:g})"
