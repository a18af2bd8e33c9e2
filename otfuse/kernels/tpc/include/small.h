// Sinkhorn-Knopp for matrices up to 8 x 8, a lane an item: 64 items a member, and no lane ever moves.
//
// Tensors have the items last: values [N, M, B], weights [N, B] and [M, B]. Every choice is a lane's own: ABSORBED
// lanes fold where the others keep their bits, lanes that have converged are frozen.
//
// Letters: N rows, M columns of an item.

#include "lanes.h"
#include "numeric.h"
#include "values.h"

#define MOST_SIDE 8

__local__ float64 K[MOST_SIDE * MOST_SIDE];  // entry (i, j) at i M + j
__local__ float64 a[MOST_SIDE], u[MOST_SIDE], log_u[MOST_SIDE], rows[MOST_SIDE];
__local__ float64 b[MOST_SIDE], v[MOST_SIDE], log_v[MOST_SIDE];

typedef struct {
  int N, M, lane;      // lane: the item of lane 0
  float64 sign, size;  // of scale
  float64 shift, poison, mass;
  int lift;  // of K: LIFT where it may be folded, otherwise zero
  lifts by;
} batch;

static inline int5 place(int lane, int i1, int i2) {
  int5 at = {lane, i1, i2, 0, 0};
  return at;
}

// sign * S of an entry, `otherwise` at padding.
static inline float64 entry(batch s, tensor values, int i, int j, float64 otherwise) {
  const float64 x = v_f32_mul_b(load_values(place(s.lane, j, i), values), s.sign);
  return where_positive(v_f32_min_b(a[i], b[j]), x, otherwise);
}

// Its log K, with what is folded in.
static inline float64 log_entry(batch s, tensor values, int i, int j) {
  const float64 x = entry(s, values, i, j, minus_infinity());
  return v_f32_mac_b(x - s.shift, s.size, log_u[i]) + log_v[j];
}

static inline void fill(batch s, tensor values, float64 renewed) {
  for (int i = 0; i < s.N; i++)
    for (int j = 0; j < s.M; j++)
      K[i * s.M + j] = where_positive(renewed, exponential(log_entry(s, values, i, j), s.lift), K[i * s.M + j]);
}

static inline float64 divided(float64 marginal, float64 sums) {
  return where_positive(marginal, quotient(marginal, sums), (float64)0.0f);
}

// Four sums at a time, so that no addition waits for the one before. Those beyond the last are the last again.
static inline void row_sums(batch s) {
  for (int i = 0; i < s.N; i += 4) {
    const int i1 = s_i32_min(i + 1, s.N - 1), i2 = s_i32_min(i + 2, s.N - 1), i3 = s_i32_min(i + 3, s.N - 1);
    float64 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    for (int j = 0; j < s.M; j++) {
      const float64 w = v[j];
      s0 = v_f32_mac_b(K[i * s.M + j], w, s0);
      s1 = v_f32_mac_b(K[i1 * s.M + j], w, s1);
      s2 = v_f32_mac_b(K[i2 * s.M + j], w, s2);
      s3 = v_f32_mac_b(K[i3 * s.M + j], w, s3);
    }
    rows[i] = s0;
    rows[i1] = s1;
    rows[i2] = s2;
    rows[i3] = s3;
  }
}

static inline void update_rows(batch s, float64 active) {
  for (int i = 0; i < s.N; i++) u[i] = where_positive(active, divided(v_f32_mul_b(a[i], s.by.up), rows[i]), u[i]);
}

static inline void update_columns(batch s, float64 active) {
  for (int j = 0; j < s.M; j += 4) {
    const int j1 = s_i32_min(j + 1, s.M - 1), j2 = s_i32_min(j + 2, s.M - 1), j3 = s_i32_min(j + 3, s.M - 1);
    float64 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
    for (int i = 0; i < s.N; i++) {
      const float64 w = u[i];
      s0 = v_f32_mac_b(K[i * s.M + j], w, s0);
      s1 = v_f32_mac_b(K[i * s.M + j1], w, s1);
      s2 = v_f32_mac_b(K[i * s.M + j2], w, s2);
      s3 = v_f32_mac_b(K[i * s.M + j3], w, s3);
    }
    v[j] = where_positive(active, divided(v_f32_mul_b(b[j], s.by.up), s0), v[j]);
    v[j1] = where_positive(active, divided(v_f32_mul_b(b[j1], s.by.up), s1), v[j1]);
    v[j2] = where_positive(active, divided(v_f32_mul_b(b[j2], s.by.up), s2), v[j2]);
    v[j3] = where_positive(active, divided(v_f32_mul_b(b[j3], s.by.up), s3), v[j3]);
  }
}

static inline float64 row_error(batch s) {
  float64 error = s.poison;
  for (int i = 0; i < s.N; i++) error = error + v_f32_abs_b(v_f32_mul_b(u[i], v_f32_mul_b(rows[i], s.by.back)) - a[i]);
  return error;
}

// Scalings into what is folded, where `folding` is positive.
static inline void fold_rows(batch s, float64 folding) {
  for (int i = 0; i < s.N; i++) {
    const float64 folded = v_f32_min_b(folding, a[i]);
    log_u[i] = where_positive(folded, log_u[i] + logarithm(u[i]), log_u[i]);
    u[i] = where_positive(folded, (float64)1.0f, u[i]);
  }
}
static inline void fold_columns(batch s, float64 folding) {
  for (int j = 0; j < s.M; j++) {
    const float64 folded = v_f32_min_b(folding, b[j]);
    log_v[j] = where_positive(folded, log_v[j] + logarithm(v[j]), log_v[j]);
    v[j] = where_positive(folded, (float64)1.0f, v[j]);
  }
}

// What makes the largest entry of every row, of every column, one.
static inline void lift_rows(batch s, tensor values, float64 lifting) {
  for (int i = 0; i < s.N; i++) {
    float64 most = LEAST;
    for (int j = 0; j < s.M; j++) most = v_f32_max_b(most, log_entry(s, values, i, j));
    log_u[i] = where_positive(v_f32_min_b(lifting, a[i]), log_u[i] - most, log_u[i]);
  }
}
static inline void lift_columns(batch s, tensor values, float64 lifting) {
  for (int j = 0; j < s.M; j++) {
    float64 most = LEAST;
    for (int i = 0; i < s.N; i++) most = v_f32_max_b(most, log_entry(s, values, i, j));
    log_v[j] = where_positive(v_f32_min_b(lifting, b[j]), log_v[j] - most, log_v[j]);
  }
}

static inline batch load_batch(tensor values, tensor weights_a, tensor weights_b, int lane, float scale, int folds) {
  batch s;
  s.lift = folds > 0 ? LIFT : 0;
  s.by = lifts_of(folds);
  s.N = get_dim_size(values, 2);
  s.M = get_dim_size(values, 1);
  s.lane = lane;
  s.sign = scale > 0.0f ? 1.0f : -1.0f;
  s.size = scale > 0.0f ? scale : -scale;
  s.shift = LEAST;
  s.poison = 0.0f;
  s.mass = 0.0f;
  for (int i = 0; i < s.N; i++) {
    a[i] = v_f32_ld_tnsr_b(place(lane, i, 0), weights_a);
    log_u[i] = 0.0f;
    s.mass = v_f32_max_b(s.mass, a[i]);
    s.poison = v_f32_mac_b(a[i], (float64)0.0f, s.poison);
  }
  for (int j = 0; j < s.M; j++) {
    b[j] = v_f32_ld_tnsr_b(place(lane, j, 0), weights_b);
    log_v[j] = 0.0f;
    v[j] = where_positive(b[j], (float64)1.0f, (float64)0.0f);
    s.poison = v_f32_mac_b(b[j], (float64)0.0f, s.poison);
  }
  for (int i = 0; i < s.N; i++)
    for (int j = 0; j < s.M; j++) {
      const float64 x = entry(s, values, i, j, (float64)LEAST);
      s.shift = v_f32_max_b(s.shift, x);
      s.poison = v_f32_mac_b(x, (float64)0.0f, s.poison);
    }
  return s;
}

typedef struct {
  float64 low, high;
} ends;
static inline ends widened(ends e, float64 weight) {
  const float64 logarithms = logarithm(weight);
  e.low = where_positive(weight, v_f32_min_b(e.low, logarithms), e.low);
  e.high = where_positive(weight, v_f32_max_b(e.high, logarithms), e.high);
  return e;
}

// One where an item's own range asks for the ABSORBED form, as in survey.h.
static inline float64 is_absorbed(batch s, tensor values) {
  const float64 zero = 0.0f, one = 1.0f;
  float64 lowest = -LEAST;
  for (int i = 0; i < s.N; i++)
    for (int j = 0; j < s.M; j++) lowest = v_f32_min_b(lowest, entry(s, values, i, j, (float64)-LEAST));
  ends of_a, of_b;
  of_a.low = of_b.low = -LEAST;
  of_a.high = of_b.high = LEAST;
  for (int i = 0; i < s.N; i++) of_a = widened(of_a, a[i]);
  for (int j = 0; j < s.M; j++) of_b = widened(of_b, b[j]);
  const float64 spread = v_f32_mul_b(s.shift - lowest, s.size);
  const float64 with_weights = spread + (of_a.high - of_a.low) + (of_b.high - of_b.low);
  float64 absorbed = v_f32_sel_grt_f32_b(with_weights, (float64)MOST_SPREAD_WITH_WEIGHTS, one, zero);
  absorbed = v_f32_sel_grt_f32_b(spread, (float64)MOST_SPREAD, one, absorbed);
  absorbed = where_positive(s.mass, absorbed, zero);
  return v_f32_sel_geq_f32_b(s.poison, zero, absorbed, zero);
}

static inline void store_potential(batch s, tensor to, int i, float64 weight, float64 scaling, float64 folded,
                                   float64 shift) {
  const float64 epsilon = quotient((float64)1.0f, s.size);
  const float64 value = v_f32_mac_b(folded + logarithm(scaling), epsilon, s.poison) - shift;
  v_f32_st_tnsr(place(s.lane, i, 0), to, where_positive(weight, value, s.poison + minus_infinity()));
}

void main(tensor values, tensor weights_a, tensor weights_b, tensor plan, tensor f, tensor g, tensor report,
          float scale, int num_iters, float tol, int fold_every) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  const float64 one = 1.0f, zero = 0.0f;
  for (int member = first[0]; member < last[0]; member++) {
    const batch s = load_batch(values, weights_a, weights_b, 64 * member, scale, fold_every);
    float64 absorbed = zero, active = one, rounds = one, error = zero;
    if (fold_every > 0) {
      absorbed = is_absorbed(s, values);
      lift_rows(s, values, absorbed);
    }
    // The first round, in the log domain for ABSORBED lanes.
    fill(s, values, one);
    row_sums(s);
    for (int i = 0; i < s.N; i++) u[i] = divided(v_f32_mul_b(a[i], s.by.up), rows[i]);
    if (fold_every > 0) {
      fold_rows(s, absorbed);
      lift_columns(s, values, absorbed);
      fill(s, values, absorbed);
    }
    update_columns(s, one);
    int next_fold = fold_every > 1 ? 1 : num_iters;
    for (int t = 1; t < num_iters; t++) {
      if (t == next_fold) {
        const float64 folding = v_f32_min_b(absorbed, active);
        fold_rows(s, folding);
        fold_columns(s, folding);
        fill(s, values, folding);
        next_fold += fold_every;
      }
      if (fold_every != 1 || tol > 0.0f) row_sums(s);
      if (tol > 0.0f) {
        error = row_error(s);
        active = where_positive(active, v_f32_sel_less_f32_b(error, (float64)tol, zero, one), zero);
      }
      const float64 folding = v_f32_min_b(absorbed, active);
      if (fold_every == 1) {  // as the first: weights may be as small as they can be
        fold_columns(s, folding);
        lift_rows(s, values, folding);
        fill(s, values, folding);
        row_sums(s);
      }
      update_rows(s, active);
      if (fold_every == 1) {
        fold_rows(s, folding);
        lift_columns(s, values, folding);
        fill(s, values, folding);
      }
      update_columns(s, active);
      rounds = rounds + active;
    }
    row_sums(s);
    for (int i = 0; i < s.N; i++) {
      const float64 scaling = v_f32_mul_b(u[i], s.by.back);
      for (int j = 0; j < s.M; j++)
        STORE_VALUES(place(s.lane, j, i), plan, v_f32_mac_b(v_f32_mul_b(K[i * s.M + j], scaling), v[j], s.poison));
      store_potential(s, f, i, a[i], u[i], log_u[i], s.shift);
    }
    for (int j = 0; j < s.M; j++) store_potential(s, g, j, b[j], v[j], log_v[j], zero);
    rounds = where_positive(s.mass, rounds, v_f32_sel_geq_f32_b(s.poison, zero, zero, rounds));
    v_f32_st_tnsr(place(s.lane, 0, 0), report, row_error(s));
    v_f32_st_tnsr(place(s.lane, 1, 0), report, rounds);
  }
}
