"""Numbers that launchers and kernels share. Imports nothing."""

# Gradient modes: what the backward of a solve differentiates.
DETACH, UNROLL, IMPLICIT = range(3)

# What a forward keeps for its backward.
HISTORY_NONE, HISTORY_LAST, HISTORY_ALL = range(3)

# Rows of N + M numbers in the history of a last iteration: scalings, and their exponents of two beyond the chip.
LAST_ROWS = 2

# Phases of a strip of a streamed adjoint: an iteration; start, step and end of conjugate gradients.
ROUND, START, STEP, END = range(4)

TABLE = 8  # numbers of a row of the table of places of packed items

# The range of the log kernel up to which the scaling form is safe, by bytes of a number: the logarithms of the scalings
# spread as far again, and float32 ends at exp(88), float64 at exp(709).
SCALING_RANGE = {4: 40.0, 8: 300.0}

# Of an item's largest weight: what a live one is at least. The iterations divide by a weight, and multiply by it again.
LEAST = 1e-30
