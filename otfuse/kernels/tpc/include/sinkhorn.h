// Sinkhorn-Knopp, an item a member: values, weights and form to plan, potentials, marginal error, rounds run.
//
// A lane cannot be read by the scalar unit, so an item that has converged is not left but frozen: its scalings and its
// kernel matrix keep their bits.

#include "lanes.h"
#include "numeric.h"
#include "values.h"
#include "item.h"
#include "problem.h"
#include "registers.h"

#ifdef HISTORY
#include "history.h"
#define OUTPUTS tensor plan, tensor f, tensor g, tensor report, tensor history
#define OPTIONS float scale, int num_iters, float tol, int kept
#define RECORD(x, t) record((x).s, (x).p, history, (x).item, (t) - num_iters + kept, (x).form)
#else
#define OUTPUTS tensor plan, tensor f, tensor g, tensor report
#define OPTIONS float scale, int num_iters, float tol
#define RECORD(x, t)
#endif

// A round, rows then columns, where `active` is positive; K v is known before and after.
static inline void one_round(shape s, vectors p, lifts l, float64 active) {
  for (int k = 0; k < s.row_blocks; k++) {
    const float64 u = divided(v_f32_mul_b(local[p.a + k], l.up), local[p.rows + k]);
    local[p.u + k] = where_positive(active, u, local[p.u + k]);
  }
  for (int k = 0; k < s.column_blocks; k++) {
    const float64 v = divided(v_f32_mul_b(local[p.b + k], l.up), times_rows(s, k, p.u));
    local[p.v + k] = where_positive(active, v, local[p.v + k]);
  }
  update_sums(s, p);
}

static inline float64 row_error(shape s, vectors p, lifts l) {
  float64 error = 0.0f;
  for (int k = 0; k < s.row_blocks; k++) {
    const float64 rows = v_f32_mul_b(local[p.rows + k], l.back);
    error = error + v_f32_abs_b(v_f32_mul_b(local[p.u + k], rows) - local[p.a + k]);
  }
  return over_all_lanes(s.by, SUM, error);
}

static inline void store_plan(shape s, vectors p, lifts l, range r, tensor plan, int item) {
  for (int block = 0; block < s.row_blocks; block++) {
    const places t = row_places(s, block);
    const four u = spread_rows(v_f32_mul_b(local[p.u + block], l.back));
    for (int c = 0; c < s.column_tiles; c++) {
      const float64 v = spread_column(local[p.v + (c >> 4)], c);
      four x;
#define TILE(k) x.v##k = v_f32_mac_b(v_f32_mul_b(local[s.matrix + c * s.row_tiles + t.t##k], u.v##k), v, r.poison);
      FOUR_TIMES(TILE);
#undef TILE
      store_tiles(s, plan, item, block, c, x);
    }
  }
}

// epsilon (log w + what is folded), -inf where there is no weight.
static inline float64 potential(float64 weight, float64 scaling, float64 folded, range r, float64 epsilon) {
  const float64 value = v_f32_mac_b(folded + logarithm(scaling), epsilon, r.poison);
  return where_positive(weight, value, r.poison + minus_infinity());
}

static inline void store_potentials(shape s, vectors p, range r, tensor f, tensor g, int item) {
  const float64 epsilon = quotient((float64)1.0f, r.size);
  for (int k = 0; k < s.row_blocks; k++)
    store_rows(f, k, item, potential(local[p.a + k], local[p.u + k], local[p.log_u + k], r, epsilon) - r.shift);
  for (int k = 0; k < s.column_blocks; k++)
    store_columns(s, g, k, item, potential(local[p.b + k], local[p.v + k], local[p.log_v + k], r, epsilon));
}

// An item in local memory.
typedef struct {
  shape s;
  vectors p;
  range r;
  int item, form;
  float64 rounds;  // that were run
} slot;

// The item before its first round; an ABSORBED one after it.
static inline slot start(slot x, tensor values, tensor a, tensor b, tensor forms, int item, float scale) {
  x.item = item;
  load_weights(x.s, x.p, a, b, item);
  x.r = range_of(x.s, x.p, values, item, scale, 0, 1);
  x.form = (int)scalar_of(forms, 0, item);
  clear_folds(x.s, x.p);
  start_rows(x.s, x.p);
  start_columns(x.s, x.p);
  if (x.form > 0) {
    log_round(x.s, x.p, x.r, values, item, (float64)1.0f);
    x.rounds = 1.0f;
  } else {
    fill_scaled(x.s, x.r);
    x.rounds = 0.0f;
  }
  update_sums(x.s, x.p);
  return x;
}

static inline void finish(slot x, tensor plan, tensor f, tensor g, tensor report) {
  const float64 error = row_error(x.s, x.p, lifts_of(x.form)) + x.r.poison, zero = 0.0f;
  store_plan(x.s, x.p, lifts_of(x.form), x.r, plan, x.item);
  store_potentials(x.s, x.p, x.r, f, g, x.item);
  // None without mass; all of them where something is not finite.
  const float64 rounds = where_positive(x.r.mass, x.rounds, v_f32_sel_geq_f32_b(x.r.poison, zero, zero, x.rounds));
  v_f32_st_tnsr(place(0, x.item, 0), report, v_f32_sel_grt_u32_b((uint64)1, V_LANE_ID_32, error, rounds));
}

#ifdef HISTORY
#define KEEP(x, state) \
  give_back((x).p, state); \
  RECORD(x, t);
#else
#define KEEP(x, state)
#endif

// All rounds of an item that fits registers.
#define ROUNDS(freezing) \
  for (int t = 0; t < num_iters; t++) { \
    state = rows_of_round(state, freezing); \
    state = columns_of_round(state, column_sums(x.s, state.u), freezing); \
    KEEP(x, state) \
    state.rows = row_sums(x.s, state.v); \
    if (freezing) state = freeze(x.s, state, x.r.poison, tol); \
  }

// Of two. The second is half a step behind: a division is a chain of few operations, sums are many that do not wait,
// and so one item divides while the other adds up. Its u is ready before a round begins.
#define ROUNDS_OF_TWO(freezing) \
  float64 next_u = rows_of_round(other, freezing).u; \
  for (int t = 0; t < num_iters; t++) { \
    other.u = next_u; \
    const float64 other_columns = column_sums(y.s, other.u); \
    state = rows_of_round(state, freezing); \
    const float64 columns = column_sums(x.s, state.u); \
    other = columns_of_round(other, other_columns, freezing); \
    KEEP(y, other) \
    other.rows = row_sums(y.s, other.v); \
    state = columns_of_round(state, columns, freezing); \
    KEEP(x, state) \
    state.rows = row_sums(x.s, state.v); \
    if (freezing) { \
      other = freeze(y.s, other, y.r.poison, tol); \
      state = freeze(x.s, state, x.r.poison, tol); \
    } \
    next_u = rows_of_round(other, freezing).u; \
  }

void main(tensor values, tensor a, tensor b, tensor forms, OUTPUTS, OPTIONS) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  slot x, y;
  x.s = shape_of(values, 0);
  x.p = lay_out(x.s);
  y.s = shape_of(values, x.p.next);
  y.p = lay_out(y.s);
  const int in_registers = fits_registers(x.s);
  for (int item = first[0]; item < last[0]; item++) {
    x = start(x, values, a, b, forms, item, scale);
    if (in_registers && x.form == 0) {
      registers state = take(x.p);
      int pair = item + 1 < last[0];
      if (pair) {
        y = start(y, values, a, b, forms, item + 1, scale);
        pair = y.form == 0;
      }
      if (pair) {
        registers other = take(y.p);
        if (tol > 0.0f) {
          ROUNDS_OF_TWO(1)
        } else {
          ROUNDS_OF_TWO(0)
        }
        give_result(y.p, other, y.r.mass);
        y.rounds = other.count;
        finish(y, plan, f, g, report);
        item++;
      } else if (tol > 0.0f) {
        ROUNDS(1)
      } else {
        ROUNDS(0)
      }
      give_result(x.p, state, x.r.mass);
      x.rounds = state.count;
    } else {
      float64 active = 1.0f;
      if (x.form > 0) {
        RECORD(x, 0);
      }
      int next_fold = x.form > 0 ? 1 + x.form : num_iters;
      for (int t = x.form > 0 ? 1 : 0; t < num_iters; t++) {
        if (t > 0 && tol > 0.0f) {
          const float64 error = row_error(x.s, x.p, lifts_of(x.form)) + x.r.poison;
          active = v_f32_sel_less_f32_b(error, (float64)tol, (float64)0.0f, (float64)1.0f);
        }
        if (x.form == 1) {
          log_round(x.s, x.p, x.r, values, item, active);
          update_sums(x.s, x.p);
        } else {
          if (t == next_fold) {
            fold_rows(x.s, x.p, active);
            fold_columns(x.s, x.p, active);
            fill(x.s, x.p, x.r, values, item, active);
            update_sums(x.s, x.p);
            next_fold += x.form;
          }
          one_round(x.s, x.p, lifts_of(x.form), active);
        }
        x.rounds = x.rounds + active;
        RECORD(x, t);
      }
    }
    finish(x, plan, f, g, report);
  }
}
