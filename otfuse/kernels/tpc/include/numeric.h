// exp, log and reciprocal in float32, without LOOKUP, and selections by sign.

static inline int64 bits_of(float64 x) { return *((int64*)&x); }
static inline float64 from_bits(int64 bits) { return *((float64*)&bits); }

static inline float64 minus_infinity() { return from_bits((int64)-0x00800000); }

static inline float64 where_positive(float64 condition, float64 yes, float64 no) {
  return v_f32_sel_grt_f32_b(condition, (float64)0.0f, yes, no);
}

// y / x for normal positive x: a seed for 1 / x by integer arithmetic, off by 5 %; one step of third order for it and
// for the quotient side by side; and a step of Newton for the quotient. Fused, it is all but correctly rounded: an
// error of one sign would add up over the rounds.
static inline float64 quotient(float64 y, float64 x) {
  const float64 one = 1.0f;
  const float64 seed = from_bits(0x7EF311C7 - bits_of(x));
  const float64 error = v_f32_mac_b(x, seed, one, SW_NEG);
  const float64 first = v_f32_mul_b(y, seed);
  const float64 step = v_f32_mac_b(error, error, error);
  const float64 inverse = v_f32_mac_b(seed, step, seed), second = v_f32_mac_b(first, step, first);
  return v_f32_mac_b(inverse, v_f32_mac_b(x, second, y, SW_NEG), second);
}

// exp(x) 2^lift for x <= 87 - lift log(2), 1.3 ulp; zero below the smallest normal number. Cephes' polynomial.
static inline float64 exponential(float64 x, int lift) {
  const float64 n = v_f32_nearbyint_b(v_f32_mul_b(x, (float64)1.44269504f));
  float64 r = v_f32_mac_b(n, (float64)0.693359375f, x, SW_NEG);
  r = v_f32_mac_b(n, (float64)2.12194440e-4f, r);
  float64 p = v_f32_mac_b(r, (float64)1.9875691500e-4f, (float64)1.3981999507e-3f);
  p = v_f32_mac_b(p, r, (float64)8.3334519073e-3f);
  p = v_f32_mac_b(p, r, (float64)4.1665795894e-2f);
  p = v_f32_mac_b(p, r, (float64)1.6666665459e-1f);
  p = v_f32_mac_b(p, r, (float64)5.0000001201e-1f);
  p = v_f32_add_b(v_f32_mac_b(p, v_f32_mul_b(r, r), r), (float64)1.0f);
  const int64 exponent = v_i32_shl_b(v_convert_f32_to_i32_b(n + (float)lift), (int64)23);
  const float64 least = -87.0f - 0.6931f * (float)lift;
  return v_f32_sel_less_f32_b(x, least, (float64)0.0f, from_bits(bits_of(p) + exponent));
}

// log(x) for normal positive x. Cephes' polynomial on [sqrt(1/2), sqrt(2)].
static inline float64 logarithm(float64 x) {
  const int64 bits = bits_of(x) + (0x3F800000 - 0x3F3504F3);
  const float64 e = v_convert_i32_to_f32_b(v_i32_shr_b(bits, (int64)23) - 127);
  const float64 z = from_bits((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float64 square = v_f32_mul_b(z, z);
  float64 p = v_f32_mac_b(z, (float64)7.0376836292e-2f, (float64)-1.1514610310e-1f);
  p = v_f32_mac_b(p, z, (float64)1.1676998740e-1f);
  p = v_f32_mac_b(p, z, (float64)-1.2420140846e-1f);
  p = v_f32_mac_b(p, z, (float64)1.4249322787e-1f);
  p = v_f32_mac_b(p, z, (float64)-1.6668057665e-1f);
  p = v_f32_mac_b(p, z, (float64)2.0000714765e-1f);
  p = v_f32_mac_b(p, z, (float64)-2.4999993993e-1f);
  p = v_f32_mac_b(p, z, (float64)3.3333331174e-1f);
  p = v_f32_mul_b(v_f32_mul_b(p, z), square);
  p = v_f32_mac_b(e, (float64)-2.12194440e-4f, p);
  p = v_f32_mac_b(square, (float64)-0.5f, p);
  return v_f32_mac_b(e, (float64)0.693359375f, z + p);
}

// Stands for padding where the largest of some values is wanted.
#define LEAST -3.0e38f

// The scaling form is safe while log K spreads by 40 at most, and together with the logarithms of the weights by 60.
#define MOST_SPREAD 40.0f
#define MOST_SPREAD_WITH_WEIGHTS 60.0f

// Between two folds sums may fall as low as the product of the smallest weights, 1e-40 say, which is flushed. So where
// K may be folded, local memory holds 2^LIFT K; `lifts` are the factors for what sums are compared with, and back.
#define LIFT 24
typedef struct {
  float64 up, back;
} lifts;
static inline lifts lifts_of(int folds) {
  lifts l;
  l.up = folds > 0 ? 16777216.0f : 1.0f;
  l.back = folds > 0 ? 1.0f / 16777216.0f : 1.0f;
  return l;
}
