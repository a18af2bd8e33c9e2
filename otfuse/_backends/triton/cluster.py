"""Over a cluster all rounds are one launch, in the place of the two a round that ``streaming.py`` makes.

The device code is in ``otfuse.kernels.triton.cluster``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from otfuse._backends.triton.configurations import INTERPRETER, target_of
from otfuse._backends.triton.paths import CLUSTER_PART, cluster_size, tile_side
from otfuse._backends.triton.version import has_clusters

WARPS = 8  # of a block: 128 entries of the largest tile to a thread, beside what the rounds need


@cache
def rounds_kernel() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import cluster

    return cluster._rounds_kernel


@cache
def adjoint_rounds_kernel() -> Any:
    from otfuse.kernels.triton import cluster_backward

    return cluster_backward._adjoint_rounds_kernel


# Entries that a cluster holds, by target: twice as many to a block, where the compiler finds room for them
# (benchmarks/compiler/resources.json), and one block where there are no clusters.
HELD = {"sm_90": 32 * CLUSTER_PART, "sm_100": 16 * CLUSTER_PART, "sm_80": CLUSTER_PART, "gfx942": 0}
INTERPRETED = HELD["sm_90"]


@cache
def held_by(device: torch.device) -> int:
    """How many entries a cluster of this device holds, or 0."""
    if not has_clusters():
        return 0
    target = target_of(device)
    if target == INTERPRETER:
        return INTERPRETED
    if HELD[target] > CLUSTER_PART and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return CLUSTER_PART  # another generation with as much memory: its clusters are not known
    return HELD[target]


def cluster_blocks(N: int, M: int, held: int) -> dict[str, int]:
    """What the kernel of the rounds is launched with."""
    size = cluster_size(N, M, held)
    return {
        "BLOCK_N": tile_side(N), "BLOCK_M": tile_side(M), "CTAS": size, "WARPS": WARPS,
        "num_warps": WARPS, "num_ctas": size, "num_stages": 1,
    }  # fmt: skip
