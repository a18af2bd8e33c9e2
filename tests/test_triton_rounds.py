"""Device functions that the kernels share, each by itself in Triton's interpreter."""

import pytest
import torch

from otfuse._backends.triton.launch import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from otfuse.kernels.triton.rounds import column_sums, crossed, tile_product  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


@triton.jit
def sums_kernel(
    x_ptr, y_ptr, out_ptr, CROSSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows, columns, features = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + rows[:, None] * BLOCK_D + features[None, :])
    y = tl.load(y_ptr + columns[:, None] * BLOCK_D + features[None, :])
    if CROSSED != 0:
        tile = tl.trans(tile_product(x, y, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), CROSSED, "ieee"))
    else:
        tile = tile_product(x, y, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), CROSSED, "ieee")
    tl.store(out_ptr + columns, column_sums(tile, CROSSED))


@pytest.mark.parametrize(
    "N, M, warps", [(64, 16, 4), (64, 32, 4), (128, 16, 4), (256, 32, 8), (32, 32, 0), (64, 64, 0)]
)
def test_column_sums_of_products(N, M, warps):
    """Of whole numbers, whose sums have no roundings: in any order they are the same."""
    assert crossed(tl.bfloat16, N, M) == crossed(tl.float16, N, M) == warps and crossed(tl.float32, N, M) == 0
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-3, 4, (size, 16), generator=generator).float() for size in (N, M))
    for used in {0, warps}:
        out = torch.empty(M)
        sums_kernel[(1,)](x, y, out, used, N, M, 16)
        assert torch.equal(out, (x @ y.T).sum(0))
