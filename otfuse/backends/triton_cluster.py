"""Launcher of the rounds over a cluster: one launch for all of them, in the place of two a round in ``triton_large.py``.

The device code is in ``otfuse.kernels.triton.cluster``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from otfuse.backends._triton_paths import cluster_size, tile_side

WARPS = 8  # of a block: 128 entries of the largest tile to a thread, beside what the rounds need


@cache
def kernels() -> Any:
    """Imported at the first launch: ``import otfuse`` does not import Triton."""
    from otfuse.kernels.triton import cluster

    return cluster


@cache
def largest_cluster(device: torch.device) -> int:
    """Blocks that a cluster may have on this device; 1 where there are no clusters."""
    if device.type == "cpu":  # Triton's interpreter
        return 16
    if torch.version.hip:
        return 1
    major = torch.cuda.get_device_capability(device)[0]
    return 16 if major in (9, 10) else 8 if major > 10 else 1


def cluster_blocks(N: int, M: int, dtype: torch.dtype, blocks: int) -> dict[str, int]:
    """What the kernel of the rounds is launched with."""
    size = cluster_size(N, M, dtype, blocks)
    return {
        "BLOCK_N": tile_side(N), "BLOCK_M": tile_side(M), "CTAS": size, "WARPS": WARPS,
        "num_warps": WARPS, "num_ctas": size, "num_stages": 1,
    }  # fmt: skip
