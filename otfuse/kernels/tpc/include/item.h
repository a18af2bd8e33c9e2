// An item in local memory: its kernel matrix as tiles of 16 rows by 4 columns, and the products that half rounds are.
//
// Tile (r, c) is one vector: lane l of dual group d holds row 16 r + l, column W d + c, where W is the number of column
// tiles. Row vectors ("blocks") hold 64 rows in order. Column blocks hold 16 column tiles: lane l of dual group d of
// block k is column W d + 16 k + (the four bits of l reversed), which is where the folds of four vectors leave it.
//
// Sums over columns stay in their dual group until the four dual groups are folded; sums over rows are folded within
// the dual group. So a half round costs a multiply-add a tile and little else, and fills 64 lanes with a single item.
//
// Letters: N rows, M columns of an item.

#define LOCAL_VECTORS 304  // of 320; the compiler keeps the rest for what does not fit in registers
__local__ float64 local[LOCAL_VECTORS];

typedef struct {
  int N, M;
  int row_tiles, column_tiles;    // ceil(N / 16), ceil(M / 4)
  int row_blocks, column_blocks;  // ceil(N / 64), ceil(column_tiles / 16)
  int matrix;                     // where the kernel matrix lies in local memory
  int next;                       // the first vector that is free
  selectors by;
} shape;

// Tile (r, c) of the matrix lies at matrix + c row_tiles + r.
static inline shape shape_of(tensor values, int matrix) {
  shape s;
  s.N = get_dim_size(values, 0);
  s.M = get_dim_size(values, 1);
  s.row_tiles = (s.N + 15) >> 4;
  s.column_tiles = (s.M + 3) >> 2;
  s.row_blocks = (s.N + 63) >> 6;
  s.column_blocks = (s.column_tiles + 15) >> 4;
  s.matrix = matrix;
  s.next = matrix + s.row_tiles * s.column_tiles;
  s.by = make_selectors();
  return s;
}

static inline int5 place(int i0, int i1, int i2) {
  int5 at = {i0, i1, i2, 0, 0};
  return at;
}

// A number of an input [B, n], as a scalar: what a kernel may branch on.
static inline float scalar_of(tensor from, int i, int item) { return s_f32_ld_g(gen_addr(place(i, item, 0), from)); }

// ---- rows: blocks of 64 in order

static inline float64 load_rows(tensor from, int block, int item) {
  return v_f32_ld_tnsr_b(place(64 * block, item, 0), from);
}
static inline void store_rows(tensor to, int block, int item, float64 x) {
  v_f32_st_tnsr(place(64 * block, item, 0), to, x);
}

// ---- columns

static inline int tiles_in_block(shape s, int block) { return s_i32_min(16, s.column_tiles - 16 * block); }

static inline float64 load_columns(shape s, tensor from, int block, int item) {
  const int first = 16 * block;
  const float64 x0 = v_f32_ld_tnsr_b(place(first, item, 0), from);
  const float64 x1 = v_f32_ld_tnsr_b(place(s.column_tiles + first, item, 0), from);
  const float64 x2 = v_f32_ld_tnsr_b(place(2 * s.column_tiles + first, item, 0), from);
  const float64 x3 = v_f32_ld_tnsr_b(place(3 * s.column_tiles + first, item, 0), from);
  float64 x = MOVE_DUAL_GROUPS(x1, 0, 0, 0, 0, MkWrA(0, 3, 0, 0), x0);
  x = MOVE_DUAL_GROUPS(x2, 0, 0, 0, 0, MkWrA(0, 0, 3, 0), x);
  x = MOVE_DUAL_GROUPS(x3, 0, 0, 0, 0, MkWrA(0, 0, 0, 3), x);
  x = reverse_lanes(x);
  // Lanes beyond the last tile hold what belongs to the next dual group.
  return v_f32_sel_grt_u32_b((uint64)(unsigned)tiles_in_block(s, block), reversed_lane(), x, (float64)0.0f);
}

static inline void store_columns(shape s, tensor to, int block, int item, float64 x) {
  const int first = 16 * block, last = tiles_in_block(s, block) - 1;
  x = reverse_lanes(x);
  v_f32_st_tnsr_partial(place(first, item, 0), to, x, last, 0);
  v_f32_st_tnsr_partial(place(s.column_tiles + first, item, 0), to, SPREAD_DUAL_GROUP(x, 1), last, 0);
  v_f32_st_tnsr_partial(place(2 * s.column_tiles + first, item, 0), to, SPREAD_DUAL_GROUP(x, 2), last, 0);
  v_f32_st_tnsr_partial(place(3 * s.column_tiles + first, item, 0), to, SPREAD_DUAL_GROUP(x, 3), last, 0);
}

// The columns of tile 16 block + 4 quad + i, each in all lanes of its dual group: i is 0 ... 3, a constant.
#define SPREAD_COLUMN(x, quad, i) \
  v_f32_shuffle_b(x, \
                  (uchar256)(uint64)(unsigned)(ENABLE | (((i) & 1) << 5) | (((i) >> 1) << 2) | (((quad) & 1) << 1) | \
                                               ((quad) >> 1)), \
                  0, x)

// ---- four tiles below each other, and four column tiles side by side

// Rows of a block that do not exist are those of the last tile again: what comes of them meets weights of zero.
typedef struct {
  int t0, t1, t2, t3;
} places;
static inline places row_places(shape s, int block) {
  places p;
  p.t0 = 4 * block;
  p.t1 = s_i32_min(4 * block + 1, s.row_tiles - 1);
  p.t2 = s_i32_min(4 * block + 2, s.row_tiles - 1);
  p.t3 = s_i32_min(4 * block + 3, s.row_tiles - 1);
  return p;
}
static inline places column_places(shape s, int tile) {
  places p;
  p.t0 = s.matrix + tile * s.row_tiles;
  p.t1 = s.matrix + s_i32_min(tile + 1, s.column_tiles - 1) * s.row_tiles;
  p.t2 = s.matrix + s_i32_min(tile + 2, s.column_tiles - 1) * s.row_tiles;
  p.t3 = s.matrix + s_i32_min(tile + 3, s.column_tiles - 1) * s.row_tiles;
  return p;
}

static inline four spread_rows(float64 x) {
  four y;
  y.v0 = SPREAD_DUAL_GROUP(x, 0);
  y.v1 = SPREAD_DUAL_GROUP(x, 1);
  y.v2 = SPREAD_DUAL_GROUP(x, 2);
  y.v3 = SPREAD_DUAL_GROUP(x, 3);
  return y;
}

// ---- products of the matrix with a vector

// Sums over the columns, sum_j K_ij w_j, for the rows of a block; w are the column blocks at `w`.
static inline float64 times_columns(shape s, int block, int w) {
  const places r = row_places(s, block);
  float64 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#define COLUMN(x, i) \
  { \
    const float64 y = SPREAD_COLUMN(x, quad, i); \
    s0 = v_f32_mac_b(local[c.t##i + r.t0], y, s0); \
    s1 = v_f32_mac_b(local[c.t##i + r.t1], y, s1); \
    s2 = v_f32_mac_b(local[c.t##i + r.t2], y, s2); \
    s3 = v_f32_mac_b(local[c.t##i + r.t3], y, s3); \
  }
  for (int k = 0; k < s.column_blocks; k++) {
    const float64 x = local[w + k];
    const int tiles = tiles_in_block(s, k);
    for (int quad = 0; 4 * quad < tiles; quad++) {
      const places c = column_places(s, 16 * k + 4 * quad);
      const int count = tiles - 4 * quad;
      COLUMN(x, 0);
      if (count > 3) {
        COLUMN(x, 1);
        COLUMN(x, 2);
        COLUMN(x, 3);
      } else if (count > 1) {  // with a count of two the last weighs nothing
        COLUMN(x, 1);
        COLUMN(x, 2);
      }
    }
  }
#undef COLUMN
  return fold_rows_of(SUM, s0, s1, s2, s3);
}

// Sums over the rows, sum_i K_ij w_i, for the columns of a block; w are the row blocks at `w`.
static inline float64 times_rows(shape s, int block, int w) {
  float64 z[4];
  const int tiles = tiles_in_block(s, block);
#define COLUMN(i) \
  s##i = v_f32_mac_b(local[c.t##i + r.t0], x.v0, s##i); \
  s##i = v_f32_mac_b(local[c.t##i + r.t1], x.v1, s##i); \
  s##i = v_f32_mac_b(local[c.t##i + r.t2], x.v2, s##i); \
  s##i = v_f32_mac_b(local[c.t##i + r.t3], x.v3, s##i);
#define QUAD(quad) \
  z[quad] = 0.0f; \
  if (4 * quad < tiles) { \
    const places c = column_places(s, 16 * block + 4 * quad); \
    float64 s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f; \
    for (int k = 0; k < s.row_blocks; k++) { \
      const places r = row_places(s, k); \
      const four x = spread_rows(local[w + k]); \
      COLUMN(0); \
      if (4 * quad + 1 < tiles) { \
        COLUMN(1); \
        COLUMN(2); \
        COLUMN(3); \
      } \
    } \
    z[quad] = fold_quad(s.by, SUM, s0, s1, s2, s3); \
  }
  FOUR_TIMES(QUAD);
#undef QUAD
#undef COLUMN
  return fold_quads(s.by, SUM, z[0], z[1], z[2], z[3]);
}

// ---- values to tiles and back

// Four tiles of `values` times `sign`, those of a block of rows in column tile c. Padding becomes `otherwise`.
static inline four load_tiles(shape s, tensor values, int item, int block, int c, float64 live_rows,
                              float64 live_columns, float64 sign, float64 otherwise) {
  four x;
#define LOAD(d) \
  x.v##d = load_values(place(64 * block, s.column_tiles * d + c, item), values); \
  x.v##d = where_positive(live_rows, v_f32_mul_b(x.v##d, sign), otherwise);
  FOUR_TIMES(LOAD);
#undef LOAD
  x = transposed(x);
  const float64 live = live_columns;
  x.v0 = where_positive(live, x.v0, otherwise);
  x.v1 = where_positive(live, x.v1, otherwise);
  x.v2 = where_positive(live, x.v2, otherwise);
  x.v3 = where_positive(live, x.v3, otherwise);
  return x;
}

// Four tiles to their columns of `to`, those of a block of rows in column tile c.
static inline void store_tiles(shape s, tensor to, int item, int block, int c, four x) {
  x = transposed(x);
  STORE_VALUES(place(64 * block, c, item), to, x.v0);
  STORE_VALUES(place(64 * block, s.column_tiles + c, item), to, x.v1);
  STORE_VALUES(place(64 * block, 2 * s.column_tiles + c, item), to, x.v2);
  STORE_VALUES(place(64 * block, 3 * s.column_tiles + c, item), to, x.v3);
}

// The same for tile c of a column block held in x: what belongs to its columns, in all lanes of their dual groups.
static inline float64 spread_column(float64 x, int c) {
  const int lane = c & 15;
  const int source = ((lane & 1) << 5) | ((lane & 2) << 1) | ((lane & 4) >> 1) | (lane >> 3);
  return v_f32_shuffle_b(x, (uchar256)(uint64)(unsigned)(ENABLE | source), 0, x);
}
