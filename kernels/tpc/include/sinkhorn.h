// Sinkhorn-Knopp, an item a member: values, weights and form to plan, potentials, marginal error, rounds run.
//
// A lane cannot be read by the scalar unit, so an item that has converged is not left but frozen: its scalings and its
// kernel matrix keep their bits.

#include "lanes.h"
#include "numeric.h"
#include "values.h"
#include "item.h"
#include "problem.h"

#ifdef HISTORY
#include "history.h"
#define OUTPUTS tensor plan, tensor f, tensor g, tensor report, tensor history
#define OPTIONS float scale, int num_iters, float tol, int kept
#define RECORD(t, form) record(s, p, history, item, (t) - num_iters + kept, form)
#else
#define OUTPUTS tensor plan, tensor f, tensor g, tensor report
#define OPTIONS float scale, int num_iters, float tol
#define RECORD(t, form)
#endif

// A round, rows then columns, where `active` is positive; K v is known before and after.
static void one_round(shape s, vectors p, float64 active) {
  for (int k = 0; k < s.row_blocks; k++)
    local[p.u + k] = where_positive(active, divided(local[p.a + k], local[p.rows + k]), local[p.u + k]);
  for (int k = 0; k < s.column_blocks; k++)
    local[p.v + k] = where_positive(active, divided(local[p.b + k], times_rows(s, k, p.u)), local[p.v + k]);
  update_sums(s, p);
}

static float64 row_error(shape s, vectors p) {
  float64 error = 0.0f;
  for (int k = 0; k < s.row_blocks; k++)
    error = error + v_f32_abs_b(v_f32_mul_b(local[p.u + k], local[p.rows + k]) - local[p.a + k]);
  return over_all_lanes(s.by, SUM, error);
}

static void store_plan(shape s, vectors p, range r, tensor plan, int item) {
  for (int block = 0; block < s.row_blocks; block++) {
    const places t = row_places(s, block);
    const four u = spread_rows(local[p.u + block]);
    for (int c = 0; c < s.column_tiles; c++) {
      const float64 v = spread_column(local[p.v + (c >> 4)], c);
      four x;
#define TILE(k) x.v##k = v_f32_mac_b(v_f32_mul_b(local[s.matrix + c * s.row_tiles + t.t##k], u.v##k), v, r.poison);
      TILE(0) TILE(1) TILE(2) TILE(3)
#undef TILE
      store_tiles(s, plan, item, block, c, x);
    }
  }
}

// epsilon (log w + what is folded), -inf where there is no weight.
static float64 potential(float64 weight, float64 scaling, float64 folded, range r, float64 epsilon) {
  const float64 value = v_f32_mac_b(folded + logarithm(scaling), epsilon, r.poison);
  return where_positive(weight, value, r.poison - INFINITE);
}

static void store_potentials(shape s, vectors p, range r, tensor f, tensor g, int item) {
  const float64 epsilon = quotient((float64)1.0f, r.size);
  for (int k = 0; k < s.row_blocks; k++)
    store_rows(f, k, item, potential(local[p.a + k], local[p.u + k], local[p.log_u + k], r, epsilon) - r.shift);
  for (int k = 0; k < s.column_blocks; k++)
    store_columns(s, g, k, item, potential(local[p.b + k], local[p.v + k], local[p.log_v + k], r, epsilon));
}

void main(tensor values, tensor a, tensor b, tensor forms, OUTPUTS, OPTIONS) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  shape s = shape_of(values, 0);
  const vectors p = lay_out(&s);
  for (int item = first[0]; item < last[0]; item++) {
    load_weights(s, p, a, b, item);
    const range r = range_of(s, p, values, item, scale, 0);
    const int form = (int)scalar_of(forms, 0, item);
    const float64 one = 1.0f, zero = 0.0f;
    float64 active = one, rounds = zero, error = zero;
    int done = 0;
    if (form > 0) {
      log_round(s, p, r, values, item);
      rounds = one;
      done = 1;
      RECORD(0, form);
    } else {
      clear_folds(s, p);
      fill(s, p, r, values, item, one);
      start_columns(s, p);
    }
    update_sums(s, p);
    for (int t = done; t < num_iters; t++) {
      if (t > 0 && tol > 0.0f) {
        error = row_error(s, p) + r.poison;
        active = v_f32_sel_less_f32_b(error, (float64)tol, zero, one);
      }
      if (form > 0 && t > 1 && (t - 1) % form == 0) {
        fold_rows(s, p, active);
        fold_columns(s, p, active);
        fill(s, p, r, values, item, active);
        update_sums(s, p);
      }
      one_round(s, p, active);
      rounds = rounds + active;
      RECORD(t, form);
    }
    error = row_error(s, p) + r.poison;
    store_plan(s, p, r, plan, item);
    store_potentials(s, p, r, f, g, item);
    // None without mass; all of them where something is not finite.
    rounds = where_positive(r.mass, rounds, v_f32_sel_geq_f32_b(r.poison, zero, zero, rounds));
    v_f32_st_tnsr(place(0, item, 0), report, v_f32_sel_grt_u32_b((uint64)1, V_LANE_ID_32, error, rounds));
  }
}
