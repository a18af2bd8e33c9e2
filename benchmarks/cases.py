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
    D: int
    T: int = 50
    epsilon: float = 0.1

    def __str__(self) -> str:
        return f"{self.name}-{self.B}x{self.N}x{self.M}x{self.D}"

    def solve_traffic(self, itemsize: int = 4) -> int:
        """Bytes: read the cost, write the plan, once each."""
        return 2 * self.B * self.N * self.M * itemsize

    def solve_flops(self) -> int:
        """Two multiply-adds an entry and round."""
        return 4 * self.T * self.B * self.N * self.M


CPU_CASES = (
    Case("lavcap", 4, 64, 20, 768),
    Case("lavcap", 32, 64, 20, 768),
    Case("square", 1, 1024, 1024, 768),
)
