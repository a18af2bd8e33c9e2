"""``sinkhorn_attend_varlen`` on lengths as LAVCap has them, beside the padded operator on as many full items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import lavcap
from packed import Answers, Packed, dense, filled, inputs_of, ours
from race import Entered, begin, enter, rows, take_turns
from timing import Contender

MAIN = replace(lavcap(256), name="varlen")
GRADS = (None, "unroll", "implicit", "detach")


@pytest.mark.parametrize("grad", GRADS, ids=lambda grad: grad or "forward")
def test_packed(request, results, device, timed, limits, benchmark, grad) -> None:
    """Right first, then in turns; ``per_token_of_dense`` is its rate of valid tokens over the padded operator's."""
    options = request.config.option
    packed = Packed(MAIN, grad=grad)
    case = str(packed)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        pytest.skip(f"torch finds no {device.type.upper()} device")
    if options.dry_run:  # Triton's interpreter cuts bfloat16 off where a GPU rounds: errors are twice as large
        packed = replace(packed, dtype=torch.float32)
    packed = packed if timed and not options.dry_run else packed.shrunk()
    if results.spent:
        results.leave_out(case, "the time for all was spent (--minutes)")
    if timed and device.type == "cpu" and not options.dry_run:
        results.leave_out(case, "on a CPU packed tokens are padded: there is nothing to compare")
    backend = "triton" if device.type == "cuda" or options.dry_run else "auto"
    inputs = inputs_of(packed, device)
    contender = Contender(f"otfuse {backend}", ours(packed, backend))
    clock = options.clock if timed else ""
    entered = [enter(contender, inputs, packed.traffic, Answers(packed, inputs), True, clock)]
    if not timed:
        benchmark.pedantic(contender.call, args=inputs, rounds=1)
        return
    full = Contender(
        f"otfuse {backend}, dense", dense(packed, backend), answers=False, prepare=lambda *one: filled(packed, *one)
    )
    entered.append(Entered(full, begin(full, inputs, packed.traffic, clock), float("nan"), {}))
    take_turns(benchmark, [one.turn for one in entered], options.seconds, options.dry_run)
    limits.again()
    found: list[dict[str, Any]] = rows(case, packed, entered, packed.case.T)
    found[0]["per_token_of_dense"] = packed.valid * found[1]["median_ms"] / found[0]["median_ms"]
    results.add([one | {"suite": "varlen"} for one in found], limits)


def test_traffic_is_of_valid_tokens_alone() -> None:
    """Against the padded operator's: less by the padding, and offsets besides."""
    packed = Packed(MAIN)
    assert len(packed.lengths) == 256 and packed.lengths[1] == (64, 20) and packed.lengths[0] == (4, 1)
    assert packed.tokens == sum(n + m for n, m in packed.lengths) and 0.9 < packed.valid < 0.95
    assert packed.traffic == 2 * packed.tokens * 768 * 2 + 8 * 257
    assert packed.traffic < 0.95 * MAIN.attend_traffic(2)
    backward = replace(packed, grad="unroll")
    assert backward.traffic == 5 * packed.tokens * 768 * 2 + 8 * 257 + 2 * 4 * 50 * packed.tokens
    everything = Packed(replace(MAIN, B=1)).flops(50) + Packed(replace(MAIN, B=5)).flops(50)
    assert everything > 4 * replace(MAIN, B=1).attend_flops()
