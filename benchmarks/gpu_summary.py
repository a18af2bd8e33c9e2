"""A line for each case timed on a GPU, and the limits set for it: what run_gpu.sh prints at the end."""

from __future__ import annotations

from rows import Result, Row, cases, where

OURS, FORWARD_ALONE, LIGER = "otfuse triton", "otfuse triton, forward alone", "Liger-Kernel mHC"
SHORT = {
    "log domain, eager": "log domain",
    "specification, float32": "specification",
    "log domain, torch.compile": "compiled",
    "otfuse torch": "torch",
    "cross-attention (sdpa), no transport": "sdpa",
    "otfuse triton, all rounds": "all rounds",
    FORWARD_ALONE: "forward",
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
    """What was set for an H200, graph replay, clustered tokens: in bfloat16 and 50 rounds, small costs as below."""

    def found(key: str, contender: str, B: int, grad: str | None = None) -> float | None:
        wanted = {"suite": "attend", "size": "lavcap", "B": B, "dtype": "bfloat16", "grad": grad, "tol": None}
        return next((row[key] for row in where(rows, **wanted, tokens="clustered", contender=contender)), None)

    forward_share = found("times_ours", FORWARD_ALONE, 64, "unroll")
    time = found("median_ms", OURS, 64)
    checks = (
        ("B=64 forward, us", "<=", 15, None if time is None else 1e3 * time),
        ("B=64 forward, log domain eager over ours", ">=", 60, found("times_ours", "log domain, eager", 64)),
        ("B=64 forward, log domain compiled over ours", ">=", 5, found("times_ours", "log domain, torch.compile", 64)),
        ("B=64 unroll, with backward over forward", "<=", 3.5, None if forward_share is None else 1 / forward_share),
        ("B=1024 forward, share of copy bandwidth", ">=", 0.6, found("share_of_copy", OURS, 1024)),
    )
    named = (*(("lavcap " + what, *check) for what, *check in checks), *_limits_of_small(rows))
    return [_limit(*check) for check in named if check[3] is not None]


def _limits_of_small(rows: list[Row]) -> list[tuple[str, str, float, float | None]]:
    facts = {"suite": "solve", "size": "many_small", "B": 2**20, "N": 4, "M": 4, "rounds": 20, "grad": None}

    def found(key: str, contender: str) -> float | None:
        return next((row[key] for row in where(rows, **facts, dtype="float32", contender=contender)), None)

    name = "many_small 4x4 B=2^20, 20 rounds"
    return [
        (f"{name}, share of copy bandwidth", ">=", 0.8, found("share_of_copy", OURS)),
        (f"{name}, Liger-Kernel over ours", ">=", 1, found("times_ours", LIGER)),
    ]


def _limit(what: str, relation: str, bound: float, value: float) -> str:
    met = value <= bound if relation == "<=" else value >= bound
    return f"{'met   ' if met else 'MISSED'} {what}: {value:.3g} (H200: {relation} {bound:g})"
