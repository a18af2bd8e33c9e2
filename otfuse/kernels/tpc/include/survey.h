// The form that an item's own range asks for: 0 = SCALING, otherwise the rounds between two folds.
//
// A round changes a scaling by a factor of one over the product of the smallest weights at most: 70 binary orders
// between two folds keep every sum a normal number. Where one round may change it by more than half of that, all are
// done in the log domain: of the smallest weights that there are, the product itself is none.

#include "lanes.h"
#include "numeric.h"
#include "values.h"
#include "item.h"
#include "problem.h"

#define MOST_BITS 70.0f
#define MOST_ROUNDS 16.0f

// The logarithms of the smallest and of the largest weight that is not zero.
typedef struct {
  float64 low, high;
} ends;
static inline ends ends_of(shape s, int first, int blocks) {
  float64 low = LEAST, high = LEAST;
  for (int k = 0; k < blocks; k++) {
    const float64 weight = local[first + k], logarithms = logarithm(weight);
    low = v_f32_max_b(low, where_positive(weight, (float64)0.0f - logarithms, (float64)LEAST));
    high = v_f32_max_b(high, where_positive(weight, logarithms, (float64)LEAST));
  }
  ends e;
  e.low = (float64)0.0f - over_all_lanes(s.by, LARGEST, low);
  e.high = over_all_lanes(s.by, LARGEST, high);
  return e;
}

void main(tensor values, tensor a, tensor b, tensor forms, float scale) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  shape s = shape_of(values, 0);
  s.next = 0;  // no matrix here
  const vectors p = lay_out(s);
  for (int item = first[0]; item < last[0]; item++) {
    load_weights(s, p, a, b, item);
    const range high = range_of(s, p, values, item, scale, 0, 0), low = range_of(s, p, values, item, scale, 1, 0);
    const ends of_a = ends_of(s, p.a, s.row_blocks), of_b = ends_of(s, p.b, s.column_blocks);
    const float64 spread = v_f32_mul_b(high.shift + low.shift, high.size);
    const float64 with_weights = spread + (of_a.high - of_a.low) + (of_b.high - of_b.low);
    // Bits that a round may move a scaling by; the form is the largest number of rounds that stays within MOST_BITS.
    const float64 bits = v_f32_mul_b((float64)0.0f - of_a.low - of_b.low, (float64)1.44269504f);
    float64 form = quotient((float64)MOST_BITS, v_f32_max_b(bits, (float64)1.0f));
    form = v_f32_nearbyint_b(form - 0.5f);
    form = v_f32_max_b(v_f32_min_b(form, (float64)MOST_ROUNDS), (float64)1.0f);
    form = v_f32_sel_leq_f32_b(
        spread, (float64)MOST_SPREAD,
        v_f32_sel_leq_f32_b(with_weights, (float64)MOST_SPREAD_WITH_WEIGHTS, (float64)0.0f, form), form);
    // Nothing to be solved: no mass, or something that is not finite.
    form = where_positive(high.mass, form, (float64)0.0f);
    form = v_f32_sel_geq_f32_b(high.poison, (float64)0.0f, form, (float64)0.0f);
    v_f32_st_tnsr(place(0, item, 0), forms, form);
  }
}
