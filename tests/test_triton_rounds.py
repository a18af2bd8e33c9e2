"""Device functions that the kernels share, each by itself in Triton's interpreter."""

import pytest
import torch

from otfuse._backends.triton.launch import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from otfuse.kernels.triton.rounds import apart, column_sums, crossed, tile_product  # noqa: E402

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


@triton.jit
def apart_kernel(numbers_ptr, exponents_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    number, exponent = apart(tl.load(numbers_ptr + at), tl.load(exponents_ptr + at))
    tl.store(out_ptr + at, number)
    tl.store(exponents_ptr + at, exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_apart(dtype):
    """Exactly, beside every power of two and for numbers that are not normal; and again they stay as they are."""
    limits = torch.finfo(dtype)
    most = 126 if dtype == torch.float32 else 1022
    powers = 2.0 ** torch.tensor([-most, -100, -24, -1, 0, 1, 24, 100, most], dtype=dtype)
    ends = torch.tensor(
        [0.0, limits.max, limits.tiny / 8, limits.tiny * (1 - limits.eps), 3.0, -0.3, -5e-30], dtype=dtype
    )
    numbers = torch.cat([powers, powers * (1 + limits.eps), powers[1:] * (1 - limits.eps / 2), -powers, ends])
    numbers = torch.nn.functional.pad(numbers, (0, 64 - len(numbers)))
    parts, exponents = torch.empty_like(numbers), torch.full_like(numbers, 7)
    apart_kernel[(1,)](numbers, exponents, parts, 64)
    assert ((exponents - 7).abs() <= most).all(), "one over the power of two is a normal number"
    live = numbers.abs() >= limits.tiny
    assert ((parts.abs() >= 1) & (parts.abs() < 2))[live & (numbers.abs() < 2.0**most)].all()
    assert (parts.abs() < 4).all() and (parts.abs() < 1)[~live].all() and (exponents == 7)[numbers == 0].all()
    assert torch.equal(torch.ldexp(parts.double(), (exponents - 7).double()), numbers.double())
    normal = live & (parts.abs() < 2) | (numbers == 0)
    again, moved = torch.empty_like(numbers), exponents.clone()
    apart_kernel[(1,)](parts, moved, again, 64)
    assert torch.equal(again[normal], parts[normal]) and torch.equal(moved[normal], exponents[normal])
