// What an item is before its rounds: the range of its values, its kernel matrix, and its form.
//
// SCALING (form 0): K = exp(scale (S - shift)), shift being the S of the largest entry, serves all rounds.
// ABSORBED (form k): the first round is done in the log domain, and scalings are folded into K every k rounds; where k
// is one, weights may be as small as they can be, and every round is done in the log domain.

// Where the vectors of an item lie in local memory: blocks of rows, blocks of columns.
typedef struct {
  int a, b;          // weights
  int u, v;          // scalings since the last fold
  int log_u, log_v;  // what is folded into K
  int rows;          // K v
  int next;          // the first vector that is free behind them
} vectors;

static inline vectors lay_out(shape s) {
  vectors p;
  p.a = s.next;
  p.u = p.a + s.row_blocks;
  p.log_u = p.u + s.row_blocks;
  p.rows = p.log_u + s.row_blocks;
  p.b = p.rows + s.row_blocks;
  p.v = p.b + s.column_blocks;
  p.log_v = p.v + s.column_blocks;
  p.next = p.log_v + s.column_blocks;
  return p;
}

typedef struct {
  float64 sign, size;  // of scale
  float64 shift;       // the largest of sign * S over what is not padding
  float64 poison;      // zero, or NaN if something that is not padding is not finite
  float64 mass;        // positive if there is any weight
} range;

static inline void load_weights(shape s, vectors p, tensor a, tensor b, int item) {
  for (int k = 0; k < s.row_blocks; k++) local[p.a + k] = load_rows(a, k, item);
  for (int k = 0; k < s.column_blocks; k++) local[p.b + k] = load_columns(s, b, k, item);
}

// Four tiles of a block of rows to column tile c of the matrix at `matrix`.
static inline void keep_tiles(shape s, int matrix, int block, int c, four x) {
  const int tile = matrix + c * s.row_tiles + 4 * block, tiles = s.row_tiles - 4 * block;
  local[tile] = x.v0;
  if (tiles > 1) local[tile + 1] = x.v1;
  if (tiles > 2) local[tile + 2] = x.v2;
  if (tiles > 3) local[tile + 3] = x.v3;
}

// Reads all values of an item; the other sign of them if `flip`. `keep` leaves them in the place of K, LEAST at
// padding.
static inline range range_of(shape s, vectors p, tensor values, int item, float scale, int flip, int keep) {
  range r;
  float64 largest = LEAST, poison = 0.0f, mass = 0.0f;
  r.size = scale > 0.0f ? scale : -scale;
  r.sign = (scale > 0.0f) != flip ? 1.0f : -1.0f;
  for (int block = 0; block < s.row_blocks; block++) {
    const float64 a = local[p.a + block];
    mass = v_f32_max_b(mass, a);
    poison = v_f32_mac_b(a, (float64)0.0f, poison);
    for (int c = 0; c < s.column_tiles; c++) {
      const float64 b = spread_column(local[p.b + (c >> 4)], c);
      poison = v_f32_mac_b(b, (float64)0.0f, poison);
      const four x = load_tiles(s, values, item, block, c, a, b, r.sign, (float64)LEAST);
      largest = v_f32_max_b(v_f32_max_b(v_f32_max_b(x.v0, x.v1), v_f32_max_b(x.v2, x.v3)), largest);
      poison = v_f32_mac_b(x.v0, (float64)0.0f, poison);
      poison = v_f32_mac_b(x.v1, (float64)0.0f, poison);
      poison = v_f32_mac_b(x.v2, (float64)0.0f, poison);
      poison = v_f32_mac_b(x.v3, (float64)0.0f, poison);
      if (keep) keep_tiles(s, s.matrix, block, c, x);
    }
  }
  r.shift = over_all_lanes(s.by, LARGEST, largest);
  r.poison = over_all_lanes(s.by, SUM, poison);
  r.mass = over_all_lanes(s.by, LARGEST, mass);
  return r;
}

// Four tiles of log K with what is folded in; -inf at padding.
static inline four log_tiles(shape s, vectors p, range r, tensor values, int item, int block, int c) {
  const float64 a = local[p.a + block], b = spread_column(local[p.b + (c >> 4)], c);
  four x = load_tiles(s, values, item, block, c, a, b, r.sign, minus_infinity());
  const four log_u = spread_rows(local[p.log_u + block]);
  const float64 log_v = spread_column(local[p.log_v + (c >> 4)], c);
#define TILE(k) x.v##k = v_f32_mac_b(x.v##k - r.shift, r.size, log_u.v##k) + log_v;
  FOUR_TIMES(TILE);
#undef TILE
  return x;
}

// The kernel matrix of the SCALING form, from the values in its place. Padding gets ones: its sums then are such as can
// be divided by, and its scalings come out as zero.
static inline void fill_scaled(shape s, range r) {
  for (int tile = s.matrix; tile < s.matrix + s.row_tiles * s.column_tiles; tile++) {
    const float64 x = v_f32_sel_leq_f32_b(local[tile], (float64)LEAST, r.shift, local[tile]);
    local[tile] = exponential(v_f32_mul_b(x - r.shift, r.size), 0);
  }
}

// 2^LIFT K := its exponential where `renewed` is positive.
static inline void fill(shape s, vectors p, range r, tensor values, int item, float64 renewed) {
  for (int block = 0; block < s.row_blocks; block++) {
    for (int c = 0; c < s.column_tiles; c++) {
      const four x = log_tiles(s, p, r, values, item, block, c);
      const int tile = s.matrix + c * s.row_tiles + 4 * block, tiles = s.row_tiles - 4 * block;
#define TILE(k) local[tile + k] = where_positive(renewed, exponential(x.v##k, LIFT), local[tile + k]);
      TILE(0);
      if (tiles > 1) TILE(1);
      if (tiles > 2) TILE(2);
      if (tiles > 3) TILE(3);
#undef TILE
    }
  }
}

// marginal / sums where there is any.
static inline float64 divided(float64 marginal, float64 sums) {
  return where_positive(marginal, quotient(marginal, sums), (float64)0.0f);
}

static inline void update_sums(shape s, vectors p) {
  for (int k = 0; k < s.row_blocks; k++) local[p.rows + k] = times_columns(s, k, p.v);
}

// Scalings of one, of zero at padding.
static inline void start_rows(shape s, vectors p) {
  for (int k = 0; k < s.row_blocks; k++) local[p.u + k] = where_positive(local[p.a + k], (float64)1.0f, (float64)0.0f);
}
static inline void start_columns(shape s, vectors p) {
  for (int k = 0; k < s.column_blocks; k++)
    local[p.v + k] = where_positive(local[p.b + k], (float64)1.0f, (float64)0.0f);
}
static inline void clear_folds(shape s, vectors p) {
  for (int k = 0; k < s.row_blocks; k++) local[p.log_u + k] = 0.0f;
  for (int k = 0; k < s.column_blocks; k++) local[p.log_v + k] = 0.0f;
}

// Scalings into what is folded, where `active` is positive; K is then to be filled again.
static inline void fold_rows(shape s, vectors p, float64 active) {
  for (int k = 0; k < s.row_blocks; k++) {
    const float64 folded = v_f32_min_b(active, local[p.a + k]);
    local[p.log_u + k] = where_positive(folded, local[p.log_u + k] + logarithm(local[p.u + k]), local[p.log_u + k]);
    local[p.u + k] = where_positive(folded, (float64)1.0f, local[p.u + k]);
  }
}
static inline void fold_columns(shape s, vectors p, float64 active) {
  for (int k = 0; k < s.column_blocks; k++) {
    const float64 folded = v_f32_min_b(active, local[p.b + k]);
    local[p.log_v + k] = where_positive(folded, local[p.log_v + k] + logarithm(local[p.v + k]), local[p.log_v + k]);
    local[p.v + k] = where_positive(folded, (float64)1.0f, local[p.v + k]);
  }
}

// What makes the largest entry of every row, of every column, one.
static inline void lift_rows(shape s, vectors p, range r, tensor values, int item, float64 active) {
  for (int block = 0; block < s.row_blocks; block++) {
    float64 m0 = LEAST, m1 = LEAST, m2 = LEAST, m3 = LEAST;
    for (int c = 0; c < s.column_tiles; c++) {
      const four x = log_tiles(s, p, r, values, item, block, c);
      m0 = v_f32_max_b(m0, x.v0);
      m1 = v_f32_max_b(m1, x.v1);
      m2 = v_f32_max_b(m2, x.v2);
      m3 = v_f32_max_b(m3, x.v3);
    }
    const float64 most = fold_rows_of(LARGEST, m0, m1, m2, m3);
    const float64 lifted = v_f32_min_b(active, local[p.a + block]);
    local[p.log_u + block] = where_positive(lifted, local[p.log_u + block] - most, local[p.log_u + block]);
  }
}
static inline float64 largest_of_tiles(shape s, vectors p, range r, tensor values, int item, int c) {
  float64 m = LEAST;
  if (c < s.column_tiles) {
    for (int block = 0; block < s.row_blocks; block++) {
      const four x = log_tiles(s, p, r, values, item, block, c);
      m = v_f32_max_b(v_f32_max_b(v_f32_max_b(x.v0, x.v1), v_f32_max_b(x.v2, x.v3)), m);
    }
  }
  return m;
}
static inline void lift_columns(shape s, vectors p, range r, tensor values, int item, float64 active) {
  for (int block = 0; block < s.column_blocks; block++) {
    float64 z[4];
#define MOST(i) largest_of_tiles(s, p, r, values, item, 16 * block + i)
#define QUAD(quad) \
  z[quad] = fold_quad(s.by, LARGEST, MOST(4 * quad), MOST(4 * quad + 1), MOST(4 * quad + 2), MOST(4 * quad + 3));
    FOUR_TIMES(QUAD);
#undef QUAD
#undef MOST
    const float64 most = fold_quads(s.by, LARGEST, z[0], z[1], z[2], z[3]);
    const float64 lifted = v_f32_min_b(active, local[p.b + block]);
    local[p.log_v + block] = where_positive(lifted, local[p.log_v + block] - most, local[p.log_v + block]);
  }
}

// A round in the log domain where `active` is positive, from what is folded and scalings of one, and back to there.
static inline void log_round(shape s, vectors p, range r, tensor values, int item, float64 active) {
  const lifts l = lifts_of(1);
  lift_rows(s, p, r, values, item, active);
  fill(s, p, r, values, item, active);
  for (int k = 0; k < s.row_blocks; k++) {
    const float64 u = divided(v_f32_mul_b(local[p.a + k], l.up), times_columns(s, k, p.v));
    local[p.u + k] = where_positive(active, u, local[p.u + k]);
  }
  fold_rows(s, p, active);
  lift_columns(s, p, r, values, item, active);
  fill(s, p, r, values, item, active);
  for (int k = 0; k < s.column_blocks; k++) {
    const float64 v = divided(v_f32_mul_b(local[p.b + k], l.up), times_rows(s, k, p.u));
    local[p.v + k] = where_positive(active, v, local[p.v + k]);
  }
  fold_columns(s, p, active);
  fill(s, p, r, values, item, active);
}
