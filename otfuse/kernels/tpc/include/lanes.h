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
static inline uint64 source_lane(uint64 lane) { return (lane & 7) | (((lane >> 3) & 1) << 5); }

// Selectors that take the partner at distance `bit` within a dual group: all lanes, those whose bit is clear, set.
static inline uchar256 partner(uint64 bit) { return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | ENABLE); }
static inline uchar256 partner_if_clear(uint64 bit, int shift) {
  return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | ((((V_LANE_ID_32 >> shift) & 1) ^ 1) << 7));
}
static inline uchar256 partner_if_set(uint64 bit, int shift) {
  return (uchar256)(source_lane(V_LANE_ID_32 ^ bit) | (((V_LANE_ID_32 >> shift) & 1) << 7));
}

// The four bits of a lane's place in its dual group, in reverse order.
static inline uint64 reversed_lane() {
  const uint64 lane = V_LANE_ID_32;
  return ((lane & 1) << 3) | ((lane & 2) << 1) | ((lane >> 1) & 2) | ((lane >> 3) & 1);
}
static inline float64 reverse_lanes(float64 x) {
  return v_f32_shuffle_b(x, (uchar256)(source_lane(reversed_lane()) | ENABLE), 0, x);
}

// How lanes are put together: added up, or the larger one kept. A constant wherever it is used.
#define SUM 0
#define LARGEST 1
static inline float64 joined(int how, float64 x, float64 y) {
  return how == SUM ? v_f32_add_b(x, y) : v_f32_max_b(x, y);
}

// Two vectors become one, each reduced by half: a fills the dual groups, groups or lanes named first, b the others.
static inline float64 fold_32(int how, float64 a, float64 b) {
  return joined(how, MOVE_DUAL_GROUPS(a, 2, 3, 0, 0, MkWrA(3, 3, 0, 0), b),
                MOVE_DUAL_GROUPS(b, 0, 0, 0, 1, MkWrA(0, 0, 3, 3), a));
}
static inline float64 fold_16(int how, float64 a, float64 b) {
  return joined(how, MOVE_DUAL_GROUPS(a, 1, 0, 3, 0, MkWrA(3, 0, 3, 0), b),
                MOVE_DUAL_GROUPS(b, 0, 0, 0, 2, MkWrA(0, 3, 0, 3), a));
}
static inline float64 fold_8(int how, float64 a, float64 b) {
  return joined(how, v_f32_mov_group_b(a, EVERY_LANE, SW_GROUP0_EN | EVERY_DUAL_GROUP, b),
                v_f32_mov_group_b(b, EVERY_LANE, SW_GROUP1_EN | EVERY_DUAL_GROUP, a));
}
static inline float64 fold_lanes(int how, float64 a, float64 b, uchar256 if_clear, uchar256 if_set) {
  return joined(how, v_f32_shuffle_b(a, if_clear, 0, b), v_f32_shuffle_b(b, if_set, 0, a));
}

// The selectors of the folds, made once.
typedef struct {
  uchar256 all4, clear4, set4, all2, clear2, set2, all1, clear1, set1;
} selectors;
static inline selectors make_selectors() {
  selectors by;
  by.all4 = partner(4);
  by.clear4 = partner_if_clear(4, 2);
  by.set4 = partner_if_set(4, 2);
  by.all2 = partner(2);
  by.clear2 = partner_if_clear(2, 1);
  by.set2 = partner_if_set(2, 1);
  by.all1 = partner(1);
  by.clear1 = partner_if_clear(1, 0);
  by.set1 = partner_if_set(1, 0);
  return by;
}

// Four vectors, one for each row tile, to one: dual group k holds vector k reduced over the dual groups.
static inline float64 fold_rows_of(int how, float64 s0, float64 s1, float64 s2, float64 s3) {
  return fold_16(how, fold_32(how, s0, s2), fold_32(how, s1, s3));
}

// Four vectors to one, reduced within the dual groups down to four lanes; four such vectors to one: their columns.
static inline float64 fold_quad(selectors by, int how, float64 s0, float64 s1, float64 s2, float64 s3) {
  return fold_lanes(how, fold_8(how, s0, s1), fold_8(how, s2, s3), by.clear4, by.set4);
}
static inline float64 fold_quads(selectors by, int how, float64 z0, float64 z1, float64 z2, float64 z3) {
  const float64 y0 = fold_lanes(how, z0, z1, by.clear2, by.set2), y1 = fold_lanes(how, z2, z3, by.clear2, by.set2);
  return fold_lanes(how, y0, y1, by.clear1, by.set1);
}

// Every lane gets what its dual group comes to over a bit of the lane's number, or all 64.
static inline float64 over_groups(int how, float64 x) {
  return joined(how, x, v_f32_mov_group_b(x, EVERY_LANE, BOTH_GROUPS | EVERY_DUAL_GROUP, x));
}
static inline float64 over_partners(int how, float64 x, uchar256 all) {
  return joined(how, x, v_f32_shuffle_b(x, all, 0, x));
}
static inline float64 over_all_lanes(selectors by, int how, float64 x) {
  x = joined(how, x, MOVE_DUAL_GROUPS(x, 2, 3, 0, 1, MkWrA(3, 3, 3, 3), x));
  x = joined(how, x, MOVE_DUAL_GROUPS(x, 1, 0, 3, 2, MkWrA(3, 3, 3, 3), x));
  x = over_groups(how, x);
  x = over_partners(how, x, by.all4);
  x = over_partners(how, x, by.all2);
  return over_partners(how, x, by.all1);
}

// For macros that stand for the members of a struct of four.
#define FOUR_TIMES(what) what(0) what(1) what(2) what(3)

// A 4 x 4 transposition of dual groups, its own inverse: dual group d of vector k becomes dual group k of vector d.
typedef struct {
  float64 v0, v1, v2, v3;
} four;
static inline four transposed(four x) {
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
