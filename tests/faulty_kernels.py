"""Kernels with a fault each that only the compiler makes wrong, and the same without it: test_triton_frontend.py."""

import triton
import triton.language as tl


@triton.jit
def drops_a_name(ptr, n):
    v = tl.load(ptr)
    before, t = v, 0
    while t < n:
        before = v
        v = v * 2.0
        t += 1
    tl.store(ptr + 1, before)


@triton.jit
def carries_it(ptr, n):
    v = tl.load(ptr)
    before, t = v + 0.0, 0
    while t < n:
        before = v
        v = v * 2.0
        t += 1
    tl.store(ptr + 1, before)


@triton.jit
def counts_in_32_bits(ptr, n, m):
    tl.store(ptr + n * m, 1.0)


@triton.jit
def counts_in_64_bits(ptr, n, m):
    tl.store(ptr + n.to(tl.int64) * m, 1.0)


@triton.jit
def leaves_a_choice(ptr, high, low):
    value = tl.load(ptr)
    tl.store(ptr, value * high + value * low)


@triton.jit
def leaves_none(ptr, high, low):
    value = tl.load(ptr)
    tl.store(ptr, tl.fma(value, high, value * low))
