"""Which way the Triton backend solves a batch: one small function of its sizes, dtype and the device's memory.

Nothing of values or of the moment (free memory, other work) is looked at: forward, backward and the replay of a CUDA
graph must agree. Where the lines lie, and why: docs/performance.md#paths.

Letters: B batch, N rows, M columns, D features (0: there are no tokens, only a cost).
"""

from __future__ import annotations

from enum import Enum

import torch


class Path(Enum):
    ON_CHIP = "on chip"  # an item's kernel matrix in the registers of a program, from the first round to the last
    SMALL = "many small"  # several items of a cost in a program, each in the registers of one thread or a few
    CLUSTER = "over a cluster"  # the kernel matrix made once in memory, and on chip in all rounds, in one launch
    STORED = "stored"  # the kernel matrix in device memory, read once a round; for a cost, the cost itself
    RECOMPUTED = "recomputed"  # tiles of it made anew from the tokens in every round; never N x M in memory


SMALL_SIDE = 16  # the longest side of a cost that is solved as one of many

# Entries of the largest tile that stays on chip, both sides rounded up to a power of two of at least 16.
LARGEST_TILE = {8: 4096, 4: 16384}  # by bytes of an entry of the solve

# Longer ones would not leave a thread its registers: the longest side, by bytes of an entry, and the largest tile of
# tokens with a side of more than 128 (benchmarks/compiler/resources.json has the worst cases).
LONGEST_SIDE = {8: 64, 4: 256}
LARGEST_LONG_TILE = 8192

# Entries that one block of a cluster is given, as many as stay on chip, before there is another block; and the longest
# sides: of longer rows, what the blocks exchange would take longer than the rounds. In float32 only.
CLUSTER_PART = 16384
LARGEST_CLUSTER = 16
CLUSTER_SIDES = 1024, 512

# Features up to which a tile is made again sooner than it is read, by bytes of a token's number: half precision has
# tensor cores. And the share of the device's memory that a stored kernel matrix may take.
RECOMPUTED_FEATURES = {8: 0, 4: 16, 2: 64}
STORED_SHARE = 4


def choose(B: int, N: int, M: int, D: int, dtype: torch.dtype, memory: int, held: int) -> Path:
    """The path of a batch of tokens or costs of this dtype, on a device with ``memory`` bytes in all, of which a
    cluster holds up to ``held`` entries (``triton_cluster.held_by``).

    Example:
        >>> choose(1_048_576, 4, 4, 0, torch.float32, 141 << 30, 1 << 19)
        <Path.SMALL: 'many small'>
    """
    if is_small(N, M, D):
        return Path.SMALL
    if fits_on_chip(N, M, D, dtype):
        return Path.ON_CHIP
    if D == 0 and dtype.itemsize == 2:  # a cost is widened as it is read, which takes registers
        held //= 2
    over_cluster = solved_size(dtype) == 4 and cluster_size(N, M, held) > 0
    if D == 0:
        return Path.CLUSTER if over_cluster else Path.STORED
    stored = B * N * M * solved_size(dtype)
    if over_cluster and stored * STORED_SHARE <= memory:
        return Path.CLUSTER
    if RECOMPUTED_FEATURES[dtype.itemsize] >= D or stored * STORED_SHARE > memory:
        return Path.RECOMPUTED
    return Path.STORED


def is_small(N: int, M: int, D: int) -> bool:
    return D == 0 and max(N, M) <= SMALL_SIDE


def fits_on_chip(N: int, M: int, D: int, dtype: torch.dtype) -> bool:
    size = solved_size(dtype)
    sides = tile_side(N), tile_side(M)
    entries = sides[0] * sides[1]
    if D and max(sides) > 128 and entries > LARGEST_LONG_TILE:
        return False
    return entries <= LARGEST_TILE[size] and max(sides) <= LONGEST_SIDE[size]


def cluster_size(N: int, M: int, held: int) -> int:
    """How many blocks an item is spread over; 0 where a cluster does not hold it."""
    sides = tile_side(N), tile_side(M)
    entries = sides[0] * sides[1]
    if sides[0] > CLUSTER_SIDES[0] or sides[1] > CLUSTER_SIDES[1] or entries > held:
        return 0
    size = 1
    while size < LARGEST_CLUSTER and size * CLUSTER_PART < entries:
        size *= 2
    return size


def tile_side(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``; products on tensor cores want at least 16."""
    side = least
    while side < size:  # comparisons, which torch.compile can guard on
        side *= 2
    return side


def solved_size(dtype: torch.dtype) -> int:
    """Bytes of a number of the solve."""
    return 8 if dtype == torch.float64 else 4
