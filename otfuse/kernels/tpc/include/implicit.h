// The gradient of the converged plan (docs/gradients.md, Eqs. 5 to 7): conjugate gradients on what is left for the
// columns once the rows are eliminated, preconditioned by the column sums.
//
// A converged solve is frozen: a step of zero leaves its vectors as they are. The matrix in local memory is the plan.

#include "adjoint.h"

#define RIDGE (10.0f * 1.1920929e-7f)
#define ENOUGH (1.1920929e-7f * 1.1920929e-7f)  // of the first residual, squared

// Columns of local memory during the solve. Lanes at padding are zero in all of them.
typedef struct {
  int sums, solution, residual, direction, scaled;
} solve;

static inline float64 dot(shape s, int x, int y) {
  float64 sum = 0.0f;
  for (int k = 0; k < s.column_blocks; k++) sum = v_f32_mac_b(local[x + k], local[y + k], sum);
  return over_all_lanes(s.by, SUM, sum);
}

// K := the plan.
static inline void fill_plan(shape s, vectors p, lifts l) {
  for (int block = 0; block < s.row_blocks; block++)
    for (int c = 0; c < s.column_tiles; c++) keep_tiles(s, s.matrix, block, c, plan_tiles(s, p, l, block, c));
}

// The solution of (diag(c) (1 + ridge) - P' diag(1/r) P + c c') x = residual, from x = 0.
static inline void conjugate_gradients(shape s, solve q, int rows, int outer, int steps) {
  const float64 zero = 0.0f;
  float64 product, enough, low = LEAST, high = LEAST;
  for (int k = 0; k < s.column_blocks; k++) {
    const float64 sums = local[q.sums + k];
    low = v_f32_max_b(low, where_positive(sums, zero - sums, (float64)LEAST));
    high = v_f32_max_b(high, sums);
    local[q.solution + k] = zero;
    local[q.direction + k] = share_of(local[q.residual + k], local[q.sums + k]);
  }
  const float64 spread =
      quotient(zero - over_all_lanes(s.by, LARGEST, low), over_all_lanes(s.by, LARGEST, high));
  product = dot(s, q.residual, q.direction);
  // The largest entry must not hide the others: by the inverse of the smallest weight it is 1e30 times these.
  enough = v_f32_mul_b(v_f32_mul_b(product, spread), (float64)ENOUGH);
  for (int step = 0; step < steps; step++) {
    for (int k = 0; k < s.row_blocks; k++)
      local[outer + k] = share_of(times_columns(s, k, q.direction), local[rows + k]);
    const float64 lift = dot(s, q.sums, q.direction);
    for (int k = 0; k < s.column_blocks; k++) {
      const float64 lifted = v_f32_mac_b(local[q.direction + k], (float64)(1.0f + RIDGE), lift);
      const float64 scaled = v_f32_mul_b(local[q.sums + k], lifted) - times_rows(s, k, outer);
      local[q.scaled + k] = where_positive(local[q.sums + k], scaled, zero);
    }
    const float64 curvature = dot(s, q.direction, q.scaled);
    const float64 active = v_f32_min_b(product - enough, curvature);
    const float64 length = where_positive(active, quotient(product, curvature), zero);
    for (int k = 0; k < s.column_blocks; k++) {
      local[q.solution + k] = v_f32_mac_b(length, local[q.direction + k], local[q.solution + k]);
      local[q.residual + k] = v_f32_mac_b(length, local[q.scaled + k], local[q.residual + k], SW_NEG);
      local[q.scaled + k] = share_of(local[q.residual + k], local[q.sums + k]);
    }
    const float64 next = dot(s, q.residual, q.scaled);
    const float64 kept = quotient(next, product);
    for (int k = 0; k < s.column_blocks; k++)
      local[q.direction + k] = where_positive(active, v_f32_mac_b(kept, local[q.direction + k], local[q.scaled + k]),
                                              local[q.direction + k]);
    product = where_positive(active, next, zero);
  }
}

void main(tensor values, tensor a, tensor b, tensor forms, tensor report, tensor history, tensor grad_plan,
          tensor grad_f, tensor grad_g, tensor grad_values, tensor grad_a, tensor grad_b, float scale, int steps) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  const float64 always = 1.0f, zero = 0.0f;
  shape s = shape_of(values, 0);
  const vectors p = lay_out(s);
  const adjoints d = lay_out_adjoints(s, p);
  const int slot = get_dim_size(history, 1) - 1;
  solve q;
  q.sums = d.wv;
  q.solution = d.next;
  q.residual = d.dv;
  q.direction = p.v;
  q.scaled = p.log_v;
  for (int item = first[0]; item < last[0]; item++) {
    load_weights(s, p, a, b, item);
    const range r = range_of(s, p, values, item, scale, 0, 1);
    const int form = (int)scalar_of(forms, 0, item);
    const lifts l = lifts_of(form);
    restore_scalings(s, p, history, item, slot);
    if (form > 0) {
      restore_folds(s, p, history, item, slot);
      fill(s, p, r, values, item, always);
    } else {
      fill_scaled(s, r);
    }
    weigh(s, p, d, l, r, grad_plan, grad_f, grad_g, item);
    fill_plan(s, p, l);
    // Row and column sums; then the right side dv - P' (du / r).
    start_rows(s, p);
    start_columns(s, p);
    for (int k = 0; k < s.row_blocks; k++) {
      local[p.rows + k] = where_positive(local[p.a + k], times_columns(s, k, p.v), zero);
      local[d.wu + k] = share_of(local[d.du + k], local[p.rows + k]);
    }
    for (int k = 0; k < s.column_blocks; k++) {
      local[q.sums + k] = where_positive(local[p.b + k], times_rows(s, k, p.u), zero);
      const float64 right = local[d.dv + k] - times_rows(s, k, d.wu);
      local[q.residual + k] = where_positive(local[p.b + k], right, zero);
    }
    conjugate_gradients(s, q, p.rows, d.wu, steps);
    // lambda = (du - P mu) / r
    for (int k = 0; k < s.row_blocks; k++)
      local[p.u + k] = share_of(local[d.du + k] - times_columns(s, k, q.solution), local[p.rows + k]);
    for (int block = 0; block < s.row_blocks; block++) {
      const places t = row_places(s, block);
      const four lambda = spread_rows(local[p.u + block]);
      for (int c = 0; c < s.column_tiles; c++) {
        const float64 mu = spread_column(local[q.solution + (c >> 4)], c);
        four x = load_tiles(s, grad_plan, item, block, c, always, always, always, zero);
#define TILE(k) \
  { \
    const float64 plan = local[s.matrix + c * s.row_tiles + t.t##k]; \
    const float64 weighed = v_f32_mul_b(plan, x.v##k - (lambda.v##k + mu)); \
    x.v##k = v_f32_mac_b(where_positive(plan, weighed, zero), (float64)scale, r.poison); \
  }
        FOUR_TIMES(TILE);
#undef TILE
        store_tiles(s, grad_values, item, block, c, x);
      }
    }
    for (int k = 0; k < s.row_blocks; k++) store_rows(grad_a, k, item, local[p.u + k] + r.poison);
    for (int k = 0; k < s.column_blocks; k++) store_columns(s, grad_b, k, item, local[q.solution + k] + r.poison);
  }
}
