"""What the launchers ask of a device: its size, how a batch is spread over it, block sizes, precision of products.

Letters: B batch, D features.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from otfuse._backends.triton.configurations import block_sizes, target_of

FEATURES = 64  # of the smallest part of an item

# Bytes of an item's tokens above which several programs share one reading of them. Predicted (docs/performance.md).
SIMILARITY_FIRST = 256 * 1024


@cache
def device_memory(device: torch.device) -> int:
    """``memory_of`` where no compiler looks on, which would warn of the cache."""
    return memory_of(device)


def memory_of(device: torch.device) -> int:
    """Bytes in all, whatever is in use."""
    if device.type == "cpu":  # in Triton's interpreter: a number that is the same on every machine
        return 16 << 30
    return torch.cuda.get_device_properties(device).total_memory


class LaunchShape(NamedTuple):
    """How a batch is spread over the programs of one launch."""

    parts: int  # programs an item: each solves it, and attends to its own features
    features: int  # of a part; a multiple of 64
    similarity_first: bool  # by a launch of its own, to be read by every part


def launch_shape(B: int, token_bytes: int, D: int, device: torch.device) -> LaunchShape:
    """One program an item where there are enough items to fill the device; below, several.

    ``token_bytes`` is what an item's tokens weigh. To make the similarity again in every part costs one
    multiprocessor's reading of them; to make it first costs a launch, and room for [B, N, M].
    """
    return _launch_shape(B, token_bytes, D, multiprocessors(device))


@lru_cache(maxsize=4096)
def _launch_shape(B: int, token_bytes: int, D: int, processors: int) -> LaunchShape:
    idle = processors // B
    parts = max(1, min(idle, -(-D // FEATURES)))
    features = -(-D // (parts * FEATURES)) * FEATURES if D else 0
    parts = max(1, -(-D // features)) if D else 1
    return LaunchShape(parts, features, parts > 1 and token_bytes > SIMILARITY_FIRST)


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that the device runs side by side, at one each."""
    if device.type == "cpu":  # Triton's interpreter runs one after the other
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def blocks(kernel: str, dtype: torch.dtype, BLOCK_N: int, BLOCK_M: int, device: torch.device) -> dict[str, int]:
    """Block sizes, warps and stages for a tile of a kernel on tokens of this dtype; not to be changed."""
    return block_sizes(kernel, str(dtype).removeprefix("torch."), BLOCK_N, BLOCK_M, target_of(device))


def precision(tokens: torch.dtype) -> str:
    """Of products in float32: its own, unless torch has been told that tf32 will do."""
    return "tf32" if tokens == torch.float32 and _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    """What torch's own products on CUDA are in. Its older setting raises when read after the newer one was made."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        return matmul.allow_tf32
    return bool(matmul.fp32_precision == "tf32")
