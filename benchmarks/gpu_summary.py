"""A line for each case timed on a GPU, and the limits set for it: what run_gpu.sh prints at the end."""

from __future__ import annotations

from typing import Any

from rows import Result, Row, cases, where

OURS, FORWARD_ALONE = "otfuse triton", "otfuse triton, forward alone"
PRODUCTS, FLASH, LIGER = "three matrix products alone", "flash-sinkhorn", "Liger-Kernel mHC"
FEWER_ROUNDS = 10  # of the large item once more: what 50 take longer is 40 rounds
SHORT = {
    "log domain, eager": "log domain",
    "specification, float32": "specification",
    "log domain, torch.compile": "compiled",
    "otfuse torch": "torch",
    "cross-attention (sdpa), no transport": "sdpa",
    "otfuse triton, all rounds": "all rounds",
    FORWARD_ALONE: "forward",
    PRODUCTS: "products",
}


def summary(result: Result) -> str:
    """A line for each case in bfloat16, forward or unrolled; the limits; who was absent. The rest is in the tables."""
    rows = [row for row in result.suite("attend") if row["dtype"] == "bfloat16" and row["grad"] in (None, "unroll")]
    absent = sorted(f"absent: {name}: {why}" for name, reasons in result.absent.items() for why in reasons)
    copies = [row["copy_gb_per_s"] for row in rows if row.get("copy_gb_per_s")]
    lines = [_case_line(group) for group in cases(rows).values()] + limits(result.rows) + absent[:6]
    return "\n".join(lines + [f"copy within the device: {copy:.0f} GB/s" for copy in copies[:1]])


def _case_line(rows: list[Row]) -> str:
    ours, *others = rows
    share = f" {ours['share_of_copy']:4.0%} of copy" if ours.get("share_of_copy") else ""
    rest = (f"{SHORT.get(row['contender'], row['contender'].split(' ')[0])} x{row['times_ours']:.3g}" for row in others)
    return f"{ours['case'].removeprefix('attend '):52} {ours['median_ms'] * 1e3:9.2f} us{share} | {', '.join(rest)}"


def limits(rows: list[Row]) -> list[str]:
    """What was set for an H200, graph replay and clustered tokens, 50 rounds where nothing else is said."""

    rows = [row for row in rows if row.get("lengths", "lavcap") == "lavcap"]  # other packed tokens have no limit

    def found(key: str, size: str, contender: str = OURS, **more: Any) -> float | None:
        wanted = {"suite": "attend", "size": size, "dtype": "bfloat16", "grad": None, "tol": None} | more
        return next((row.get(key) for row in where(rows, **wanted, tokens="clustered", contender=contender)), None)

    main, large, small = {"B": 64}, {"N": 4096, "D": 64}, {"suite": "solve", "dtype": "float32", "B": 2**20, "N": 4}
    small |= {"rounds": 20}
    time = found("median_ms", "lavcap", **main)
    unrolled = found("times_ours", "lavcap", FORWARD_ALONE, **main | {"grad": "unroll"})
    products = found("times_ours", "long_video", PRODUCTS, B=8)
    errors = [found("error", "large", name, rounds=50, **large) for name in (OURS, FLASH)]
    round_of = [
        difference(*(found("median_ms", "large", name, rounds=rounds, **large) for rounds in (50, FEWER_ROUNDS)))
        for name in (FLASH, OURS)
    ]
    checks = (
        ("lavcap B=64 forward, us", "<=", 15, None if time is None else 1e3 * time),
        ("lavcap B=64 forward, log domain eager over ours", ">=", 60,
         found("times_ours", "lavcap", "log domain, eager", **main)),
        ("lavcap B=64 forward, log domain compiled over ours", ">=", 5,
         found("times_ours", "lavcap", "log domain, torch.compile", **main)),
        ("lavcap B=64 unroll, with backward over forward", "<=", 3.5, ratio(1, unrolled)),
        ("lavcap B=1024 forward, share of copy bandwidth", ">=", 0.6, found("share_of_copy", "lavcap", B=1024)),
        ("many_small 4x4 B=2^20, 20 rounds, share of copy bandwidth", ">=", 0.8,
         found("share_of_copy", "many_small", **small)),
        ("many_small 4x4 B=2^20, 20 rounds, Liger over ours", ">=", 1,
         found("times_ours", "many_small", LIGER, **small)),
        ("long_video B=8 forward, over its three matrix products", "<=", 1.5, ratio(1, products)),
        (f"large 1x4096^2 D=64, a round of flash-sinkhorn over ours{_beside(errors)}", ">=", 1, ratio(*round_of)),
        ("varlen B=256 forward, rate of a valid token over the padded operator's", ">=", 0.9,
         found("per_token_of_dense", "varlen", suite="varlen", B=256)),
    )  # fmt: skip
    return [_limit(*check) for check in checks]


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _beside(errors: list[float | None]) -> str:
    known = [f"{error:.1e}" for error in errors if error is not None]
    return f" (errors {known[1]} and {known[0]})" if len(known) == 2 else ""


def _limit(what: str, relation: str, bound: float, value: float | None) -> str:
    """A line of its own where nothing was measured: a limit that is left out is not met."""
    set_for = f"(H200: {relation} {bound:g})"
    if value is None:
        return f"not measured: {what} {set_for}"
    met = value <= bound if relation == "<=" else value >= bound
    return f"{'met   ' if met else 'MISSED'} {what}: {value:.3g} {set_for}"
