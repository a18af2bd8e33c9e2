"""The numbers that launchers and kernels share (``otfuse.kernels.constants``), as device code takes them."""

import triton.language as tl
from otfuse.kernels import constants

HISTORY_NONE = tl.constexpr(constants.HISTORY_NONE)
HISTORY_LAST = tl.constexpr(constants.HISTORY_LAST)
HISTORY_ALL = tl.constexpr(constants.HISTORY_ALL)
LAST_ROWS = tl.constexpr(constants.LAST_ROWS)

DETACH = tl.constexpr(constants.DETACH)
UNROLL = tl.constexpr(constants.UNROLL)
IMPLICIT = tl.constexpr(constants.IMPLICIT)

ROUND = tl.constexpr(constants.ROUND)
START = tl.constexpr(constants.START)
STEP = tl.constexpr(constants.STEP)
END = tl.constexpr(constants.END)

TABLE = tl.constexpr(constants.TABLE)

RANGE32 = tl.constexpr(constants.SCALING_RANGE[4])
RANGE64 = tl.constexpr(constants.SCALING_RANGE[8])

LEAST = tl.constexpr(constants.LEAST)
