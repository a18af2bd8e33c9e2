// Tensors, global memory, local memory by address, coordinates.
#pragma once
#include "lanes.h"

inline int5 get_index_space_offset() { return emu::machine.offset; }
inline int5 get_index_space_size() { return emu::machine.size; }
inline uint32_t get_dim_size(int t, uint32_t dimension) {
    emu::Tensor& description = emu::tensor_of(t);
    if (dimension > 4) emu::violate("tensor", t, nullptr, "there is no dimension %u", dimension);
    return (uint32_t)description.size[dimension];
}
inline uint32_t get_dim_stride(int t, uint32_t dimension) {
    emu::Tensor& description = emu::tensor_of(t);
    if (dimension > 4) emu::violate("tensor", t, nullptr, "there is no dimension %u", dimension);
    return (uint32_t)description.stride[dimension];
}
inline float get_pad_value_float(int t) {
    emu::tensor_of(t);
    return emu::machine.pad[t];
}
inline void set_pad_value_float(int t, float value) {
    emu::tensor_of(t);
    emu::machine.pad[t] = value;
}

namespace emu {

enum Access { READ, WRITE };

// The elements [first, last) of `count` from coordinates on that are inside of a tensor.
struct Span {
    Tensor& of;
    int first, last;
    int64_t at;  // of element 0, in elements
};

inline Span span(int t, const int5& c, int count, int32_t dtype, Access access, const char* intrinsic) {
    Tensor& of = tensor_of(t);
    if (of.dtype != dtype) violate("dtype", t, &c, "%s: the tensor has another element type", intrinsic);
    if (access == WRITE && !of.writer) violate("input", t, &c, "%s: an input cannot be stored to", intrinsic);
    int64_t first = c.e[0] < 0 ? -(int64_t)c.e[0] : 0, last = of.size[0] - c.e[0], at = c.e[0];
    if (last > count) last = count;
    for (int d = 1; d < 5; d++) {
        if (c.e[d] < 0 || c.e[d] >= of.size[d]) last = 0;
        at += of.stride[d] * c.e[d];
    }
    if (last <= first) return {of, 0, 0, 0};
    if (machine.boxes) {
        Box& box = machine.boxes[2 * t + access];
        for (int d = 0; d < 5; d++) {
            const int32_t low = c.e[d] + (d ? 0 : (int32_t)first), high = d ? c.e[d] : c.e[0] + (int32_t)last - 1;
            if (low < box.low[d]) box.low[d] = low;
            if (high > box.high[d]) box.high[d] = high;
        }
    }
    return {of, (int)first, (int)last, at};
}

template <class T, int N>
void load(vec<T, N>& r, T pad, int t, const int5& c, int32_t dtype, int count, int to, const char* intrinsic) {
    const Span s = span(t, c, count, dtype, READ, intrinsic);
    for (int l = 0; l < count; l++) lanes(r)[to + l] = pad;
    if (s.last <= s.first) return;
    if (s.of.writer)
        for (int l = s.first; l < s.last; l++)
            if (s.of.writer[s.at + l])
                violate("load after store", t, &c, "%s: lane %d was stored before by this launch", intrinsic, l);
    std::memcpy(lanes(r) + to + s.first, (const T*)s.of.data + s.at + s.first, (s.last - s.first) * sizeof(T));
}

template <class T, int N>
void store(const vec<T, N>& v, int t, const int5& c, int32_t dtype, int count, int from, const char* intrinsic) {
    const Span s = span(t, c, count, dtype, WRITE, intrinsic);
    for (int l = s.first; l < s.last; l++) {
        uint32_t& writer = s.of.writer[s.at + l];
        if (writer && writer != machine.call)
            violate("member", t, &c, "%s: lane %d is stored by two calls, whose order is not known", intrinsic, l);
        writer = machine.call;
    }
    if (s.last > s.first)
        std::memcpy((T*)s.of.data + s.at + s.first, lanes(v) + from + s.first, (s.last - s.first) * sizeof(T));
}

}  // namespace emu

// Vectors of tensors: whole, and size + 1 elements from lane `offset` on.
#define EMU_TENSOR(NAME, V, T, DTYPE, PAD)                                                                         \
    EMU_FUNCTION V v_##NAME##_ld_tnsr_b(const int5& c, int t, int sw = 0, const V& income = {}, EMU_PREDICATE) {   \
        emu::only(sw, 0, "v_" #NAME "_ld_tnsr");                                                                   \
        V r = income;                                                                                              \
        if (predicate != polarity) emu::load(r, PAD, t, c, DTYPE, 256 / sizeof(T), 0, "v_" #NAME "_ld_tnsr");      \
        EMU_ISSUE(r, "v_" #NAME "_ld_tnsr", LOAD, emu::LATENCY_LOAD, income);                                      \
        return r;                                                                                                  \
    }                                                                                                              \
    EMU_FUNCTION V v_##NAME##_ld_tnsr_partial_b(const int5& c, int t, int8_t size, int8_t offset, int sw = 0,      \
                                          const V& income = {}, EMU_PREDICATE) {                                   \
        emu::only(sw, 0, "v_" #NAME "_ld_tnsr_partial");                                                           \
        emu::partial(t, c, size, offset, 256 / sizeof(T));                                                         \
        V r = income;                                                                                              \
        if (predicate != polarity)                                                                                 \
            emu::load(r, PAD, t, c, DTYPE, size + 1, offset, "v_" #NAME "_ld_tnsr_partial");                       \
        EMU_ISSUE(r, "v_" #NAME "_ld_tnsr_partial", LOAD, emu::LATENCY_LOAD, income);                              \
        return r;                                                                                                  \
    }                                                                                                              \
    EMU_FUNCTION void v_##NAME##_st_tnsr(const int5& c, int t, const V& value, int sw = 0, EMU_PREDICATE) {        \
        emu::only(sw, 0, "v_" #NAME "_st_tnsr");                                                                   \
        if (predicate != polarity) emu::store(value, t, c, DTYPE, 256 / sizeof(T), 0, "v_" #NAME "_st_tnsr");      \
        EMU_ISSUE_EFFECT("v_" #NAME "_st_tnsr", STORE, value);                                                     \
    }                                                                                                              \
    EMU_FUNCTION void v_##NAME##_st_tnsr_partial(const int5& c, int t, const V& value, int8_t size, int8_t offset, \
                                           int sw = 0, EMU_PREDICATE) {                                            \
        emu::only(sw, 0, "v_" #NAME "_st_tnsr_partial");                                                           \
        emu::partial(t, c, size, offset, 256 / sizeof(T));                                                         \
        if (predicate != polarity)                                                                                 \
            emu::store(value, t, c, DTYPE, size + 1, offset, "v_" #NAME "_st_tnsr_partial");                       \
        EMU_ISSUE_EFFECT("v_" #NAME "_st_tnsr_partial", STORE, value);                                             \
    }

namespace emu {

inline void partial(int t, const int5& c, int size, int offset, int count) {
    if (size < 0 || offset < 0 || size + 1 + offset > count)
        violate("bounds", t, &c, "partial access to %d lanes from %d on", size + 1, offset);
}

}  // namespace emu

EMU_TENSOR(f32, float64, float, emu::F32, emu::machine.pad[t])
EMU_TENSOR(i32, int64, int32_t, emu::I32, 0)
EMU_TENSOR(bf16, bfloat128, uint16_t, emu::BF16, emu::to_bf16(emu::machine.pad[t]))

// Global memory: an address in a tensor, which nothing checks on the machine.
inline void* gen_addr(const int5& c, int t, int sw = 0, void* income = {}, EMU_PREDICATE) {
    emu::only(sw, 0, "gen_addr");
    EMU_ISSUE_EFFECT("gen_addr", LOAD);
    if (predicate == polarity) return income;
    emu::Tensor& of = emu::tensor_of(t);
    int64_t at = 0;
    for (int d = 0; d < 5; d++) {
        if (c.e[d] < 0 || c.e[d] >= of.size[d])
            emu::violate("bounds", t, &c, "gen_addr: dimension %d has %lld elements", d, (long long)of.size[d]);
        at += of.stride[d] * c.e[d];
    }
    return of.data + at * emu::itemsize(of.dtype);
}

namespace emu {

// The element of a tensor that an address of gen_addr stands for, box and writer noted.
inline void touch(const void* address, int32_t dtype, Access access, const char* intrinsic) {
    for (int t = 0; t < machine.count; t++) {
        const Tensor& of = machine.tensors[t];
        int64_t extent = 1;
        for (int d = 0; d < 5; d++) extent += (of.size[d] - 1) * of.stride[d];
        const int64_t bytes = (const char*)address - of.data;
        if (bytes < 0 || bytes >= extent * itemsize(of.dtype)) continue;
        int64_t rest = bytes / itemsize(of.dtype);
        int5 c;
        for (int d = 4; d >= 0; d--) {
            const int64_t stride = of.stride[d];
            c.e[d] = of.size[d] > 1 && stride ? (int32_t)(rest / stride) : 0;
            rest -= c.e[d] * stride;
        }
        const Span s = span(t, c, 1, dtype, access, intrinsic);
        if (access == WRITE && s.last) {
            uint32_t& writer = s.of.writer[s.at];
            if (writer && writer != machine.call) violate("member", t, &c, "%s: stored by two calls", intrinsic);
            writer = machine.call;
        }
        return;
    }
    violate("bounds", -1, nullptr, "%s: the address is in no tensor", intrinsic);
}

}  // namespace emu

#define EMU_GLOBAL(NAME, T, DTYPE)                                                            \
    inline T s_##NAME##_ld_g(const void* address, int sw = 0, T income = {}, EMU_PREDICATE) { \
        emu::only(sw, 0, "s_" #NAME "_ld_g");                                                 \
        EMU_ISSUE_EFFECT("s_" #NAME "_ld_g", LOAD);                                           \
        if (predicate == polarity) return income;                                             \
        emu::touch(address, DTYPE, emu::READ, "s_" #NAME "_ld_g");                            \
        T value;                                                                              \
        std::memcpy(&value, address, sizeof value);                                           \
        return value;                                                                         \
    }                                                                                         \
    inline void s_##NAME##_st_g(void* address, T value, int sw = 0, EMU_PREDICATE) {          \
        emu::only(sw, 0, "s_" #NAME "_st_g");                                                 \
        EMU_ISSUE_EFFECT("s_" #NAME "_st_g", STORE);                                          \
        if (predicate == polarity) return;                                                    \
        emu::touch(address, DTYPE, emu::WRITE, "s_" #NAME "_st_g");                           \
        std::memcpy(address, &value, sizeof value);                                           \
    }
EMU_GLOBAL(f32, float, emu::F32)
EMU_GLOBAL(i32, int32_t, emu::I32)

// A scalar of global memory in every lane.
EMU_FUNCTION float64 v_f32_ld_g(const void* address, int sw = 0, const float64& income = {}, EMU_PREDICATE) {
    emu::only(sw, 0, "v_f32_ld_g");
    float64 r = income;
    if (predicate != polarity) {
        emu::touch(address, emu::F32, emu::READ, "v_f32_ld_g");
        float value;
        std::memcpy(&value, address, sizeof value);
        for (int l = 0; l < 64; l++) emu::lanes(r)[l] = value;
    }
    EMU_ISSUE(r, "v_f32_ld_g", LOAD, emu::LATENCY_LOAD, income);
    return r;
}

inline void s_f32_st_tnsr_s(const int5& c, int t, float value, int sw = 0, EMU_PREDICATE) {
    emu::only(sw, 0, "s_f32_st_tnsr_s");
    if (predicate != polarity) emu::store(float64(value), t, c, emu::F32, 1, 0, "s_f32_st_tnsr_s");
    EMU_ISSUE_EFFECT("s_f32_st_tnsr_s", STORE);
}

inline void prefetch(const void*, int sw = 0, EMU_PREDICATE) {
    emu::only(sw, 0, "prefetch");
    (void)predicate, (void)polarity;
    EMU_ISSUE_EFFECT("prefetch", LOAD);
}

// Coordinates.
inline int5 set_indx(int value, int5 c, int dimensions, int sw = 0, EMU_PREDICATE) {
    emu::only(sw, 0, "set_indx");
    EMU_ISSUE_EFFECT("set_indx", SCALAR);
    for (int d = 0; d < 5; d++)
        if (predicate != polarity && dimensions >> d & 1) c.e[d] = value;
    return c;
}
inline int5 i_i32_mov(int5 a, int dimensions, int sw, int5 income, EMU_PREDICATE) {
    emu::only(sw, 0, "i_i32_mov");
    EMU_ISSUE_EFFECT("i_i32_mov", SCALAR);
    for (int d = 0; d < 5; d++)
        if (predicate != polarity && dimensions >> d & 1) income.e[d] = a.e[d];
    return income;
}
inline int5 i_i32_add(int5 a, int5 b, int dimensions, int sw, int5 income, EMU_PREDICATE) {
    emu::only(sw, 0, "i_i32_add");
    EMU_ISSUE_EFFECT("i_i32_add", SCALAR);
    for (int d = 0; d < 5; d++)
        if (predicate != polarity && dimensions >> d & 1) income.e[d] = a.e[d] + b.e[d];
    return income;
}
inline int32_t mov_irf_dim(int5 c, int8_t dimension, int sw, int32_t income = {}, EMU_PREDICATE) {
    emu::only(sw, 0, "mov_irf_dim");
    EMU_ISSUE_EFFECT("mov_irf_dim", SCALAR);
    if (dimension < 0 || dimension > 4) emu::violate("subset", -1, nullptr, "there is no dimension %d", dimension);
    return predicate == polarity ? income : c.e[dimension];
}
