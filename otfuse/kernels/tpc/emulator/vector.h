// The vector types: 256 bytes each, with the operators of the language and no way to get at a lane.
#pragma once
#include "count.h"

namespace emu {

struct access;

// T is an element, N their number. Like the compiler's own types these have no contents until they are given some.
template <class T, int N> class alignas(64) vec {
    T e[N];
#ifdef OTFUSE_TPC_COUNT
    Times ready = {0, 0};
#endif
    friend struct access;

  public:
    vec() = default;
    template <class S, class = std::enable_if_t<std::is_arithmetic<S>::value && !std::is_same<S, double>::value>>
    vec(S scalar) {
        for (int l = 0; l < N; l++) e[l] = (T)scalar;
#ifdef OTFUSE_TPC_COUNT
        ready = {0, 0};
#endif
    }
    vec(double) = delete;  // there is none on the machine: write 1.0f

    // A cast keeps the bits.
    template <class U, int M, class = std::enable_if_t<!std::is_same<vec<U, M>, vec>::value>>
    explicit vec(const vec<U, M>& other) {
        static_assert(sizeof(U) * M == sizeof(T) * N, "a cast between vectors keeps the bits");
        std::memcpy(e, (const void*)__builtin_addressof(other), sizeof e);
#ifdef OTFUSE_TPC_COUNT
        ready = operand(other);
#endif
    }

#ifdef OTFUSE_TPC_COUNT
    vec(const vec& other) {
        std::memcpy(e, other.e, sizeof e);
        ready = operand(other);
    }
    vec& operator=(const vec& other) {
        std::memmove(e, other.e, sizeof e);
        ready = operand(other);
        if (is_local(this)) {
            static Counter store("local store", STORE);
            ready = issue(store, 1, ready);
        }
        return *this;
    }
    Times& times() { return ready; }
    Times times() const { return ready; }
#endif

    // A pointer to a vector is good for the vector's own bits only: *(int64*)&x, never *(float*)&x.
    class pointer {
        vec* to;

      public:
        pointer(vec* to) : to(to) {}
        operator vec*() const { return to; }
        template <class U, int M> explicit operator vec<U, M>*() const { return (vec<U, M>*)(void*)to; }
        vec& operator*() const { return *to; }
    };
    pointer operator&() { return pointer(this); }
    pointer operator&() const { return pointer(const_cast<vec*>(this)); }
};

struct access {
    template <class T, int N> static T* of(vec<T, N>& v) { return v.e; }
    template <class T, int N> static const T* of(const vec<T, N>& v) { return v.e; }
};

template <class T, int N> T* lanes(vec<T, N>& v) { return access::of(v); }
template <class T, int N> const T* lanes(const vec<T, N>& v) { return access::of(v); }

// One bit a lane, kept in a byte.
template <int N> using mask = vec<bool, N>;

// Two vectors.
template <class V> struct pair {
    V v1, v2;
};

// As a register or local memory is before anything was stored: NaN.
template <class T, int N> void poison(vec<T, N>& v) {
    static const uint32_t nan = 0x7FC0DEAD;
    char* bytes = (char*)lanes(v);
    for (size_t at = 0; at < sizeof(T) * N; at += 4) std::memcpy(bytes + at, &nan, 4);
#ifdef OTFUSE_TPC_COUNT
    v.times() = {0, 0};
#endif
}
template <class V> void poison(pair<V>& p) {
    poison(p.v1);
    poison(p.v2);
}
template <class S, class = std::enable_if_t<std::is_arithmetic<S>::value>> void poison(S& scalar) {
    const uint32_t nan = 0x7FC0DEAD;
    std::memcpy(&scalar, &nan, sizeof scalar < 4 ? sizeof scalar : 4);
}
template <class E, size_t N> void poison(E (&array)[N]) {
    for (size_t i = 0; i < N; i++) poison(array[i]);
}

// Bytes of vector and scalar local memory that a variable takes.
template <class E> struct local_bytes {
    static constexpr size_t vector = 0, scalar = sizeof(E);
};
template <class T, int N> struct local_bytes<vec<T, N>> {
    static constexpr size_t vector = sizeof(T) * N, scalar = 0;
};
template <class V> struct local_bytes<pair<V>> {
    static constexpr size_t vector = 2 * local_bytes<V>::vector, scalar = 0;
};
template <class E, size_t N> struct local_bytes<E[N]> {
    static constexpr size_t vector = N * local_bytes<E>::vector, scalar = N * local_bytes<E>::scalar;
};

}  // namespace emu

using float64 = emu::vec<float, 64>;
using int64 = emu::vec<int32_t, 64>;
using uint64 = emu::vec<uint32_t, 64>;
using bfloat128 = emu::vec<uint16_t, 128>;
using char256 = emu::vec<int8_t, 256>;
using uchar256 = emu::vec<uint8_t, 256>;
using bool64 = emu::mask<64>;
using float128 = emu::pair<float64>;
using int128 = emu::pair<int64>;
using uint128 = emu::pair<uint64>;

#define __local__ __attribute__((section("tpc_local")))
#define __global__
#define __global
#define EMU_PREDICATE bool predicate = true, bool polarity = false

#define EMU_OPERATOR(V, OPERATOR, LATENCY)                                          \
    EMU_FUNCTION V operator OPERATOR(const V& a, const V& b) {                      \
        V r;                                                                        \
        auto *x = emu::lanes(a), *y = emu::lanes(b);                                \
        auto* z = emu::lanes(r);                                                    \
        for (int l = 0; l < (int)(256 / sizeof *z); l++) z[l] = x[l] OPERATOR y[l]; \
        EMU_ISSUE(r, "operator " #OPERATOR, VECTOR, emu::LATENCY, a, b);            \
        return r;                                                                   \
    }                                                                               \
    inline V& operator OPERATOR##=(V& a, const V& b) { return a = a OPERATOR b; }

EMU_OPERATOR(float64, +, LATENCY_ADD)
EMU_OPERATOR(float64, -, LATENCY_ADD)
EMU_OPERATOR(float64, *, LATENCY_MUL)

// Integers wrap around, which in C++ unsigned ones alone do.
#define EMU_SIGNED_OPERATOR(OPERATOR)                                                                     \
    EMU_FUNCTION int64 operator OPERATOR(const int64& a, const int64& b) {                                \
        int64 r;                                                                                          \
        for (int l = 0; l < 64; l++)                                                                      \
            emu::lanes(r)[l] = (int32_t)((uint32_t)emu::lanes(a)[l] OPERATOR (uint32_t)emu::lanes(b)[l]); \
        EMU_ISSUE(r, "operator " #OPERATOR, VECTOR, emu::LATENCY_ADD, a, b);                              \
        return r;                                                                                         \
    }                                                                                                     \
    inline int64& operator OPERATOR##=(int64& a, const int64& b) { return a = a OPERATOR b; }
EMU_SIGNED_OPERATOR(+)
EMU_SIGNED_OPERATOR(-)
EMU_SIGNED_OPERATOR(&)
EMU_SIGNED_OPERATOR(|)
EMU_SIGNED_OPERATOR(^)
EMU_OPERATOR(uint64, +, LATENCY_ADD)
EMU_OPERATOR(uint64, -, LATENCY_ADD)
EMU_OPERATOR(uint64, &, LATENCY_ADD)
EMU_OPERATOR(uint64, |, LATENCY_ADD)
EMU_OPERATOR(uint64, ^, LATENCY_ADD)
EMU_OPERATOR(uchar256, &, LATENCY_ADD)
EMU_OPERATOR(uchar256, |, LATENCY_ADD)
EMU_OPERATOR(uchar256, ^, LATENCY_ADD)

// By a number of bits outside [0, 32): nothing is left.
#define EMU_SHIFT(OPERATOR)                                                                            \
    EMU_FUNCTION uint64 operator OPERATOR(const uint64& a, const uint64& b) {                          \
        uint64 r;                                                                                      \
        for (int l = 0; l < 64; l++)                                                                   \
            emu::lanes(r)[l] = emu::lanes(b)[l] < 32 ? emu::lanes(a)[l] OPERATOR emu::lanes(b)[l] : 0; \
        EMU_ISSUE(r, "operator " #OPERATOR, VECTOR, emu::LATENCY_ADD, a, b);                           \
        return r;                                                                                      \
    }                                                                                                  \
    inline uint64& operator OPERATOR##=(uint64& a, const uint64& b) { return a = a OPERATOR b; }
EMU_SHIFT(<<)
EMU_SHIFT(>>)

EMU_FUNCTION float64 operator-(const float64& a) { return float64(uint64(a) ^ uint64(0x80000000u)); }
EMU_FUNCTION int64 operator-(const int64& a) { return int64(0) - a; }
EMU_FUNCTION int64 operator~(const int64& a) { return a ^ int64(-1); }
EMU_FUNCTION uint64 operator~(const uint64& a) { return a ^ uint64(~0u); }

#define EMU_MASK_OPERATOR(OPERATOR)                                                                           \
    EMU_FUNCTION bool64 operator OPERATOR(const bool64& a, const bool64& b) {                                 \
        bool64 r;                                                                                             \
        for (int l = 0; l < 64; l++) emu::lanes(r)[l] = (int)emu::lanes(a)[l] OPERATOR (int)emu::lanes(b)[l]; \
        EMU_ISSUE(r, "operator " #OPERATOR " of masks", VECTOR, emu::LATENCY_ADD, a, b);                      \
        return r;                                                                                             \
    }
EMU_MASK_OPERATOR(&)
EMU_MASK_OPERATOR(|)
EMU_MASK_OPERATOR(^)
EMU_FUNCTION bool64 operator~(const bool64& a) { return a ^ bool64(true); }
