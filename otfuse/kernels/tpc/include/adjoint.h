// What both backward kernels share: the state that the forward left, and what the loss hands in and takes out.

#include "lanes.h"
#include "numeric.h"
#include "values.h"
#include "item.h"
#include "problem.h"
#include "history.h"

// Adjoints of log u and log v in local memory, behind the vectors of the forward.
typedef struct {
  int du, dv;  // adjoints
  int wu, wv;  // what a half round sends through K
  int next;    // the first vector that is free behind them
} adjoints;

static inline adjoints lay_out_adjoints(shape s, vectors p) {
  adjoints d;
  d.du = p.next;
  d.wu = d.du + s.row_blocks;
  d.dv = d.wu + s.row_blocks;
  d.wv = d.dv + s.column_blocks;
  d.next = d.wv + s.column_blocks;
  return d;
}

// The plan's tiles of a block of rows in column tile c; K, u and v are those of the last round.
static inline four plan_tiles(shape s, vectors p, lifts l, int block, int c) {
  const places t = row_places(s, block);
  const four u = spread_rows(v_f32_mul_b(local[p.u + block], l.back));
  const float64 v = spread_column(local[p.v + (c >> 4)], c);
  four x;
#define TILE(k) x.v##k = v_f32_mul_b(v_f32_mul_b(local[s.matrix + c * s.row_tiles + t.t##k], u.v##k), v);
  FOUR_TIMES(TILE);
#undef TILE
  return x;
}

// grad_plan times plan, tile by tile: zero where the plan is, whatever the gradient says there.
static inline four weighed_tiles(shape s, vectors p, lifts l, tensor grad_plan, int item, int block, int c) {
  const four plan = plan_tiles(s, p, l, block, c);
  const float64 one = 1.0f;
  four x = load_tiles(s, grad_plan, item, block, c, one, one, one, one);
#define TILE(k) x.v##k = where_positive(plan.v##k, v_f32_mul_b(x.v##k, plan.v##k), (float64)0.0f);
  FOUR_TIMES(TILE);
#undef TILE
  return x;
}

static inline float64 sum_of_tiles(shape s, vectors p, lifts l, tensor grad_plan, int item, int c) {
  float64 sum = 0.0f;
  if (c < s.column_tiles) {
    for (int block = 0; block < s.row_blocks; block++) {
      const four x = weighed_tiles(s, p, l, grad_plan, item, block, c);
      sum = sum + ((x.v0 + x.v1) + (x.v2 + x.v3));
    }
  }
  return sum;
}

// du = (G P) 1 + epsilon df and dv = (G P)' 1 + epsilon dg, where there is any weight.
static inline void weigh(shape s, vectors p, adjoints d, lifts l, range r, tensor grad_plan, tensor grad_f,
                         tensor grad_g, int item) {
  const float64 epsilon = quotient((float64)1.0f, r.size);
  for (int block = 0; block < s.row_blocks; block++) {
    float64 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    for (int c = 0; c < s.column_tiles; c++) {
      const four x = weighed_tiles(s, p, l, grad_plan, item, block, c);
      s0 = s0 + x.v0;
      s1 = s1 + x.v1;
      s2 = s2 + x.v2;
      s3 = s3 + x.v3;
    }
    const float64 sums = v_f32_mac_b(load_rows(grad_f, block, item), epsilon, fold_rows_of(SUM, s0, s1, s2, s3));
    local[d.du + block] = where_positive(local[p.a + block], sums, (float64)0.0f);
  }
  for (int block = 0; block < s.column_blocks; block++) {
    float64 z[4];
    const int tiles = tiles_in_block(s, block);
#define TILES(i) sum_of_tiles(s, p, l, grad_plan, item, 16 * block + i)
#define QUAD(quad) \
  z[quad] = 0.0f; \
  if (4 * quad < tiles) \
    z[quad] = fold_quad(s.by, SUM, TILES(4 * quad), TILES(4 * quad + 1), TILES(4 * quad + 2), TILES(4 * quad + 3));
    FOUR_TIMES(QUAD);
#undef QUAD
#undef TILES
    const float64 folded = fold_quads(s.by, SUM, z[0], z[1], z[2], z[3]);
    const float64 sums = v_f32_mac_b(load_columns(s, grad_g, block, item), epsilon, folded);
    local[d.dv + block] = where_positive(local[p.b + block], sums, (float64)0.0f);
  }
}

// x / weight where there is any.
static inline float64 share_of(float64 x, float64 weight) {
  return where_positive(weight, quotient(x, weight), (float64)0.0f);
}
