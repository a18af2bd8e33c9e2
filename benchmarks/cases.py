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

    def solve_flops(self, rounds: float | None = None) -> int:
        """Two multiply-adds an entry and round."""
        return round(4 * (self.T if rounds is None else rounds) * self.B * self.N * self.M)

    def attend_traffic(self, itemsize: int, grad: str | None = None) -> int:
        """Bytes: read the tokens, write them; a backward reads tokens and gradients and writes gradients.

        ``unroll`` also writes and reads the scalings of all rounds, in float32. Potentials and the like, below one
        per cent at these sizes, are left out.
        """
        tokens = self.B * (self.N + self.M) * self.D * itemsize
        if grad is None:
            return 2 * tokens
        history = 2 * 4 * self.B * self.T * (self.N + self.M) if grad == "unroll" else 0
        return 5 * tokens + history

    def attend_flops(self, grad: str | None = None, rounds: float | None = None) -> int:
        """Similarity, rounds and two attends; a backward makes seven products more, and ``unroll`` its rounds.

        Norms are left out, and the conjugate gradients of ``implicit``, whose number depends on the data.
        """
        product, solve = 2 * self.B * self.N * self.M * self.D, self.solve_flops(rounds)
        if grad is None:
            return 3 * product + solve
        # The similarity again, the plan's gradient from either output, and for each side two that go to the tokens.
        return 10 * product + (3 if grad == "unroll" else 1) * solve


CPU_CASES = (
    Case("lavcap", 4, 64, 20, 768),
    Case("lavcap", 32, 64, 20, 768),
    Case("square", 1, 1024, 1024, 768),
)

# In the order of importance: a run that is cut short has the first ones.
CUDA_CASES = (
    Case("lavcap", 64, 64, 20, 768),
    Case("lavcap", 1024, 64, 20, 768),
    Case("lavcap", 4, 64, 20, 768),
    Case("lavcap", 32, 64, 20, 768),
    Case("lavcap", 256, 64, 20, 768),
    Case("lavcap_patches", 8, 256, 20, 768),
    Case("lavcap_patches", 64, 256, 20, 768),
    Case("square", 64, 64, 64, 768),
    Case("square", 64, 128, 128, 768),
)

TINY = Case("tiny", 2, 9, 5, 24, T=3)  # for Triton's interpreter, where there is no GPU
