"""``sinkhorn_attend_varlen`` on LAVCap's lengths and others, beside the same padded, and as many full items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, lavcap
from packed import MIXES, Answers, Packed, dense, filled, inputs_of, ours, padded
from race import Entered, begin, enter, rows, take_turns
from timing import Contender

MAIN = replace(lavcap(256), name="varlen")
WITH_LONG = {"one long": Case("varlen", 257, 1024, 512, 768), "thousandfold": Case("varlen", 128, 1024, 512, 64)}
GRADS = (None, "unroll", "implicit", "detach")
RUNS = [("lavcap", grad) for grad in GRADS] + [(mix, None) for mix in MIXES if mix != "lavcap"]
RUNS += [("thousandfold", "unroll")]


@pytest.mark.parametrize("mix, grad", RUNS, ids=lambda value: value or "forward")
def test_packed(request, results, device, timed, limits, benchmark, mix, grad) -> None:
    """Right first, then in turns; ``per_token_of_dense`` is its rate of valid tokens over the padded operator's."""
    options = request.config.option
    packed = Packed(WITH_LONG.get(mix, MAIN), grad=grad, mix=mix)
    if device.type == "cpu":  # the interpreter of Triton, too, cuts bfloat16 off where a GPU rounds
        packed = replace(packed, dtype=torch.float32)
    case = str(packed)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        pytest.skip(f"torch finds no {device.type.upper()} device")
    packed = packed if timed and not options.dry_run else packed.shrunk()
    if results.spent:
        results.leave_out(case, "the time for all was spent (--minutes)")
    backend = "triton" if device.type == "cuda" or options.dry_run else "auto"
    inputs = inputs_of(packed, device)
    contender = Contender(f"otfuse {backend}", ours(packed, backend))
    clock = options.clock if timed else ""
    answers = Answers(packed, inputs)
    entered = [enter(contender, inputs, packed.traffic, answers, True, clock)]
    in_rectangle = Contender(f"otfuse {backend}, padded", padded(packed, backend))
    entered.append(enter(in_rectangle, inputs, packed.traffic, answers, True, clock))
    if not timed:
        benchmark.pedantic(contender.call, args=inputs, rounds=1)
        return
    if mix not in WITH_LONG:  # as many full items are a hundred times as many entries
        full = Contender(
            f"otfuse {backend}, dense", dense(packed, backend), answers=False,
            prepare=lambda *one: filled(packed, *one),
        )  # fmt: skip
        entered.append(Entered(full, begin(full, inputs, packed.traffic, clock), float("nan"), {}))
    take_turns(benchmark, [one.turn for one in entered], options.seconds, options.dry_run)
    limits.again()
    found: list[dict[str, Any]] = rows(case, packed, entered, packed.case.T)
    if mix not in WITH_LONG:
        found[0]["per_token_of_dense"] = packed.valid * found[2]["median_ms"] / found[0]["median_ms"]
    results.add([one | {"suite": "varlen"} for one in found], limits)


def test_traffic_is_of_valid_tokens_alone() -> None:
    """Against the padded operator's: less by the padding, and offsets besides."""
    packed = Packed(MAIN)
    assert len(packed.lengths) == 256 and packed.lengths[1] == (64, 20) and packed.lengths[0] == (4, 1)
    assert packed.tokens == sum(n + m for n, m in packed.lengths) and 0.9 < packed.valid < 0.92
    assert packed.traffic == 2 * packed.tokens * 768 * 2 + 8 * 257
    assert packed.traffic < 0.95 * MAIN.attend_traffic(2)
    backward = replace(packed, grad="unroll")
    assert backward.traffic == 5 * packed.tokens * 768 * 2 + 8 * 257 + 2 * 4 * 50 * packed.tokens
    everything = Packed(replace(MAIN, B=1)).flops(50) + Packed(replace(MAIN, B=4)).flops(50)
    assert everything > 3 * replace(MAIN, B=1).attend_flops()


def test_mixes_of_lengths() -> None:
    """What their names say: a share of valid tokens each, and every length as often, or one longer by sixteen times."""
    valid = {mix: Packed(MAIN, mix=mix).valid for mix in MIXES[:3]}
    assert valid["full"] == 1 and 0.9 < valid["lavcap"] < 0.92 and 0.48 < valid["uniform"] < 0.51
    counts = [n for n, _ in Packed(MAIN, mix="uniform").lengths]
    assert {counts.count(length) for length in range(1, 65)} == {4}
    first, *others = Packed(WITH_LONG["one long"], mix="one long").lengths
    assert first == (1024, 512) and others == Packed(MAIN).lengths
    first, *others = Packed(WITH_LONG["thousandfold"], mix="thousandfold").lengths
    assert first == (1024, 512) and others.count((1, 1)) > 60 and max(others) <= (16, 7)
