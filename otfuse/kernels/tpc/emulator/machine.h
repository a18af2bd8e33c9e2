// The state of a launch: its tensors, where the running call stands, and how a broken rule ends it.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// Operations on vectors stay functions of their own: a kernel then compiles in a third of the time, and takes twice as
// long as one with all of them inlined.
#define EMU_FUNCTION __attribute__((noinline)) inline

#define MAX_VLM 81920
#define MAX_SLM 16384

struct int5 {
    int32_t e[5];
    int32_t& operator[](int dimension) { return e[dimension]; }
    int32_t operator[](int dimension) const { return e[dimension]; }
};

#define EMU_INT5(OPERATOR)                                           \
    inline int5 operator OPERATOR(int5 a, const int5& b) {           \
        for (int d = 0; d < 5; d++) a.e[d] = a.e[d] OPERATOR b.e[d]; \
        return a;                                                    \
    }                                                                \
    inline int5& operator OPERATOR##=(int5& a, const int5& b) { return a = a OPERATOR b; }
EMU_INT5(+)
EMU_INT5(-)
EMU_INT5(*)

// A tensor in a kernel is its position.
struct tensor {
    int id;
    tensor(int id) : id(id) {}
    operator int() const { return id; }
};

namespace emu {

enum Dtype : int32_t { F32 = 0, BF16 = 1, I32 = 2 };
inline int itemsize(int32_t dtype) { return dtype == BF16 ? 2 : 4; }

// As otfuse/_backends/tpc/emulator.py lays it out.
struct Tensor {
    char* data;
    uint32_t* writer;  // per element the call that stored it, 0 for none; null for an input
    int64_t size[5];
    int64_t stride[5];  // in elements; 1 in dimension 0
    int32_t dtype;
    float pad;
};

// Where a member touched a tensor, inclusive; empty while low > high.
struct Box {
    int32_t low[5];
    int32_t high[5];
};

struct Violation {
    char rule[64];
    char text[512];
    int32_t tensor;  // -1 for none
    int32_t has_coordinates;
    int32_t coordinates[5];
};

struct Machine {
    Tensor* tensors;
    int count;
    int5 offset, size;
    uint32_t call;  // from 1
    Box* boxes;     // [count][load, store] of the running call, or null
    Violation* violation;
    jmp_buf end;
    float pad[16];
};
inline Machine machine;

[[noreturn]] inline void violate(const char* rule, int t, const int5* at, const char* format, ...) {
    Violation& v = *machine.violation;
    snprintf(v.rule, sizeof v.rule, "%s", rule);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(v.text, sizeof v.text, format, arguments);
    va_end(arguments);
    v.tensor = t;
    v.has_coordinates = at != nullptr;
    if (at) std::memcpy(v.coordinates, at->e, sizeof v.coordinates);
    std::longjmp(machine.end, 1);  // kernels hold nothing to be destroyed, and a sanitizer's handler may not throw
}

inline Tensor& tensor_of(int id) {
    if (id < 0 || id >= machine.count) violate("tensor", -1, nullptr, "there is no tensor %d", id);
    return machine.tensors[id];
}

inline void only(int given, int known, const char* intrinsic) {
    if (given & ~known)
        violate("subset", -1, nullptr, "%s: switch %#x is not in the subset", intrinsic, given & ~known);
}

}  // namespace emu

// -fsanitize=bounds calls this for an index outside an array of local memory.
extern "C" __attribute__((visibility("hidden"), used)) void __ubsan_handle_out_of_bounds(void* site, void* index) {
    struct Site {
        const char* file;
        uint32_t line, column;
    };
    const Site* at = (const Site*)site;
    emu::violate("bounds", -1, nullptr, "index %lld outside a local array, %s:%u", (long long)(intptr_t)index, at->file,
                 at->line);
}
