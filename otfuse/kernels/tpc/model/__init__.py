"""What the Gaudi kernels should cost, from what they issue. Nothing here has been measured on a Gaudi.

A core issues a bundle a cycle, of at most one operation for each of its four slots. A member of the index space then
takes no less than its fullest slot, and no less than its longest chain of results that wait for each other; the
emulator counts both. ``ordered`` is the other end: the operations as the source has them, none moved forward. A real
schedule lies between, and so the model gives two times.

Letters: B items, N rows, M columns, D features, T rounds.
"""

from __future__ import annotations

from typing import NamedTuple

SLOTS = ("load", "scalar", "vector", "store")


class Machine(NamedTuple):
    """Published figures; the clock is what they imply."""

    name: str
    cores: int
    clock_ghz: float  # of the cores: vector TFLOPS in bfloat16 / (cores * 128 lanes * 2)
    hbm_tb_per_s: float
    sram_tb_per_s: float
    sram_mb: int
    matrix_tflops: float  # bfloat16


# 11 and 28.7 TFLOPS of vectors in bfloat16.
GAUDI2 = Machine("Gaudi 2", 24, 1.79, 2.45, 6.4, 48, 432)
GAUDI3 = Machine("Gaudi 3", 64, 1.75, 3.67, 12.8, 96, 1835)
MACHINES = (GAUDI2, GAUDI3)
CLOCKS_GHZ = (1.65, 2.0)  # what the clock may be, since it is not published
LAUNCHES_US = (0.5, 2.0, 10.0)  # what a node of a graph may cost to launch; nothing is published


class Work(NamedTuple):
    """What one member of the index space issues, and its two times in cycles."""

    load: float
    scalar: float
    vector: float
    store: float
    chain: float
    ordered: float

    def plus(self, other: Work, times: float = 1) -> Work:
        return Work(*(a + times * b for a, b in zip(self, other)))

    @property
    def slots(self) -> float:
        """Cycles of the fullest slot: the issue bound."""
        return max(self.load, self.scalar, self.vector, self.store)

    @property
    def bound(self) -> float:
        """Cycles that no schedule can beat."""
        return max(self.slots, self.chain)

    @property
    def issue_share(self) -> float:
        """How much of the bound the fullest slot is: below one, a member waits for its own results."""
        return self.slots / self.bound


def per_round(fewer: Work, more: Work, rounds: int = 1) -> Work:
    """What a round issues, from counts at T and at T + ``rounds``."""
    return Work(*((b - a) / rounds for a, b in zip(fewer, more)))


def with_rounds(counted: Work, counted_rounds: int, a_round: Work, rounds: int) -> Work:
    """What a member issues at another number of rounds."""
    return counted.plus(a_round, rounds - counted_rounds)


def turns(members: int, machine: Machine) -> int:
    """How many members the busiest core runs, one after the other."""
    return -(-members // machine.cores)


def microseconds(cycles: float, members: int, machine: Machine, clock_ghz: float | None = None) -> float:
    """Of a launch, without what launching costs."""
    return turns(members, machine) * cycles / (1e3 * (clock_ghz or machine.clock_ghz))


def traffic_us(traffic_bytes: float, machine: Machine, sram: bool = False) -> float:
    """At the full bandwidth of HBM, or of the memory on the die."""
    return traffic_bytes / (1e6 * (machine.sram_tb_per_s if sram else machine.hbm_tb_per_s))


def solve_bytes(B: int, N: int, M: int, itemsize: int = 4) -> int:
    """Read values and weights, write plan, potentials and report, once each."""
    return B * (2 * N * M * itemsize + 4 * (2 * (N + M) + 3))


class Formulation(NamedTuple):
    """A solver written in ops of PyTorch: nodes of a graph, and bytes that they read and write."""

    name: str
    launches: int
    bytes: int


def formulations(B: int, N: int, M: int, T: int) -> tuple[Formulation, ...]:
    """The fewest nodes and bytes of a solver without a kernel of its own, in float32, fused as well as one may hope.

    ``bmm``: K = exp(S / epsilon) once, then per round two products with a vector on the matrix engine, and two
    divisions on the cores. ``logsumexp``: per round and side one fused node that reads S and the other potential.
    """
    matrix, vectors = 4 * B * N * M, 4 * B * (N + M)
    return (
        Formulation("ours", 1, solve_bytes(B, N, M)),
        Formulation("bmm", 1 + 4 * T + 1, 2 * matrix + T * (2 * matrix + 3 * vectors) + 2 * matrix),
        Formulation("logsumexp", 2 * T + 1, T * (2 * matrix + 2 * vectors) + 2 * matrix),
    )


def formulation_us(of: Formulation, launch_us: float, machine: Machine, work_us: float = 0.0) -> float:
    """Launches one after the other, each as fast as memory on the die allows; ``work_us`` where cores are slower."""
    return of.launches * launch_us + max(work_us, traffic_us(of.bytes, machine, sram=True))


def attend_cycles(N: int, M: int, D: int) -> float:
    """Multiply-adds of 64 lanes that the three products of an item would be on a core."""
    return 3 * N * M * D / 64


def attend_gain_us(B: int, N: int, M: int, D: int, launch_us: float, machine: Machine) -> float:
    """What fusing the products into the kernel would gain: three launches less, for work that the matrix engine does.

    The products' time on the matrix engine, their traffic, and loads on the cores are left out: they are at most of the
    order of a microsecond here, and the last two cancel in part.
    """
    return 3 * launch_us - microseconds(attend_cycles(N, M, D), B, machine)


def largest_fused_features(B: int, N: int, M: int, launch_us: float, machine: Machine) -> int:
    """The D up to which fusing would gain anything."""
    a_feature = microseconds(attend_cycles(N, M, 1), B, machine)
    return int(3 * launch_us / a_feature)
