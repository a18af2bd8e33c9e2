// 64 elements along dimension 0 of a tensor of the kernel's dtype, as float32. BFLOAT16 is defined or not.

#ifndef BFLOAT16

static inline float64 load_values(int5 at, tensor from) { return v_f32_ld_tnsr_b(at, from); }
#define STORE_VALUES(at, to, x) v_f32_st_tnsr(at, to, x)

#else

// A bfloat16 is the upper half of a float32, and element e of a vector lies in its bytes 2e and 2e + 1: conversion is a
// matter of shifts. They give the even and the odd elements; here 64 lanes are put in order and back.
//
//   in order:  dual group 0 = elements 0-15, 1 = 16-31; split: dual group 0 = even elements of 0-31, 1 = the odd ones
static inline uchar256 split_selector() {
  const uint64 lane = V_LANE_ID_32;  // lanes 0-7 take the even lanes of the dual group, lanes 8-15 the odd ones
  return (uchar256)(source_lane(((lane & 7) << 1) | ((lane >> 3) & 1)) | ENABLE);
}
static inline uchar256 join_selector() {
  const uint64 lane = V_LANE_ID_32;
  return (uchar256)(source_lane(((lane >> 1) & 7) | ((lane & 1) << 3)) | ENABLE);
}
// The second group of dual groups 0 and 2 changes places with the first of 1 and 3.
static inline float64 exchange_groups(float64 x) {
  const float64 swapped = v_f32_mov_group_b(x, EVERY_LANE, BOTH_GROUPS | EVERY_DUAL_GROUP, x);
  return MOVE_DUAL_GROUPS(swapped, 1, 0, 3, 2, MkWrA(2, 1, 2, 1), x);
}

static inline float64 load_values(int5 at, tensor from) {
  const bfloat128 pairs = v_bf16_ld_tnsr_partial_b(at, from, 63, 0);  // the other half may be another member's
  const int64 bits = *((int64*)&pairs);
  const float64 even = from_bits(v_i32_shl_b(bits, (int64)16));
  const float64 odd = from_bits(bits & (int64)0xFFFF0000);
  float64 x = MOVE_DUAL_GROUPS(even, 0, 0, 1, 0, MkWrA(3, 0, 3, 0), even);
  x = MOVE_DUAL_GROUPS(odd, 0, 0, 0, 1, MkWrA(0, 3, 0, 3), x);
  x = exchange_groups(x);
  return v_f32_shuffle_b(x, join_selector(), 0, x);
}

// To nearest even; NaN stays NaN.
static inline int64 rounded_to_bfloat16(float64 x) {
  const int64 bits = bits_of(v_f32_sel_geq_f32_b(x, x, x, from_bits((int64)0x7FC00000)));
  return bits + 0x7FFF + (v_i32_shr_b(bits, (int64)16) & 1);
}

static inline void store_values(int5 at, tensor to, float64 x) {
  x = v_f32_shuffle_b(x, split_selector(), 0, x);
  x = exchange_groups(x);
  const float64 even = MOVE_DUAL_GROUPS(x, 0, 2, 0, 0, MkWrA(3, 3, 0, 0), x);
  const float64 odd = MOVE_DUAL_GROUPS(x, 1, 3, 0, 0, MkWrA(3, 3, 0, 0), x);
  const int64 low = v_i32_shr_b(rounded_to_bfloat16(even), (int64)16) & 0xFFFF;
  const int64 pairs = low | (rounded_to_bfloat16(odd) & (int64)0xFFFF0000);
  v_bf16_st_tnsr_partial(at, to, *((bfloat128*)&pairs), 63, 0);
}
#define STORE_VALUES(at, to, x) store_values(at, to, x)

#endif
