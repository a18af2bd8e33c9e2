"""``sinkhorn_attend`` on a GPU beside other ways to the same tokens; without one, a tiny case in Triton's interpreter.

Every contender is checked against the specification in float64 before it is timed. Tokens are clustered: random ones
converge in a few rounds and flatter everybody.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CUDA_CASES, TINY
from measured import Measured, answer, mean_rounds, ours, tokens
from peers import Compiler, attends, log_domain_attend, loops, with_gradient
from timing import Contender

from otfuse.backends.triton import INTERPRETED

pytest.importorskip("triton", reason="the triton backend needs Triton: pip install 'otfuse[cuda]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and the compiler warn of is not ours

BF16, F32 = torch.bfloat16, torch.float32
GRADS = ("unroll", "implicit", "detach")
Field = tuple[list[Contender], dict[str, str]]  # who takes part, and why others do not


def measurements() -> list[Measured]:
    """In the order of importance: a run that is cut short has the first ones."""
    main, large = CUDA_CASES[:2]
    first = [Measured(main, BF16), Measured(main, BF16, "unroll"), Measured(large, BF16)]
    rest = [Measured(case, BF16) for case in CUDA_CASES] + [Measured(case, BF16, "unroll") for case in CUDA_CASES]
    rest += [Measured(case, BF16, tol=1e-3) for case in (main, large)]
    rest += [Measured(case, F32) for case in CUDA_CASES] + [Measured(main, F32, grad) for grad in GRADS]
    rest += [Measured(case, BF16, grad) for case in CUDA_CASES for grad in GRADS[1:]]
    return list(dict.fromkeys(first + rest))


TINY_MEASUREMENTS = [
    Measured(TINY, BF16), Measured(TINY, F32), Measured(TINY, F32, tol=1e-3), *(Measured(TINY, F32, g) for g in GRADS)
]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" in metafunc.fixturenames:
        on_cpu = metafunc.config.getoption("--device") == "cpu"
        metafunc.parametrize("measured", TINY_MEASUREMENTS if on_cpu else measurements(), ids=str)


def test_attend(measured: Measured, device: torch.device, race: Callable[..., None], compiler: Compiler) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("on a CPU the kernels run in Triton's interpreter alone: TRITON_INTERPRET=1")
    inputs = tokens(measured, device)
    right = answer(measured, inputs)
    contenders, absent = field(measured, compiler)
    race(
        f"attend {measured}",
        contenders,
        inputs,
        right.error,
        right.allowed,
        measured.traffic,
        measured.case.attend_flops(measured.grad, rounds := mean_rounds(measured, inputs)),
        absent,
        **measured.facts,
        rounds=rounds,
    )


def field(measured: Measured, compiler: Compiler) -> Field:
    """All peers where transport is what everybody else would do too, else our own backends."""
    wrap = (lambda call: call) if measured.grad is None else with_gradient
    contenders = [
        Contender("otfuse triton", wrap(ours(measured, "triton"))),
        # Its implicit gradient calls a library's linear solver, which may wait for the device.
        Contender("otfuse torch", wrap(ours(measured, "torch")), replayed=measured.grad != "implicit"),
    ]
    if measured.tol is not None:
        return [contenders[0], Contender("otfuse triton, all rounds", ours(measured, "triton", tol=None))], {}
    if measured.grad is not None:
        forward = ours(measured, "triton")
        contenders.append(Contender("otfuse triton, forward alone", lambda x, y, *_: forward(x, y), answers=False))
    if measured.grad not in (None, "unroll"):
        return contenders, {}
    peers, absent = peers_of(measured, compiler, wrap)
    return contenders + peers, absent


def peers_of(measured: Measured, compiler: Compiler, wrap: Callable[..., Callable[..., tuple]]) -> Field:
    epsilon, num_iters = measured.case.epsilon, measured.case.T
    peers, absent = attends(epsilon, num_iters, measured.grad)
    if measured.grad is None and measured.dtype == BF16:
        one_by_one, too_many = loops(measured.case.B, epsilon, num_iters)
        peers, absent = peers + one_by_one, absent | too_many
    peers = [Contender(peer.name, wrap(peer.call), peer.replayed, peer.answers) for peer in peers]
    peers.append(compiler.contender("log domain, torch.compile", log_domain_attend(epsilon, num_iters), wrap))
    return peers, absent


def test_traffic_of_the_main_case() -> None:
    """The 16.5 MB that the time limits of the project were set by, and what a backward adds."""
    main = CUDA_CASES[0]
    tokens = 64 * (64 + 20) * 768 * 2
    assert main.attend_traffic(2) == 2 * tokens == 16_515_072
    assert main.attend_traffic(2, "detach") == 5 * tokens
    assert main.attend_traffic(2, "unroll") == 5 * tokens + 2 * 64 * 50 * 84 * 4
    assert main.attend_flops() == 64 * 64 * 20 * (3 * 2 * 768 + 4 * 50)
