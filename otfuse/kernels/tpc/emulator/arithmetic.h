// Arithmetic, comparisons, selections and conversions, a lane at a time.
//
// ..._b takes a scalar predicate, ..._vb a vector one: (predicate != polarity) ? operation : income.
// The caller has switched the processor to flushing subnormals (runner.h).
#pragma once
#include "vector.h"

#define SW_NEG 2

namespace emu {

inline float fused(float a, float b, float c) {
#ifdef OTFUSE_TPC_VARIANT
    return a * b + c;  // -ffp-contract=off keeps it two roundings
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// The processor flushes what it computes, not what it moves.
inline float flushed(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    if ((bits & 0x7F800000) == 0) bits &= 0x80000000;
    std::memcpy(&a, &bits, 4);
    return a;
}

// What comes of a NaN is not documented: one variant passes it on, the other takes the other operand.
inline float with_nan(float a, float b, float chosen) {
#ifdef OTFUSE_TPC_VARIANT
    return a != a ? b : b != b ? a : chosen;
#else
    return a != a ? a : b != b ? b : chosen;
#endif
}
inline float larger(float a, float b) { return flushed(with_nan(a, b, a > b ? a : b)); }
inline float smaller(float a, float b) { return flushed(with_nan(a, b, a < b ? a : b)); }

// Nor what comes of a float outside int32.
inline int32_t to_int(float a) {
    if (a >= -2147483648.0f && a < 2147483648.0f) return (int32_t)std::nearbyintf(a);
#ifdef OTFUSE_TPC_VARIANT
    return a > 0 ? INT32_MAX : a < 0 ? INT32_MIN : 0;
#else
    return INT32_MIN;
#endif
}

inline float magnitude(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    bits &= 0x7FFFFFFF;
    std::memcpy(&a, &bits, 4);
    return a;
}

inline uint16_t to_bf16(float a) {
    a = flushed(a);
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    if (a != a) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t a) {
    const uint32_t bits = (uint32_t)a << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return flushed(f);
}

template <class V> void choose(V& r, const V& income, const bool64& predicate, bool polarity) {
    for (int l = 0; l < 64; l++)
        if (lanes(predicate)[l] == polarity) lanes(r)[l] = lanes(income)[l];
}

}  // namespace emu

// One operand of type A, results of type V: VALUE is made of x.
#define EMU_UNARY(NAME, V, A, LATENCY, SWITCHES, VALUE)                                                             \
    EMU_FUNCTION V NAME##_b(const A& a, int sw = 0, const V& income = {}, EMU_PREDICATE) {                          \
        emu::only(sw, SWITCHES, #NAME);                                                                             \
        V r;                                                                                                        \
        for (int l = 0; l < 64; l++) {                                                                              \
            auto x = emu::lanes(a)[l];                                                                              \
            emu::lanes(r)[l] = VALUE;                                                                               \
        }                                                                                                           \
        if (predicate == polarity) r = income;                                                                      \
        EMU_ISSUE(r, #NAME, VECTOR, emu::LATENCY, a, income);                                                       \
        return r;                                                                                                   \
    }                                                                                                               \
    EMU_FUNCTION V NAME##_vb(const A& a, int sw, const V& income, const bool64& predicate, bool polarity = false) { \
        emu::only(sw, SWITCHES, #NAME);                                                                             \
        V r;                                                                                                        \
        for (int l = 0; l < 64; l++) {                                                                              \
            auto x = emu::lanes(a)[l];                                                                              \
            emu::lanes(r)[l] = VALUE;                                                                               \
        }                                                                                                           \
        emu::choose(r, income, predicate, polarity);                                                                \
        EMU_ISSUE(r, #NAME, VECTOR, emu::LATENCY, a, income, predicate);                                            \
        return r;                                                                                                   \
    }

// Two operands, x and y.
#define EMU_BINARY(NAME, V, A, B, LATENCY, VALUE)                                                      \
    EMU_FUNCTION V NAME##_b(const A& a, const B& b, int sw = 0, const V& income = {}, EMU_PREDICATE) { \
        emu::only(sw, 0, #NAME);                                                                       \
        V r;                                                                                           \
        for (int l = 0; l < 64; l++) {                                                                 \
            auto x = emu::lanes(a)[l];                                                                 \
            auto y = emu::lanes(b)[l];                                                                 \
            emu::lanes(r)[l] = VALUE;                                                                  \
        }                                                                                              \
        if (predicate == polarity) r = income;                                                         \
        EMU_ISSUE(r, #NAME, VECTOR, emu::LATENCY, a, b, income);                                       \
        return r;                                                                                      \
    }                                                                                                  \
    EMU_FUNCTION V NAME##_vb(const A& a, const B& b, int sw, const V& income, const bool64& predicate, \
                       bool polarity = false) {                                                        \
        emu::only(sw, 0, #NAME);                                                                       \
        V r;                                                                                           \
        for (int l = 0; l < 64; l++) {                                                                 \
            auto x = emu::lanes(a)[l];                                                                 \
            auto y = emu::lanes(b)[l];                                                                 \
            emu::lanes(r)[l] = VALUE;                                                                  \
        }                                                                                              \
        emu::choose(r, income, predicate, polarity);                                                   \
        EMU_ISSUE(r, #NAME, VECTOR, emu::LATENCY, a, b, income, predicate);                            \
        return r;                                                                                      \
    }

EMU_UNARY(v_f32_mov, float64, float64, LATENCY_ADD, 0, x)
EMU_UNARY(v_i32_mov, int64, int64, LATENCY_ADD, 0, x)
EMU_UNARY(v_u32_mov, uint64, uint64, LATENCY_ADD, 0, x)
EMU_UNARY(v_f32_abs, float64, float64, LATENCY_ADD, 0, emu::magnitude(x))
EMU_UNARY(v_f32_nearbyint, float64, float64, LATENCY_ADD, 0, std::nearbyintf(x))
EMU_UNARY(v_convert_f32_to_i32, int64, float64, LATENCY_ADD, 0, emu::to_int(x))
EMU_UNARY(v_convert_i32_to_f32, float64, int64, LATENCY_ADD, 0, (float)x)

EMU_BINARY(v_f32_add, float64, float64, float64, LATENCY_ADD, x + y)
EMU_BINARY(v_f32_sub, float64, float64, float64, LATENCY_ADD, x - y)
EMU_BINARY(v_f32_mul, float64, float64, float64, LATENCY_MUL, x * y)
EMU_BINARY(v_f32_max, float64, float64, float64, LATENCY_ADD, emu::larger(x, y))
EMU_BINARY(v_f32_min, float64, float64, float64, LATENCY_ADD, emu::smaller(x, y))

#define EMU_INTEGER(V, KIND, T)                                                                    \
    EMU_BINARY(v_##KIND##_add, V, V, V, LATENCY_ADD, (T)((uint32_t)x + (uint32_t)y))               \
    EMU_BINARY(v_##KIND##_sub, V, V, V, LATENCY_ADD, (T)((uint32_t)x - (uint32_t)y))               \
    EMU_BINARY(v_##KIND##_and, V, V, V, LATENCY_ADD, x & y)                                        \
    EMU_BINARY(v_##KIND##_or, V, V, V, LATENCY_ADD, x | y)                                         \
    EMU_BINARY(v_##KIND##_xor, V, V, V, LATENCY_ADD, x ^ y)                                        \
    EMU_BINARY(v_##KIND##_max, V, V, V, LATENCY_ADD, x > y ? x : y)                                \
    EMU_BINARY(v_##KIND##_min, V, V, V, LATENCY_ADD, x < y ? x : y)                                \
    EMU_BINARY(v_##KIND##_shl, V, V, V, LATENCY_ADD, (uint32_t)y < 32 ? (T)((uint32_t)x << y) : 0) \
    EMU_BINARY(v_##KIND##_shr, V, V, V, LATENCY_ADD, (uint32_t)y < 32 ? (T)((uint32_t)x >> y) : 0)
EMU_INTEGER(int64, i32, int32_t)
EMU_INTEGER(uint64, u32, uint32_t)

// Comparisons, and selections by one: NAME is what the intrinsics call it.
#define EMU_COMPARE(NAME, KIND, A, VALUE)                               \
    EMU_BINARY(v_##KIND##_cmp_##NAME, bool64, A, A, LATENCY_ADD, VALUE) \
    EMU_SELECT(NAME, f32, float64, KIND, A, VALUE)                      \
    EMU_SELECT(NAME, i32, int64, KIND, A, VALUE)                        \
    EMU_SELECT(NAME, u32, uint64, KIND, A, VALUE)

#define EMU_SELECT(NAME, RESULT, V, KIND, A, VALUE)                                                                 \
    EMU_FUNCTION V v_##RESULT##_sel_##NAME##_##KIND##_b(const A& a, const A& b, const V& c, const V& d, int sw = 0, \
                                                  const V& income = {}, EMU_PREDICATE) {                            \
        emu::only(sw, 0, "v_" #RESULT "_sel_" #NAME "_" #KIND);                                                     \
        V r;                                                                                                        \
        for (int l = 0; l < 64; l++) {                                                                              \
            auto x = emu::lanes(a)[l];                                                                              \
            auto y = emu::lanes(b)[l];                                                                              \
            emu::lanes(r)[l] = (VALUE) ? emu::lanes(c)[l] : emu::lanes(d)[l];                                       \
        }                                                                                                           \
        if (predicate == polarity) r = income;                                                                      \
        EMU_ISSUE(r, "v_" #RESULT "_sel_" #NAME "_" #KIND, VECTOR, emu::LATENCY_ADD, a, b, c, d, income);           \
        return r;                                                                                                   \
    }

#define EMU_COMPARES(KIND, A)         \
    EMU_COMPARE(eq, KIND, A, x == y)  \
    EMU_COMPARE(neq, KIND, A, x != y) \
    EMU_COMPARE(less, KIND, A, x < y) \
    EMU_COMPARE(leq, KIND, A, x <= y) \
    EMU_COMPARE(grt, KIND, A, x > y)  \
    EMU_COMPARE(geq, KIND, A, x >= y)
EMU_COMPARES(f32, float64)
EMU_COMPARES(i32, int64)
EMU_COMPARES(u32, uint64)

// accumulator + a b, or accumulator - a b with SW_NEG.
EMU_FUNCTION float64 v_f32_mac_b(const float64& a, const float64& b, const float64& accumulator, int sw = 0,
                                 EMU_PREDICATE) {
    emu::only(sw, SW_NEG, "v_f32_mac");
    float64 r;
    const float sign = sw & SW_NEG ? -1.0f : 1.0f;
    for (int l = 0; l < 64; l++)
        emu::lanes(r)[l] = emu::fused(sign * emu::lanes(a)[l], emu::lanes(b)[l], emu::lanes(accumulator)[l]);
    if (predicate == polarity) r = accumulator;
    EMU_ISSUE(r, "v_f32_mac", VECTOR, emu::LATENCY_MUL, a, b, EMU_ACCUMULATOR(accumulator));
    return r;
}

EMU_FUNCTION float64 v_f32_mac_vb(const float64& a, const float64& b, const float64& accumulator, int sw,
                                  const bool64& predicate, bool polarity = false) {
    emu::only(sw, SW_NEG, "v_f32_mac");
    float64 r;
    const float sign = sw & SW_NEG ? -1.0f : 1.0f;
    for (int l = 0; l < 64; l++)
        emu::lanes(r)[l] = emu::fused(sign * emu::lanes(a)[l], emu::lanes(b)[l], emu::lanes(accumulator)[l]);
    emu::choose(r, accumulator, predicate, polarity);
    EMU_ISSUE(r, "v_f32_mac", VECTOR, emu::LATENCY_MUL, a, b, EMU_ACCUMULATOR(accumulator), predicate);
    return r;
}

EMU_FUNCTION float64 v_f32_madd_b(const float64& a, const float64& b, const float64& c, int sw = 0,
                                  const float64& income = {}, EMU_PREDICATE) {
    emu::only(sw, SW_NEG, "v_f32_madd");
    float64 r;
    const float sign = sw & SW_NEG ? -1.0f : 1.0f;
    for (int l = 0; l < 64; l++)
        emu::lanes(r)[l] = emu::fused(sign * emu::lanes(a)[l], emu::lanes(b)[l], emu::lanes(c)[l]);
    if (predicate == polarity) r = income;
    EMU_ISSUE(r, "v_f32_madd", VECTOR, emu::LATENCY_MUL, a, b, c, income);
    return r;
}

// 128 lanes of bfloat16 are two vectors of float32, the lower lanes first.
EMU_FUNCTION float128 v_convert_bf16_to_f32_all_b(const bfloat128& a, int sw = 0, const float128& income = {},
                                                  EMU_PREDICATE) {
    emu::only(sw, 0, "v_convert_bf16_to_f32_all");
    float128 r;
    for (int l = 0; l < 64; l++) {
        emu::lanes(r.v1)[l] = emu::from_bf16(emu::lanes(a)[l]);
        emu::lanes(r.v2)[l] = emu::from_bf16(emu::lanes(a)[l + 64]);
    }
    if (predicate == polarity) r = income;
    EMU_ISSUE(r.v1, "v_convert_bf16_to_f32_all", VECTOR, emu::LATENCY_ADD, a, income.v1);
    EMU_ISSUE(r.v2, "v_convert_bf16_to_f32_all, second half", VECTOR, emu::LATENCY_ADD, a, income.v2);
    return r;
}

EMU_FUNCTION bfloat128 v_convert_f32_to_bf16_all_b(const float128& a, int sw = 0, const bfloat128& income = {},
                                                   EMU_PREDICATE) {
    emu::only(sw, 0, "v_convert_f32_to_bf16_all");
    bfloat128 r;
    for (int l = 0; l < 64; l++) {
        emu::lanes(r)[l] = emu::to_bf16(emu::lanes(a.v1)[l]);
        emu::lanes(r)[l + 64] = emu::to_bf16(emu::lanes(a.v2)[l]);
    }
    if (predicate == polarity) r = income;
    EMU_ISSUE(r, "v_convert_f32_to_bf16_all", VECTOR, emu::LATENCY_ADD, a.v1, a.v2, income);
    return r;
}

// Scalars, which the machine computes in registers of their own.
#define EMU_SCALAR(NAME, R, T, VALUE)                                   \
    inline R NAME(T a, T b, int sw = 0, R income = {}, EMU_PREDICATE) { \
        emu::only(sw, 0, #NAME);                                        \
        EMU_ISSUE_EFFECT(#NAME, SCALAR);                                \
        return predicate == polarity ? income : (VALUE);                \
    }
EMU_SCALAR(s_i32_add, int32_t, int32_t, (int32_t)((uint32_t)a + (uint32_t)b))
EMU_SCALAR(s_i32_min, int32_t, int32_t, a < b ? a : b)
EMU_SCALAR(s_i32_max, int32_t, int32_t, a > b ? a : b)
EMU_SCALAR(s_i32_cmp_less, bool, int32_t, a < b)
EMU_SCALAR(s_f32_mul, float, float, a* b)
EMU_SCALAR(s_f32_add, float, float, a + b)
EMU_SCALAR(s_f32_max, float, float, emu::larger(a, b))
EMU_SCALAR(s_f32_min, float, float, emu::smaller(a, b))

inline float s_f32_mac(float a, float b, float accumulator, int sw = 0, EMU_PREDICATE) {
    emu::only(sw, SW_NEG, "s_f32_mac");
    EMU_ISSUE_EFFECT("s_f32_mac", SCALAR);
    return predicate == polarity ? accumulator : emu::fused(sw & SW_NEG ? -a : a, b, accumulator);
}

inline float s_convert_i32_to_f32(int32_t a, int sw = 0, float income = {}, EMU_PREDICATE) {
    emu::only(sw, 0, "s_convert_i32_to_f32");
    EMU_ISSUE_EFFECT("s_convert_i32_to_f32", SCALAR);
    return predicate == polarity ? income : (float)a;
}
