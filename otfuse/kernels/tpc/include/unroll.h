// The gradient of the rounds that were run, from the history of their scalings (docs/gradients.md, Eqs. 3 and 4).
//
// A member redoes the backward of one item, and keeps the gradient of a slice of its column tiles: K and that fit in
// local memory together. du and dv are the adjoints of log u and log v.

#include "adjoint.h"

// Columns of the slice, and where the gradient of their tiles lies.
typedef struct {
  int first, last, at;
} part;

static inline void clear(int first, int count) {
  for (int k = 0; k < count; k++) local[first + k] = 0.0f;
}

// dL -= K (x y' + z w'): tiles of the slice, x and z blocks of rows, y and w of columns.
static inline void subtract_terms(shape s, part q, lifts l, int x, int y, int z, int w) {
  for (int block = 0; block < s.row_blocks; block++) {
    const int tiles = s.row_tiles - 4 * block;
    const four xs = spread_rows(v_f32_mul_b(local[x + block], l.back));
    const four zs = spread_rows(v_f32_mul_b(local[z + block], l.back));
    for (int c = q.first; c < q.last; c++) {
      const float64 ys = spread_column(local[y + (c >> 4)], c), ws = spread_column(local[w + (c >> 4)], c);
      const int from = s.matrix + c * s.row_tiles + 4 * block, to = q.at + (c - q.first) * s.row_tiles + 4 * block;
#define TILE(k) \
  local[to + k] = \
      v_f32_mac_b(local[from + k], v_f32_mac_b(zs.v##k, ws, v_f32_mul_b(xs.v##k, ys)), local[to + k], SW_NEG);
      TILE(0);
      if (tiles > 1) TILE(1);
      if (tiles > 2) TILE(2);
      if (tiles > 3) TILE(3);
#undef TILE
    }
  }
}

// What a half round sends through a K that was filled from logarithms alone: its sums are those of the weights only up
// to what the logarithms were rounded to.
static inline float64 rescaled(float64 sent, float64 weight, lifts l, float64 sums) {
  return v_f32_mul_b(sent, divided(v_f32_mul_b(weight, l.up), sums));
}

static inline void start_slice(shape s, vectors p, lifts l, part q, tensor grad_plan, int item) {
  for (int block = 0; block < s.row_blocks; block++)
    for (int c = q.first; c < q.last; c++)
      keep_tiles(s, q.at, block, c - q.first, weighed_tiles(s, p, l, grad_plan, item, block, c));
}

static inline void store_slice(shape s, part q, range r, float scale, tensor grad_values, int item) {
  for (int block = 0; block < s.row_blocks; block++) {
    const places t = row_places(s, block);
    for (int c = q.first; c < q.last; c++) {
      const int from = q.at + (c - q.first) * s.row_tiles;
      four x;
#define TILE(k) x.v##k = v_f32_mac_b(local[from + t.t##k], (float64)scale, r.poison);
      FOUR_TIMES(TILE);
#undef TILE
      store_tiles(s, grad_values, item, block, c, x);
    }
  }
}

void main(tensor values, tensor a, tensor b, tensor forms, tensor report, tensor history, tensor grad_plan,
          tensor grad_f, tensor grad_g, tensor grad_values, tensor grad_a, tensor grad_b, float scale, int slice) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  const float64 always = 1.0f;
  shape s = shape_of(values, 0);
  const vectors p = lay_out(s);
  const adjoints d = lay_out_adjoints(s, p);
  const int sum_a = p.rows, sum_b = d.next, before = d.next + s.column_blocks;
  part q;
  q.at = d.next + 2 * s.column_blocks;
  for (int item = first[1]; item < last[1]; item++) {
    load_weights(s, p, a, b, item);
    const range r = range_of(s, p, values, item, scale, 0, 1);
    const int form = (int)scalar_of(forms, 0, item), rounds = (int)scalar_of(report, 1, item);
    const lifts l = lifts_of(form);
    if (form == 0) fill_scaled(s, r);
    for (int member = first[0]; member < last[0]; member++) {
      q.first = member * slice;
      q.last = s_i32_min(q.first + slice, s.column_tiles);
      clear(sum_a, s.row_blocks);
      clear(sum_b, s.column_blocks);
      clear(d.du, s.row_blocks);
      clear(d.dv, s.column_blocks);
      clear(q.at, (q.last - q.first) * s.row_tiles);
      int fold = 1 + form;  // the last round before which K was folded
      while (form > 0 && fold + form < rounds) fold += form;
      int refill = form > 0;
      for (int t = rounds - 1; t >= 0; t--) {
        const int folded = form > 0 && t > 1 && t == fold;
        restore_scalings(s, p, history, item, t);
        if (refill) {
          restore_folds(s, p, history, item, t);
          fill(s, p, r, values, item, always);
        }
        refill = folded || form == 1;  // the round before had another K
        if (folded) fold -= form;
        if (t == rounds - 1) {
          weigh(s, p, d, l, r, grad_plan, grad_f, grad_g, item);
          start_slice(s, p, l, q, grad_plan, item);
        }
        // Columns.
        for (int k = 0; k < s.column_blocks; k++) {
          const float64 share = share_of(local[d.dv + k], local[p.b + k]);
          local[sum_b + k] = local[sum_b + k] + share;
          local[d.wv + k] = v_f32_mul_b(share, local[p.v + k]);
          if (form == 1) local[d.wv + k] = rescaled(local[d.wv + k], local[p.b + k], l, times_rows(s, k, p.u));
          local[before + k] = where_positive(local[p.b + k], (float64)1.0f, (float64)0.0f);
        }
        if (t > 0 && !folded) restore_columns(s, history, item, t - 1, before);
        // Rows.
        for (int k = 0; k < s.row_blocks; k++) {
          const float64 u = local[p.u + k];
          const float64 sums = v_f32_mul_b(times_columns(s, k, d.wv), l.back);
          const float64 du = v_f32_mac_b(u, sums, local[d.du + k], SW_NEG);
          const float64 share = share_of(du, local[p.a + k]);
          local[sum_a + k] = local[sum_a + k] + share;
          local[d.wu + k] = v_f32_mul_b(share, u);
          local[d.du + k] = 0.0f;
        }
        if (form == 1 || (form > 0 && t == 0)) {  // its rows met K with what was folded into the columns before
          const int nothing = d.du, none = d.dv;
          clear(none, s.column_blocks);
          subtract_terms(s, q, l, p.u, d.wv, nothing, none);
          clear(p.log_v, s.column_blocks);  // at first there was nothing
          if (t > 0) restore_folded_columns(s, history, item, t - 1, p.log_v);
          fill(s, p, r, values, item, always);
          for (int k = 0; k < s.row_blocks; k++)
            local[d.wu + k] = rescaled(local[d.wu + k], local[p.a + k], l, times_columns(s, k, before));
          subtract_terms(s, q, l, nothing, none, d.wu, before);
        } else {
          subtract_terms(s, q, l, p.u, d.wv, d.wu, before);
        }
        for (int k = 0; k < s.column_blocks; k++) {
          const float64 sums = v_f32_mul_b(times_rows(s, k, d.wu), l.back);
          local[d.dv + k] = (float64)0.0f - v_f32_mul_b(local[before + k], sums);
        }
      }
      store_slice(s, q, r, scale, grad_values, item);
      if (member == 0) {
        for (int k = 0; k < s.row_blocks; k++) store_rows(grad_a, k, item, local[sum_a + k] + r.poison);
        for (int k = 0; k < s.column_blocks; k++) store_columns(s, grad_b, k, item, local[sum_b + k] + r.poison);
      }
    }
  }
}
