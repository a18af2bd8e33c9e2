"""The host emulator of TPC-C: every intrinsic against a formula in numpy, and what a launch does with memory.

One kernel holds all intrinsics, chosen by a scalar: a compile costs seconds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from otfuse._backends.tpc import emulator

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason=f"no C++ compiler: {emulator.HOW_TO_GET_ONE}")

LANES = np.arange(64)


def flush(x):
    """Subnormals to zero, the sign kept."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fused(a, b, c, other):
    """One rounding: in float64 these products and sums are exact. Two in the other variant."""
    a, b, c = flush(a), flush(b), flush(c)
    if other:
        return flush(flush(a * b) + c)
    return flush((a.astype(np.float64) * b + c).astype(np.float32))


def extreme(larger, a, b, other):
    """Of two numbers; a NaN is passed on, or in the other variant passed over."""
    a, b = flush(a), flush(b)
    chosen = np.where((a > b) if larger else (a < b), a, b)
    chosen = np.where(np.isnan(b), a if other else b, chosen)
    return np.where(np.isnan(a), b if other else a, chosen)


def to_int(a, other):
    inside = np.abs(a.astype(np.float64)) < 2**31
    saturated = np.where(a > 0, 2**31 - 1, np.where(a < 0, -(2**31), 0)) if other else np.full(64, -(2**31))
    return np.where(inside, np.rint(np.where(inside, flush(a), 0)), saturated).astype(np.int32)


def shift(a, by, left):
    by = by.astype(np.int64) & 0xFFFFFFFF
    wide = a.astype(np.int64) & 0xFFFFFFFF
    moved = (wide << np.minimum(by, 32)) if left else (wide >> np.minimum(by, 32))
    return np.where(by < 32, moved, 0).astype(np.uint32).view(np.int32)


def unsigned(x):
    return x.view(np.uint32)


def selector(s):
    """Of a shuffle, by the byte of each lane: source lane, or its own number where it is not enabled."""
    byte = s & 0xFF
    source = (LANES & ~15) + ((byte >> 5) & 1) * 8 + (byte & 7)
    return np.where(byte & 0x80, source, -1)


def shuffled(a, s, income):
    source = selector(s)
    return np.where(source >= 0, a[source], income)


def dual_groups(a, sources, written, income):
    """`written`: two bits for each dual group, its lower and upper group."""
    groups, result = a.reshape(4, 2, 8), income.reshape(4, 2, 8).copy()
    for d in range(4):
        for half in range(2):
            if written[d] >> half & 1:
                result[d, half] = groups[sources[d], half]
    return result.reshape(64)


def groups(a, enabled, dual, income):
    moved = a.reshape(4, 2, 8)[:, ::-1]
    chosen = np.zeros((4, 2, 1), bool)
    for d in range(4):
        for g in range(2):
            chosen[d, g] = dual >> d & 1 and enabled >> g & 1
    return np.where(chosen, moved, income.reshape(4, 2, 8)).reshape(64)


# Expression and formula of the lanes. Floats a, b, c, i (income); int32 m, n, k; uint32 views of m and n are mu, nu;
# mask q is where m is odd; p is the scalar predicate, z the polarity. v: whether this is the other variant.
FLOATS = {
    "v_f32_mov_b(a, 0, i, p, z)": lambda a, **_: a,
    "v_f32_abs_b(a, 0, i, p, z)": lambda a, **_: np.abs(a),
    "v_f32_add_b(a, b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) + flush(b)),
    "v_f32_sub_b(a, b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) - flush(b)),
    "v_f32_mul_b(a, b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) * flush(b)),
    "v_f32_max_b(a, b, 0, i, p, z)": lambda a, b, v, **_: extreme(True, a, b, v),
    "v_f32_min_b(a, b, 0, i, p, z)": lambda a, b, v, **_: extreme(False, a, b, v),
    "v_f32_nearbyint_b(a, 0, i, p, z)": lambda a, **_: np.rint(flush(a)),
    "v_convert_i32_to_f32_b(m, 0, i, p, z)": lambda m, **_: m.astype(np.float32),
    "v_f32_mac_b(a, b, i, 0, p, z)": lambda a, b, i, v, **_: fused(a, b, i, v),
    "v_f32_mac_b(a, b, i, SW_NEG, p, z)": lambda a, b, i, v, **_: fused(-a, b, i, v),
    "v_f32_madd_b(a, b, c, 0, i, p, z)": lambda a, b, c, v, **_: fused(a, b, c, v),
    "v_f32_shuffle_b(a, (uchar256)mu, 0, i, p, z)": lambda a, m, i, **_: shuffled(a, m, i),
    "v_f32_mov_dual_group_all_b(a, 0xFFFFFFFF, 2, 0, 3, 1, MkWrA(3, 3, 3, 3), i, p, z)": lambda a, i, **_: dual_groups(
        a, (2, 0, 3, 1), (3, 3, 3, 3), i
    ),
    "v_f32_mov_dual_group_all_b(a, 0xFFFFFFFF, 1, 1, 2, 0, MkWrA(1, 2, 0, 3), i, p, z)": lambda a, i, **_: dual_groups(
        a, (1, 1, 2, 0), (1, 2, 0, 3), i
    ),
    "v_f32_mov_dual_group_b(a, 0xFFFFFFFF, 3, 1, MkWr(1, 0), i, p, z)": lambda a, i, **_: dual_groups(
        a, (0, 3, 0, 0), (0, 1, 0, 0), i
    ),
    "v_f32_mov_group_b(a, 0xFFFFFFFF, 0x3F, i, p, z)": lambda a, i, **_: groups(a, 3, 15, i),
    "v_f32_mov_group_b(a, 0xFFFFFFFF, SW_GROUP1_EN | SW_DUAL_GROUP0_EN | SW_DUAL_GROUP2_EN, i, p, z)": (
        lambda a, i, **_: groups(a, 2, 5, i)
    ),
    **{
        f"v_f32_sel_{name}_f32_b(a, b, c, i, 0, i, p, z)": (
            lambda a, b, c, i, compare=compare, **_: np.where(compare(flush(a), flush(b)), c, i)
        )
        for name, compare in (("less", np.less), ("leq", np.less_equal), ("grt", np.greater), ("geq", np.greater_equal))
    },
    "v_f32_sel_grt_u32_b(mu, nu, c, i, 0, i, p, z)": (
        lambda m, n, c, i, **_: np.where(unsigned(m) > unsigned(n), c, i)
    ),
    "v_f32_sel_less_i32_b(m, n, c, i, 0, i, p, z)": lambda m, n, c, i, **_: np.where(m < n, c, i),
    # Operators know no predicate: a move with one behind them.
    "v_f32_mov_b(a + b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) + flush(b)),
    "v_f32_mov_b(a - b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) - flush(b)),
    "v_f32_mov_b(a * b, 0, i, p, z)": lambda a, b, **_: flush(flush(a) * flush(b)),
    "v_f32_mov_b(2.5f * a - 1, 0, i, p, z)": lambda a, **_: flush(flush(np.float32(2.5) * flush(a)) - np.float32(1)),
    "v_f32_mov_b(-a, 0, i, p, z)": lambda a, **_: -a,
    "v_f32_mov_b(*((float64*)&m), 0, i, p, z)": lambda m, **_: m.view(np.float32),
}
VECTOR_PREDICATES = {
    "v_f32_mov_vb(a, 0, i, q, z)": lambda a, **_: a,
    "v_f32_add_vb(a, b, 0, i, q, z)": lambda a, b, **_: flush(flush(a) + flush(b)),
    "v_f32_mul_vb(a, b, 0, i, q, z)": lambda a, b, **_: flush(flush(a) * flush(b)),
    "v_f32_mac_vb(a, b, i, SW_NEG, q, z)": lambda a, b, i, v, **_: fused(-a, b, i, v),
}
INTEGERS = {
    "v_i32_add_b(m, n, 0, k, p, z)": lambda m, n, **_: m + n,
    "v_i32_sub_b(m, n, 0, k, p, z)": lambda m, n, **_: m - n,
    "v_i32_and_b(m, n, 0, k, p, z)": lambda m, n, **_: m & n,
    "v_i32_or_b(m, n, 0, k, p, z)": lambda m, n, **_: m | n,
    "v_i32_xor_b(m, n, 0, k, p, z)": lambda m, n, **_: m ^ n,
    "v_i32_max_b(m, n, 0, k, p, z)": lambda m, n, **_: np.maximum(m, n),
    "v_i32_min_b(m, n, 0, k, p, z)": lambda m, n, **_: np.minimum(m, n),
    "v_i32_shl_b(m, n & 63, 0, k, p, z)": lambda m, n, **_: shift(m, n & 63, True),
    "v_i32_shr_b(m, n & 63, 0, k, p, z)": lambda m, n, **_: shift(m, n & 63, False),
    "v_convert_f32_to_i32_b(a, 0, k, p, z)": lambda a, v, **_: to_int(a, v),
    "v_i32_sel_geq_f32_b(a, b, m, n, 0, k, p, z)": lambda a, b, m, n, **_: np.where(flush(a) >= flush(b), m, n),
    "v_i32_sel_eq_i32_b(m & 3, n & 3, m, n, 0, k, p, z)": lambda m, n, **_: np.where((m & 3) == (n & 3), m, n),
    "v_i32_mov_b((int64)read_lane_id_4b_b(), 0, k, p, z)": lambda **_: LANES.astype(np.int32),
    "v_i32_mov_b((int64)((mu >> 3) ^ (nu << 2)), 0, k, p, z)": (
        lambda m, n, **_: shift(m, np.full(64, 3), False) ^ shift(n, np.full(64, 2), True)
    ),
    "v_i32_mov_b((int64)(~mu | 9), 0, k, p, z)": lambda m, **_: ~m | 9,
    "v_i32_mov_b(0x7EF311C7 - m, 0, k, p, z)": lambda m, **_: (0x7EF311C7 - m.astype(np.int64)).astype(np.int32),
}
MASKS = {
    "v_f32_cmp_geq_b(a, b)": lambda a, b, **_: flush(a) >= flush(b),
    "v_f32_cmp_neq_b(a, b)": lambda a, b, **_: flush(a) != flush(b),
    "v_u32_cmp_geq_b(mu, nu)": lambda m, n, **_: unsigned(m) >= unsigned(n),
    "v_u32_cmp_less_b(mu, nu, 0, q, p, z)": lambda m, n, **_: unsigned(m) < unsigned(n),
    "(q & v_i32_cmp_less_b(m, n)) | ~v_i32_cmp_grt_b(n, 0)": lambda m, n, **_: ((m & 1 != 0) & (m < n)) | ~(n > 0),
    "q ^ v_f32_cmp_leq_b(a, b)": lambda a, b, m, **_: (m & 1 != 0) ^ (flush(a) <= flush(b)),
}
SCALARS = {
    "s_f32_mul(s, t)": lambda s, t, **_: s * t,
    "s_f32_add(s, t)": lambda s, t, **_: s + t,
    "s_f32_max(s, t)": lambda s, t, **_: max(s, t),
    "s_f32_min(s, t)": lambda s, t, **_: min(s, t),
    "s_f32_mac(s, t, 3.0f, SW_NEG)": lambda s, t, **_: 3 - s * t,
    "s_f32_max(s, t, 0, 7.0f, 0)": lambda **_: 7,
    "s_convert_i32_to_f32(s_i32_min(-3, s_i32_max(-8, -5)))": lambda **_: -5,
    "s_i32_cmp_less(4, 5) ? 1.0f : 2.0f": lambda **_: 1,
    "s_convert_i32_to_f32(s_i32_add(0x7FFFFFFF, 1))": lambda **_: -(2.0**31),
}


def source() -> str:
    cases = [("r", expression) for expression in (*FLOATS, *VECTOR_PREDICATES)]
    cases += [("r", f"(float64)({expression})") for expression in INTEGERS]
    cases += [("r", f"v_f32_mov_vb(a, 0, i, {expression})") for expression in MASKS]
    cases += [("r", expression) for expression in SCALARS]
    lines = "\n".join(f"  if (which == {k}) {name} = {text};" for k, (name, text) in enumerate(cases))
    return f"""
void main(tensor floats, tensor ints, tensor out, int which, int p, int z, float s, float t) {{
  int5 at = {{0, 0, 0, 0, 0}};
  const float64 a = v_f32_ld_tnsr_b(at, floats);
  int64 m = v_i32_ld_tnsr_b(at, ints);
  at[1] = 1;
  const float64 b = v_f32_ld_tnsr_b(at, floats);
  const int64 n = v_i32_ld_tnsr_b(at, ints);
  at[1] = 2;
  const float64 c = v_f32_ld_tnsr_b(at, floats);
  const int64 k = v_i32_ld_tnsr_b(at, ints);
  at[1] = 3;
  const float64 i = v_f32_ld_tnsr_b(at, floats);
  const uint64 mu = (uint64)m, nu = (uint64)n;
  const bool64 q = v_u32_cmp_geq_b(mu & 1, 1);
  float64 r = 0;
{lines}
  at[1] = 0;
  v_f32_st_tnsr(at, out, r);
}}
"""


ALL = [*FLOATS, *VECTOR_PREDICATES, *INTEGERS, *MASKS, *SCALARS]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "intrinsics.c"
    path.write_text(source())
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["one rounding", "other variant"])
def intrinsics(request, file):
    if not request.param:
        return emulator.kernel(file), False
    with emulator.variant():
        return emulator.kernel(file), True


@pytest.fixture(scope="module")
def lanes():
    """Numbers of every kind; products and sums of a, b, c and i are exact in float64 but for the special ones."""
    generator = np.random.default_rng(0)
    floats = generator.uniform(1, 2, (4, 64)).astype(np.float32) * generator.choice([-1, 1], (4, 64))
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        -1e-40,
        3e38,
        2.5,
        -0.5,
        1.5,
        2**31,
        -(2.0**31),
        1e-38,
        65536.5,
    ]
    floats[0, : len(special)] = special
    floats[1, 2 : 2 + len(special)] = special
    floats[0, 40:44], floats[1, 40:44] = (1e-20, 1e-25, 1e30, -1e30), (1e-25, 1e-25, 1e30, 1e30)
    floats = floats.astype(np.float32)
    ints = generator.integers(-(2**31), 2**31, (3, 64), dtype=np.int64).astype(np.int32)
    ints[0, :4], ints[1, :4] = (-1, 0, 2**31 - 1, -(2**31)), (1, 31, 1, 1)
    return floats, ints


def launch(kernel, lanes, which, p=1, z=0, s=1.25, t=-3.0):
    out = torch.full((1, 64), 99.0)
    kernel.run([*map(torch.from_numpy, lanes), out], [which, p, z, s, t], [1], outputs=1)
    return out[0].numpy()


@pytest.mark.parametrize("expression", ALL)
def test_intrinsic(intrinsics, lanes, expression):
    kernel, other = intrinsics
    floats, ints = lanes
    values = dict(zip("abci", floats)) | dict(zip("mnk", ints)) | {"s": 1.25, "t": -3.0, "v": other}
    for p, z in ((1, 0), (0, 0), (1, 1), (0, 1)):
        actual = launch(kernel, lanes, ALL.index(expression), p, z)
        on = p != z
        with np.errstate(all="ignore"):
            if expression in FLOATS:
                expected = FLOATS[expression](**values) if on else values["i"]
            elif expression in VECTOR_PREDICATES:
                expected = VECTOR_PREDICATES[expression](**values)
                expected = np.where((ints[0] & 1 != 0) != bool(z), expected, values["i"])
            elif expression in INTEGERS:
                expected, actual = INTEGERS[expression](**values) if on else values["k"], actual.view(np.int32)
            elif expression in MASKS:
                mask = MASKS[expression](**values)
                if ", p, z)" in expression and not on:
                    mask = ints[0] & 1 != 0
                expected = np.where(mask, values["a"], values["i"])
            else:
                expected = np.full(64, SCALARS[expression](**values), np.float32)
        np.testing.assert_array_equal(actual, expected)


def test_the_variants_differ_in_a_rounding(file, lanes):
    """The products were chosen so that rounding them first shows."""
    which = ALL.index("v_f32_mac_b(a, b, i, 0, p, z)")
    one = launch(emulator.kernel(file), lanes, which)
    with emulator.variant():
        other = launch(emulator.kernel(file), lanes, which)
    assert (one != other).sum() > 5
    np.testing.assert_allclose(one[45:], other[45:], rtol=1e-6, atol=1e-6)


# Tensors of 3 x 2 x 70 elements: two vectors a row, the second reaching past the end.
MEMORY = """
__local__ float64 kept[2];
__local__ float numbers[3];
void main(tensor from, tensor halves, tensor to, tensor halves_to, tensor sizes, int which, int c0, int c1, int c2) {
  const int5 first = get_index_space_offset();
  int5 at = {c0, c1, c2, 0, 0};
  if (which == 0) v_f32_st_tnsr(at, to, v_f32_ld_tnsr_b(at, from));
  if (which == 1) {
    set_pad_value_float(from, get_pad_value_float(from) + 7.0f);
    v_f32_st_tnsr_partial(at, to, v_f32_ld_tnsr_b(at, from), 9, 4);
  }
  if (which == 2) v_f32_st_tnsr(at, to, v_f32_ld_tnsr_partial_b(at, from, 5, 2, 0, (float64)-1.0f));
  if (which == 3) v_bf16_st_tnsr(at, halves_to, v_bf16_ld_tnsr_b(at, halves));
  if (which == 4) {
    const float128 wide = v_convert_bf16_to_f32_all_b(v_bf16_ld_tnsr_b(at, halves));
    v_f32_st_tnsr(at, to, wide.v1);
    at[0] = c0 + 64;
    v_f32_st_tnsr(at, to, wide.v2);
    const int5 start = {c0, c1, c2, 0, 0};
    v_bf16_st_tnsr(start, halves_to, v_convert_f32_to_bf16_all_b(wide));
  }
  if (which == 5) {
    __global float* address = (__global float*)gen_addr(at, from);
    s_f32_st_g(gen_addr(at, to), s_f32_ld_g(address) + s_f32_ld_g(address + 1));
  }
  if (which == 6) v_f32_st_tnsr(at, to, v_f32_ld_g(gen_addr(at, from)));
  if (which == 7) s_f32_st_tnsr_s(at, to, 5.0f);
  if (which == 8) v_f32_st_tnsr(at, to, kept[c0 & 1]);
  if (which == 9) s_f32_st_tnsr_s(at, to, numbers[1]);
  if (which == 10) {
    float64 nothing;
    v_f32_st_tnsr(at, to, nothing);
  }
  if (which == 11) {
    v_f32_st_tnsr(at, to, (float64)1.0f, 0, 0);
    v_f32_st_tnsr(at, to, v_f32_ld_tnsr_b(at, from, 0, (float64)3.0f, 1, 1));
  }
  if (which == 12) {
    int5 other = {1, 2, 3, 4, 5};
    other = set_indx(9, other, 0x12);
    other = i_i32_mov(at, 1, 0, other);
    other = i_i32_add(other, at, 4, 0, other) + at * at - at;
    int5 place = {0, 0, 0, 0, 0};
    for (int d = 0; d < 5; d++) {
      place[0] = d;
      s_f32_st_tnsr_s(place, to, s_convert_i32_to_f32(mov_irf_dim(other, 2, 0) + 10 * other[d]));
    }
  }
  int5 place = {first[0], 0, 0, 0, 0};
  const int described = 1000 * get_dim_size(to, 0) + 100 * get_dim_size(to, 1) + get_dim_size(to, 4);
  v_i32_st_tnsr_partial(place, sizes, (int64)(described + (int)get_dim_stride(to, 1)), 0, 0);
}
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "memory.c"
    path.write_text(MEMORY)
    return emulator.kernel(path)


def run_memory(kernel, which, c0=0, c1=0, c2=0):
    """(from, to, halves, halves_to) after a launch; tensors in PyTorch's order of dimensions."""
    values = torch.arange(3 * 2 * 70).view(3, 2, 70) + 0.5
    halves = (torch.arange(3 * 2 * 70).view(3, 2, 70) % 97 + 1).bfloat16()
    to, halves_to, sizes = torch.full((3, 2, 70), -9.0), torch.full((3, 2, 70), -9.0).bfloat16(), torch.zeros(1).int()
    kernel.run([values, halves, to, halves_to, sizes], [which, c0, c1, c2], [1], outputs=3)
    assert sizes.item() == 70 * 1000 + 2 * 100 + 1 + 70
    return values, to, halves, halves_to


def expected_row(values, c0, c1, c2, count=64, pad=0.0):
    """What a load sees: lane l is at c0 + l of dimension 0."""
    inside = 0 <= c1 < 2 and 0 <= c2 < 3
    return [float(values[c2, c1, c0 + x]) if inside and 0 <= c0 + x < 70 else pad for x in range(count)]


@pytest.mark.parametrize("c", [(0, 0, 0), (6, 1, 2), (40, 1, 0), (-3, 0, 1), (69, 1, 1)])
def test_loads_and_stores_clip_at_the_end_of_a_row(memory, c):
    values, to, *_ = run_memory(memory, 0, *c)
    expected = torch.full((3, 2, 70), -9.0)
    low, high = max(c[0], 0), min(c[0] + 64, 70)
    expected[c[2], c[1], low:high] = values[c[2], c[1], low:high]
    assert torch.equal(to, expected)


@pytest.mark.parametrize("c", [(0, 2, 0), (0, -1, 0), (0, 0, 3), (0, 0, -1), (70, 0, 0), (-64, 0, 0)])
def test_outside_nothing_is_stored(memory, c):
    _, to, *_ = run_memory(memory, 0, *c)
    assert (to == -9).all()


def test_pad_values_and_partial_access(memory):
    values, to, *_ = run_memory(memory, 1, 62, 1, 0)
    row = expected_row(values, 62, 1, 0, pad=7.0)
    # Ten elements from coordinate 62 on, taken from lanes 4 to 13; only eight of them exist.
    assert to[0, 1, 62:].tolist() == row[4:12] and (to[0, 1, :62] == -9).all()
    values, to, *_ = run_memory(memory, 2, 3, 0, 1)
    assert to[1, 0, 3:67].tolist() == [-1, -1, *values[1, 0, 3:9].tolist(), *[-1] * 56]


def test_bfloat16(memory):
    _, _, halves, halves_to = run_memory(memory, 3, 0, 1, 2)
    assert torch.equal(halves_to[2, 1], halves[2, 1]) and (halves_to[:2] == -9).all()
    _, to, halves, halves_to = run_memory(memory, 4, 0, 1, 2)
    assert torch.equal(halves_to[2, 1], halves[2, 1]) and torch.equal(to[2, 1], halves[2, 1].float())


def test_global_memory(memory):
    values, to, *_ = run_memory(memory, 5, 10, 1, 2)
    assert to[2, 1, 10] == values[2, 1, 10] + values[2, 1, 11] and (to == -9).sum() == to.numel() - 1
    values, to, *_ = run_memory(memory, 6, 5, 0, 1)
    assert (to[1, 0, 5:69] == values[1, 0, 5]).all()
    _, to, *_ = run_memory(memory, 7, 5, 0, 1)
    assert to[1, 0, 5] == 5 and (to == -9).sum() == to.numel() - 1


@pytest.mark.parametrize("which", [8, 9, 10], ids=["vectors", "scalars", "registers"])
def test_what_was_never_stored_is_poison(memory, which):
    _, to, *_ = run_memory(memory, which)
    if which == 10 and not (to[0, 0, :64].abs() > 1e30).all():
        pytest.skip("this compiler does not fill registers")
    assert which == 10 or to[0, 0, 0].isnan()


def test_a_predicate_that_is_off_stores_nothing_and_loads_the_income(memory):
    _, to, *_ = run_memory(memory, 11, 2)
    assert (to[0, 0, 2:66] == 3).all()


def test_coordinates(memory):
    """set_indx on dimensions 1 and 4, a move on 0, an addition on 2, and operators on all."""
    _, to, *_ = run_memory(memory, 12, 3, 1, 2)
    at, other = [3, 1, 2, 0, 0], [1, 9, 3, 4, 9]
    other[0] = at[0]
    other[2] += at[2]
    other = [o + a * a - a for o, a in zip(other, at)]
    assert to[0, 0, :5].tolist() == [other[2] + 10 * o for o in other]
