"""The sizes, named after their use, what each must move and compute, and which of them a run takes.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features, T iterations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

LONG_ITERATIONS, LONG_TOKENS = 1e8, 4e7  # entry-iterations, numbers in all tokens
CHECK = 4e8  # entry-iterations of an element that the specification is asked for: ten seconds on a CPU
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GRADS = ("unroll", "implicit", "detach")
TOL = 1e-3


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    N: int
    M: int
    D: int  # 0: there are no tokens, only a cost
    T: int = 50
    epsilon: float = 0.1

    def __str__(self) -> str:
        tokens = f"x{self.D}" if self.D else ""
        epsilon = "" if self.epsilon == 0.1 else f"-epsilon{self.epsilon:g}"
        iterations = "" if self.T == 50 else f"-{self.T}iterations"
        return f"{self.name}-{self.B}x{self.N}x{self.M}{tokens}{epsilon}{iterations}"

    def solve_traffic(self, itemsize: int = 4, grad: str | None = None) -> int:
        """Bytes: read the cost, write the plan, potentials, error and iterations, of which a small
        element has a third as much as of the plan; a backward reads plan and gradient and writes a gradient."""
        matrix = self.B * self.N * self.M * itemsize
        rest = self.B * (max(itemsize, 4) * (self.N + self.M + 1) + 4)
        return 2 * matrix + rest if grad is None else 5 * matrix + rest + self._history(grad)

    def solve_flops(self, grad: str | None = None, iterations: float | None = None) -> int:
        """Two multiply-adds an entry and iteration; ``unroll`` goes back through them with twice as many."""
        once = 4 * (self.T if iterations is None else iterations) * self.B * self.N * self.M
        return round(3 * once if grad == "unroll" else once)

    def attend_traffic(self, itemsize: int, grad: str | None = None) -> int:
        """Bytes: read the tokens, write them; a backward reads tokens and gradients and writes gradients.

        Potentials and the like, below one per cent at these sizes, are left out.
        """
        tokens = self.B * (self.N + self.M) * self.D * itemsize
        return 2 * tokens if grad is None else 5 * tokens + self._history(grad)

    def attend_flops(self, grad: str | None = None, iterations: float | None = None) -> int:
        """Similarity, iterations and two attends; a backward makes seven products more, and ``unroll`` its iterations.

        Norms are left out, and the conjugate gradients of ``implicit``, whose number depends on the data.
        """
        product = 2 * self.B * self.N * self.M * self.D
        # The similarity again, the plan's gradient from either output, and for each side two that go to the tokens.
        return (3 if grad is None else 10) * product + self.solve_flops(grad, iterations)

    def _history(self, grad: str) -> int:
        """Bytes of the scalings of all iterations in float32, which ``unroll`` writes and reads."""
        return 2 * 4 * self.B * self.T * (self.N + self.M) if grad == "unroll" else 0


@dataclass(frozen=True)
class Workload:
    """An operation on a case in a dtype, with or without a backward."""

    case: Case
    dtype: torch.dtype = torch.float32
    grad: str | None = None  # None: the forward alone
    tol: float | None = None
    op: str = "attend"  # tokens to attended tokens; "solve": a cost to its plan
    kind: str = "clustered"  # of tokens; "random": independent, which converge in a few iterations

    def __post_init__(self) -> None:
        assert self.op == "solve" or self.case.D, f"{self.case} has no tokens to attend to"

    def __str__(self) -> str:
        stop = "" if self.tol is None else f" tol {self.tol:g}"
        kind = "" if self.kind == "clustered" else f" {self.kind} tokens"
        return f"{self.op} {self.case} {self.dtype_name} {self.grad or 'forward'}{stop}{kind}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def traffic(self) -> int:
        bytes_of = self.case.attend_traffic if self.op == "attend" else self.case.solve_traffic
        return bytes_of(self.dtype.itemsize, self.grad)

    def flops(self, iterations: float) -> int:
        return (self.case.attend_flops if self.op == "attend" else self.case.solve_flops)(self.grad, iterations)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row is found by."""
        case = self.case
        return {
            "op": self.op, "size": case.name, "B": case.B, "N": case.N, "M": case.M, "D": case.D,
            "epsilon": case.epsilon, "dtype": self.dtype_name, "grad": self.grad, "tol": self.tol, "tokens": self.kind,
        }  # fmt: skip

    def shrunk(self) -> Workload:
        """The same way through the code on a size that costs nothing, to run where nothing is timed."""
        case, at_most = self.case, {"B": 2, "N": 12, "M": 12, "D": 24, "T": 3}
        return replace(self, case=replace(case, **{k: min(v, getattr(case, k)) for k, v in at_most.items()}))

    @property
    def takes_long(self) -> bool:
        """On a CPU: seconds, for everybody together."""
        case = self.case
        return case.B * case.N * case.M * case.T > LONG_ITERATIONS or case.B * (case.N + case.M) * case.D > LONG_TOKENS

    @property
    def check_entry_iterations(self) -> int:
        """Of the smallest check, which is that of an element."""
        return self.case.N * self.case.M * self.case.T

    @property
    def checked_by_rows(self) -> bool:
        """A single plan that the specification would take minutes for is held against some of its rows."""
        whole = self.grad is None and self.tol is None and self.case.B == 1
        return self.op == "solve" and whole and self.check_entry_iterations > CHECK


def lavcap(B: int) -> Case:
    return Case("lavcap", B, 64, 20, 768)


def many_small(B: int, side: int, T: int = 50) -> Case:
    return Case("many_small", B, side, side, 0, T)


def equal_work(entries: int, side: int) -> Case:
    """A batch of square costs with so many entries in all."""
    return Case("equal_work", entries // side**2, side, side, 0, T=20)


LAVCAP = tuple(map(lavcap, (4, 32, 64, 256)))
PATCHES = tuple(Case("lavcap_patches", B, 256, 20, 768) for B in (8, 64))
LONG_VIDEO = Case("long_video", 8, 1024, 512, 768)
MATCHING = Case("matching", 4, 2048, 2048, 256)
SQUARE = Case("square", 1, 1024, 1024, 768)
LARGE = tuple(Case("large", 1, side, side, D) for side in (4096, 16384) for D in (64, 768))
MANY_SMALL = tuple(many_small(B, side) for B in (65_536, 1_048_576) for side in (4, 8))
# The sides and iterations of hyper-connections, which other kernels are made for; 4 x 4 has a goal (gpu/goals.py).
HYPER_CONNECTIONS = tuple(
    many_small(B, side, T=20) for B, side in ((1_048_576, 4), (1_048_576, 2), (65_536, 8), (65_536, 16))
)

# In the order of importance: a run that is cut short has the first ones.
CUDA_CASES = (
    *map(lavcap, (64, 1024, 4, 32, 256)), *PATCHES, Case("square", 64, 64, 64, 768), Case("square", 64, 128, 128, 768),
    LONG_VIDEO, MATCHING, SQUARE,
)  # fmt: skip
TINY = Case("tiny", 2, 9, 5, 24, T=3)  # for Triton's interpreter, where there is no GPU

DRY = {
    "attend": [
        Workload(TINY, BF16), Workload(TINY), Workload(TINY, tol=TOL), *(Workload(TINY, grad=grad) for grad in GRADS)
    ],
    "solve": [Workload(TINY, op="solve"), Workload(TINY, op="solve", grad="unroll")],
    "accuracy": [],
}  # fmt: skip
EQUAL_WORK = "N = M, equal B N M"  # a size that falls off a cliff shows as a step
# Entries of all costs together, and the largest side: that of one element on a device.
WORK = {"cpu": (2**20, 1024), "cuda": (2**26, 8192), "hpu": (2**26, 8192)}
CURVE_ITERATIONS = (5, 10, 20, 50, 100, 200, 500)
FEWER_ITERATIONS = 10  # of the large element once more: what 50 take longer is 40 iterations

# What goals are set for (gpu/goals.py), and what is run first on CUDA.
WITH_GOALS = (
    Workload(lavcap(64), BF16),
    Workload(lavcap(64), BF16, "unroll"),
    Workload(lavcap(1024), BF16),
    Workload(replace(many_small(1_048_576, 4), T=20), op="solve"),
    Workload(LONG_VIDEO, BF16),
    Workload(LARGE[0], BF16),
    Workload(replace(LARGE[0], T=FEWER_ITERATIONS), BF16),
)


def urgency(test: str, params: dict[str, Any]) -> int:
    """0 of what goals are set for, packed tokens among it; 1 of what shows a cliff; 2 of all else."""
    if test == "test_packed":
        return 0 if params["grad"] is None and params.get("mix", "lavcap") == "lavcap" else 2
    if test in ("test_attend", "test_solve") and params.get("workload") in WITH_GOALS:
        return 0
    return 1 if params.get("axis") == EQUAL_WORK else 2


def workloads(suite: str, option: Any) -> list[Workload]:
    """Of a suite, by pytest's options; where nothing is timed, one of those that shrink to the same."""
    if option.dry_run:
        found = DRY[suite]
    else:
        found = {"attend": attends, "solve": solves, "accuracy": curves}[suite](option.device, option.full)
    if option.benchmark_enable:
        return found
    return list({workload.shrunk(): workload for workload in reversed(found)}.values())[::-1]


def attends(device: str, full: bool = False) -> list[Workload]:
    found = _cpu_attends() if device == "cpu" else _device_attends()
    cases = dict.fromkeys([*LAVCAP, *PATCHES, LONG_VIDEO, SQUARE, MATCHING, *LARGE])
    return list(dict.fromkeys(found + (_everything(cases, "attend") if full else [])))


def solves(device: str, full: bool = False) -> list[Workload]:
    main = lavcap(32)
    cases = [HYPER_CONNECTIONS[0], lavcap(4), main, lavcap(64), SQUARE, *MANY_SMALL[:2]]
    cases += [] if device == "cpu" else [*HYPER_CONNECTIONS[1:], *MANY_SMALL[2:], LARGE[0], LARGE[2]]
    found = [Workload(case, op="solve") for case in cases]
    found += [Workload(case, grad=grad, op="solve") for case in (lavcap(4), main, SQUARE) for grad in GRADS[:2]]
    found += [Workload(main, kind="random", op="solve"), Workload(main, tol=TOL, op="solve")]
    found += [Workload(case, BF16, op="solve") for case in (main, MANY_SMALL[1])]
    if device != "cpu":
        found += [workload for workload in WITH_GOALS if workload.op == "solve"]
    if full:
        found += _everything(dict.fromkeys([*LAVCAP, SQUARE, *HYPER_CONNECTIONS, *MANY_SMALL, *LARGE]), "solve")
    return [found for found in dict.fromkeys(found) if found.grad != "detach"]  # a plan that is constant has none


def _cpu_attends() -> list[Workload]:
    small, main = lavcap(4), lavcap(32)
    found = [Workload(case) for case in (small, main, *LAVCAP[2:], *PATCHES, SQUARE, LONG_VIDEO, MATCHING)]
    found += [Workload(case, grad=grad) for case in (small, main) for grad in GRADS]
    found += [Workload(PATCHES[0], grad="unroll"), Workload(main, BF16), Workload(main, F16)]
    found += [Workload(main, BF16, "unroll"), Workload(main, kind="random")]
    return found + [Workload(main, tol=TOL, kind=kind) for kind in ("clustered", "random")]


def _device_attends() -> list[Workload]:
    main, large = CUDA_CASES[:2]
    found = [Workload(main, BF16), Workload(main, BF16, "unroll"), Workload(large, BF16)]
    found += [Workload(case, BF16) for case in CUDA_CASES] + [Workload(case, BF16, "unroll") for case in CUDA_CASES]
    found += [Workload(case, BF16, tol=TOL) for case in (main, large)]
    found += [Workload(main, BF16, kind="random"), Workload(main, BF16, tol=TOL, kind="random"), Workload(main, F16)]
    found += [Workload(case, F32) for case in CUDA_CASES] + [Workload(main, F32, grad) for grad in GRADS]
    found += [Workload(case, BF16) for case in LARGE] + [m for m in WITH_GOALS if m.op == "attend"]
    return found + [Workload(case, BF16, grad) for case in CUDA_CASES for grad in GRADS[1:]]


def _everything(cases: Iterable[Case], op: str) -> list[Workload]:
    """The whole table: sizes, gradients, dtypes, kinds of tokens, with and without a stop."""
    options = product((None, TOL), ("clustered", "random"), (F32, BF16, F16), (None, *GRADS), cases)
    return [Workload(case, dtype, grad, tol, op, kind) for tol, kind, dtype, grad, case in options]


def curves(device: str, full: bool) -> list[Workload]:
    """Solves of more and more iterations, for time against accuracy."""
    epsilons = (0.1, 0.05, 0.02) if full else (0.1, 0.05)
    cases = [replace(lavcap(32), T=T, epsilon=epsilon) for epsilon in epsilons for T in CURVE_ITERATIONS]
    return [Workload(case, op="solve") for case in cases]


def axes(device: str) -> list[tuple[str, int, Workload]]:
    """(what grows, how large it is, workload). What is too large for a machine is left out when it comes up."""
    dtype = F32 if device == "cpu" else BF16
    main = lavcap(32)
    points = [("B", B, Workload(lavcap(B), dtype)) for B in (1, 4, 16, 64, 256, 1024, 4096)]
    sides = [2**power for power in range(3, 15)]
    points += [("N = M", side, Workload(Case("square", 1, side, side, 64), op="solve")) for side in sides]
    entries, longest = WORK[device]
    sides = [2**power for power in range(1, longest.bit_length())]
    points += [(EQUAL_WORK, side, Workload(equal_work(entries, side), op="solve")) for side in sides]
    iterations = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    points += [("iterations", T, Workload(replace(main, T=T), dtype)) for T in iterations]
    return points + [("D", D, Workload(replace(main, D=D), dtype)) for D in (16, 64, 256, 768, 1536, 3072)]
