"""The sizes, named after their use, and what each must move and compute.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features, T rounds.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        rounds = "" if self.T == 50 else f"-{self.T}rounds"
        return f"{self.name}-{self.B}x{self.N}x{self.M}{tokens}{epsilon}{rounds}"

    def solve_traffic(self, itemsize: int = 4, grad: str | None = None) -> int:
        """Bytes: read the cost, write the plan, potentials, error and rounds, of which a small item has a third as much
        as of the plan; a backward reads plan and gradient and writes a gradient."""
        matrix = self.B * self.N * self.M * itemsize
        rest = self.B * (max(itemsize, 4) * (self.N + self.M + 1) + 4)
        return 2 * matrix + rest if grad is None else 5 * matrix + rest + self._history(grad)

    def solve_flops(self, grad: str | None = None, rounds: float | None = None) -> int:
        """Two multiply-adds an entry and round; ``unroll`` goes back through them with twice as many."""
        once = 4 * (self.T if rounds is None else rounds) * self.B * self.N * self.M
        return round(3 * once if grad == "unroll" else once)

    def attend_traffic(self, itemsize: int, grad: str | None = None) -> int:
        """Bytes: read the tokens, write them; a backward reads tokens and gradients and writes gradients.

        Potentials and the like, below one per cent at these sizes, are left out.
        """
        tokens = self.B * (self.N + self.M) * self.D * itemsize
        return 2 * tokens if grad is None else 5 * tokens + self._history(grad)

    def attend_flops(self, grad: str | None = None, rounds: float | None = None) -> int:
        """Similarity, rounds and two attends; a backward makes seven products more, and ``unroll`` its rounds.

        Norms are left out, and the conjugate gradients of ``implicit``, whose number depends on the data.
        """
        product = 2 * self.B * self.N * self.M * self.D
        # The similarity again, the plan's gradient from either output, and for each side two that go to the tokens.
        return (3 if grad is None else 10) * product + self.solve_flops(grad, rounds)

    def _history(self, grad: str) -> int:
        """Bytes of the scalings of all rounds in float32, which ``unroll`` writes and reads."""
        return 2 * 4 * self.B * self.T * (self.N + self.M) if grad == "unroll" else 0


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
# The sides and rounds of hyper-connections, which other kernels are made for; 4 x 4 has a limit (gpu_summary.py).
HYPER_CONNECTIONS = tuple(
    many_small(B, side, T=20) for B, side in ((1_048_576, 4), (1_048_576, 2), (65_536, 8), (65_536, 16))
)

# In the order of importance: a run that is cut short has the first ones.
CUDA_CASES = (
    lavcap(64),
    lavcap(1024),
    lavcap(4),
    lavcap(32),
    lavcap(256),
    *PATCHES,
    Case("square", 64, 64, 64, 768),
    Case("square", 64, 128, 128, 768),
    LONG_VIDEO,
    MATCHING,
    SQUARE,
)

TINY = Case("tiny", 2, 9, 5, 24, T=3)  # for Triton's interpreter, where there is no GPU
