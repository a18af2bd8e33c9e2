// Moving data between the 64 lanes of a vector: 4 dual groups of 2 groups of 8 lanes.
//
// Nothing here uses a LOOKUP, which would limit local memory to 16 KB.

#define EVERY_LANE 0xFFFFFFFF
#define BOTH_GROUPS (SW_GROUP0_EN | SW_GROUP1_EN)
#define EVERY_DUAL_GROUP (SW_DUAL_GROUP0_EN | SW_DUAL_GROUP1_EN | SW_DUAL_GROUP2_EN | SW_DUAL_GROUP3_EN)

#define MOVE_DUAL_GROUPS(x, s0, s1, s2, s3, written, income) \
  v_f32_mov_dual_group_all_b(x, EVERY_LANE, s0, s1, s2, s3, written, income)

// Dual group k of x in all four.
#define SPREAD_DUAL_GROUP(x, k) MOVE_DUAL_GROUPS(x, k, k, k, k, MkWrA(3, 3, 3, 3), x)

// The selector of a shuffle: byte 4 l of lane l holds the source lane (bits 0-2), its group (bit 5), and an enable bit.
#define ENABLE 0x80
static uint64 source_lane(uint64 lane) { return (lane & 7) | (((lane >> 3) & 1) << 5); }

// Selectors that take the partner at distance `bit` within a dual group: all lanes, those whose bit is clear, set.
static uchar256 partner(uint64 bit) { return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | ENABLE); }
static uchar256 partner_if_clear(uint64 bit, int shift) {
  return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | ((((V_LANE_ID_32 >> shift) & 1) ^ 1) << 7));
}
static uchar256 partner_if_set(uint64 bit, int shift) {
  return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | (((V_LANE_ID_32 >> shift) & 1) << 7));
}

// The four bits of a lane's place in its dual group, in reverse order.
static uint64 reversed_lane() {
  const uint64 lane = V_LANE_ID_32;
  return ((lane & 1) << 3) | ((lane & 2) << 1) | ((lane >> 1) & 2) | ((lane >> 3) & 1);
}
static float64 reverse_lanes(float64 x) {
  return v_f32_shuffle_b(x, (uchar256)(source_lane(reversed_lane()) | ENABLE), 0, x);
}

#define SUM(x, y) v_f32_add_b(x, y)
#define LARGER(x, y) v_f32_max_b(x, y)

// Two vectors become one, each reduced by half: a fills the dual groups, groups or lanes named first, b the others.
#define FOLD_32(reduce, a, b)                                          \
  reduce(MOVE_DUAL_GROUPS(a, 2, 3, 0, 0, MkWrA(3, 3, 0, 0), b), \
         MOVE_DUAL_GROUPS(b, 0, 0, 0, 1, MkWrA(0, 0, 3, 3), a))
#define FOLD_16(reduce, a, b)                                          \
  reduce(MOVE_DUAL_GROUPS(a, 1, 0, 3, 0, MkWrA(3, 0, 3, 0), b), \
         MOVE_DUAL_GROUPS(b, 0, 0, 0, 2, MkWrA(0, 3, 0, 3), a))
#define FOLD_8(reduce, a, b)                                                          \
  reduce(v_f32_mov_group_b(a, EVERY_LANE, SW_GROUP0_EN | EVERY_DUAL_GROUP, b), \
         v_f32_mov_group_b(b, EVERY_LANE, SW_GROUP1_EN | EVERY_DUAL_GROUP, a))
#define FOLD_LANES(reduce, a, b, bit, shift)                          \
  reduce(v_f32_shuffle_b(a, partner_if_clear(bit, shift), 0, b), \
         v_f32_shuffle_b(b, partner_if_set(bit, shift), 0, a))

// Four vectors, one for each row tile, to one: dual group k holds vector k reduced over the dual groups.
#define FOLD_ROWS(reduce, s0, s1, s2, s3) FOLD_16(reduce, FOLD_32(reduce, s0, s2), FOLD_32(reduce, s1, s3))

// Four vectors to one, reduced within the dual groups down to four lanes: FOLD_COLUMN_QUADS does the rest.
#define FOLD_COLUMNS(reduce, s0, s1, s2, s3) \
  FOLD_LANES(reduce, FOLD_8(reduce, s0, s1), FOLD_8(reduce, s2, s3), 4, 2)
#define FOLD_COLUMN_QUADS(reduce, z0, z1, z2, z3) \
  FOLD_LANES(reduce, FOLD_LANES(reduce, z0, z1, 2, 1), FOLD_LANES(reduce, z2, z3, 2, 1), 1, 0)

// Every lane gets the sum (the largest) of all 64.
#define OVER_ALL_LANES(reduce, x)                                                                       \
  x = reduce(x, MOVE_DUAL_GROUPS(x, 2, 3, 0, 1, MkWrA(3, 3, 3, 3), x));                                 \
  x = reduce(x, MOVE_DUAL_GROUPS(x, 1, 0, 3, 2, MkWrA(3, 3, 3, 3), x));                                 \
  x = reduce(x, v_f32_mov_group_b(x, EVERY_LANE, BOTH_GROUPS | EVERY_DUAL_GROUP, x));                   \
  x = reduce(x, v_f32_shuffle_b(x, partner(4), 0, x));                                                  \
  x = reduce(x, v_f32_shuffle_b(x, partner(2), 0, x));                                                  \
  x = reduce(x, v_f32_shuffle_b(x, partner(1), 0, x));
static float64 sum_of_lanes(float64 x) {
  OVER_ALL_LANES(SUM, x)
  return x;
}
static float64 largest_lane(float64 x) {
  OVER_ALL_LANES(LARGER, x)
  return x;
}

// A 4 x 4 transposition of dual groups, its own inverse: dual group d of vector k becomes dual group k of vector d.
typedef struct {
  float64 v0, v1, v2, v3;
} four;
static four transposed(four x) {
  const float64 y0 = MOVE_DUAL_GROUPS(x.v2, 0, 0, 0, 1, MkWrA(0, 0, 3, 3), x.v0);
  const float64 y2 = MOVE_DUAL_GROUPS(x.v0, 2, 3, 0, 0, MkWrA(3, 3, 0, 0), x.v2);
  const float64 y1 = MOVE_DUAL_GROUPS(x.v3, 0, 0, 0, 1, MkWrA(0, 0, 3, 3), x.v1);
  const float64 y3 = MOVE_DUAL_GROUPS(x.v1, 2, 3, 0, 0, MkWrA(3, 3, 0, 0), x.v3);
  four y;
  y.v0 = MOVE_DUAL_GROUPS(y1, 0, 0, 0, 2, MkWrA(0, 3, 0, 3), y0);
  y.v1 = MOVE_DUAL_GROUPS(y0, 1, 0, 3, 0, MkWrA(3, 0, 3, 0), y1);
  y.v2 = MOVE_DUAL_GROUPS(y3, 0, 0, 0, 2, MkWrA(0, 3, 0, 3), y2);
  y.v3 = MOVE_DUAL_GROUPS(y2, 1, 0, 3, 0, MkWrA(3, 0, 3, 0), y3);
  return y;
}
