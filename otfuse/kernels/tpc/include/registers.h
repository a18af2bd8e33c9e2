// Rounds of items of up to 64 rows and 17 to 20 columns, two items at a time: vectors stay in registers, only the tiles
// of K are read from local memory.
//
// One item alone is a chain of operations that wait for each other. The rounds of a second fill the slots in between,
// and change no bit of the first.

#define REGISTER_COLUMN_TILES 5

typedef struct {
  float64 a, b, u, v;
  float64 rows;           // K v
  float64 active, count;  // whether the item is not frozen; rounds run
} registers;

static inline int fits_registers(shape s) { return s.row_blocks == 1 && s.column_tiles == REGISTER_COLUMN_TILES; }

static inline registers take(vectors p) {
  registers x;
  x.a = local[p.a];
  x.b = local[p.b];
  x.u = local[p.u];
  x.v = local[p.v];
  x.rows = local[p.rows];
  x.active = 1.0f;
  x.count = 0.0f;
  return x;
}

static inline void give_back(vectors p, registers x) {
  local[p.u] = x.u;
  local[p.v] = x.v;
  local[p.rows] = x.rows;
}
// What an item without mass has divided by zero is no result.
static inline void give_result(vectors p, registers x, float64 mass) {
  local[p.u] = where_positive(mass, x.u, (float64)0.0f);
  local[p.v] = where_positive(mass, x.v, (float64)0.0f);
  local[p.rows] = where_positive(mass, x.rows, (float64)0.0f);
}

#define TILE(c, k) local[s.matrix + (c) * s.row_tiles + t.t##k]

static inline float64 row_sums(shape s, float64 v) {
  const places t = row_places(s, 0);
  const float64 v0 = SPREAD_COLUMN(v, 0, 0), v1 = SPREAD_COLUMN(v, 0, 1), v2 = SPREAD_COLUMN(v, 0, 2);
  const float64 v3 = SPREAD_COLUMN(v, 0, 3), v4 = SPREAD_COLUMN(v, 1, 0);
  float64 s0 = v_f32_mul_b(TILE(0, 0), v0), s1 = v_f32_mul_b(TILE(0, 1), v0);
  float64 s2 = v_f32_mul_b(TILE(0, 2), v0), s3 = v_f32_mul_b(TILE(0, 3), v0);
#define COLUMN(c) \
  s0 = v_f32_mac_b(TILE(c, 0), v##c, s0); \
  s1 = v_f32_mac_b(TILE(c, 1), v##c, s1); \
  s2 = v_f32_mac_b(TILE(c, 2), v##c, s2); \
  s3 = v_f32_mac_b(TILE(c, 3), v##c, s3);
  COLUMN(1);
  COLUMN(2);
  COLUMN(3);
  COLUMN(4);
#undef COLUMN
  return fold_rows_of(SUM, s0, s1, s2, s3);
}

static inline float64 column_sums(shape s, float64 u) {
  const places t = row_places(s, 0);
  const four w = spread_rows(u);
  float64 s0 = v_f32_mul_b(TILE(0, 0), w.v0), s1 = v_f32_mul_b(TILE(1, 0), w.v0), s2 = v_f32_mul_b(TILE(2, 0), w.v0);
  float64 s3 = v_f32_mul_b(TILE(3, 0), w.v0), s4 = v_f32_mul_b(TILE(4, 0), w.v0);
#define ROW(k) \
  s0 = v_f32_mac_b(TILE(0, k), w.v##k, s0); \
  s1 = v_f32_mac_b(TILE(1, k), w.v##k, s1); \
  s2 = v_f32_mac_b(TILE(2, k), w.v##k, s2); \
  s3 = v_f32_mac_b(TILE(3, k), w.v##k, s3); \
  s4 = v_f32_mac_b(TILE(4, k), w.v##k, s4);
  ROW(1);
  ROW(2);
  ROW(3);
#undef ROW
  const float64 z = fold_quad(s.by, SUM, s0, s1, s2, s3);
  const float64 y = over_partners(SUM, over_groups(SUM, s4), s.by.all4);
  return over_partners(SUM, fold_lanes(SUM, z, y, s.by.clear2, s.by.set2), s.by.all1);
}
#undef TILE

static inline registers rows_of_round(registers x, int freezing) {
  const float64 u = quotient(x.a, x.rows);  // zero at padding, whose sums are not
  x.u = freezing ? where_positive(x.active, u, x.u) : u;
  return x;
}
static inline registers columns_of_round(registers x, float64 sums, int freezing) {
  const float64 v = quotient(x.b, sums);
  x.v = freezing ? where_positive(x.active, v, x.v) : v;
  x.count = x.count + x.active;
  return x;
}
static inline registers freeze(shape s, registers x, float64 poison, float tol) {
  const float64 error = over_all_lanes(s.by, SUM, v_f32_abs_b(v_f32_mul_b(x.u, x.rows) - x.a)) + poison;
  x.active = v_f32_sel_less_f32_b(error, (float64)tol, (float64)0.0f, (float64)1.0f);
  return x;
}
