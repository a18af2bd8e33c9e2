// Runs the kernel that was included before: as random boxes of index-space members in random order, or a member at a
// time with a record of what each touched. The C interface that otfuse/_backends/tpc/emulator.py calls.
//
// EMU_SOURCE_LOCALS(EACH) names the kernel's variables in local memory, as EACH(name) EACH(other).
#pragma once
#include "memory.h"
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace emu {

// Subnormals are flushed, on input and output, while a kernel runs.
#if defined(__SSE__)
inline unsigned flush_subnormals() {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
inline void restore_subnormals(unsigned before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
inline uint64_t flush_subnormals() {
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
    return before;
}
inline void restore_subnormals(uint64_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#else
#error "the emulator knows how to flush subnormals on x86 and on 64-bit ARM only"
#endif

struct Random {  // xorshift64*
    uint64_t state;
    uint32_t below(uint32_t bound) {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return (uint32_t)((state * 0x2545F4914F6CDD1Dull >> 33) % bound);
    }
};

// One dimension of the index space, cut at random: the bounds of its pieces.
struct Cuts {
    int32_t pieces, bounds[9];
};

inline Cuts cut(int32_t size, Random& random) {
    Cuts cuts = {1 + (int32_t)random.below(size < 8 ? size : 8), {}};
    for (int i = 1; i < cuts.pieces; i++) cuts.bounds[i] = 1 + random.below(size - 1);
    cuts.bounds[cuts.pieces] = size;
    for (int i = 1; i < cuts.pieces; i++)  // insertion sort; a piece may be empty
        for (int j = i; j > 1 && cuts.bounds[j] < cuts.bounds[j - 1]; j--) {
            const int32_t kept = cuts.bounds[j];
            cuts.bounds[j] = cuts.bounds[j - 1], cuts.bounds[j - 1] = kept;
        }
    return cuts;
}

template <class A> A argument(const uint32_t* scalars, int tensors, int at) {
    if constexpr (std::is_same<A, tensor>::value) {
        return tensor(at);
    } else {
        static_assert(std::is_arithmetic<A>::value && sizeof(A) == 4, "a scalar parameter has 32 bits");
        A value;
        std::memcpy(&value, &scalars[at - tensors], 4);
        return value;
    }
}

template <class... A> constexpr int tensors_of() { return (0 + ... + (int)std::is_same<A, tensor>::value); }

template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I> struct Count<0, I...> {
    using type = Indices<I...>;
};

template <class... A, size_t... I>
void invoke(void (*kernel)(A...), const uint32_t* scalars, Indices<I...>) {
    constexpr int tensors = tensors_of<std::decay_t<A>...>();
    static_assert(tensors <= 16, "a kernel has at most 16 tensors");
    static_assert(sizeof...(A) - tensors <= 32, "a kernel has at most 32 scalar parameters");
    kernel(argument<std::decay_t<A>>(scalars, tensors, (int)I)...);
}

template <class... A> void invoke(void (*kernel)(A...), const uint32_t* scalars) {
    invoke(kernel, scalars, typename Count<sizeof...(A)>::type());
}

#define EMU_POISON(NAME) emu::poison(NAME);
inline void run_box(const uint32_t* scalars) {
    machine.call++;
    for (int t = 0; t < machine.count; t++) machine.pad[t] = machine.tensors[t].pad;
    EMU_SOURCE_LOCALS(EMU_POISON)
    invoke(tpc_main, scalars);
}

inline void run_member_by_member(const int32_t* space, const uint32_t* scalars, Box* boxes) {
    machine.size = {{1, 1, 1, 1, 1}};
    int5& at = machine.offset;
    for (at[4] = 0; at[4] < space[4]; at[4]++)
        for (at[3] = 0; at[3] < space[3]; at[3]++)
            for (at[2] = 0; at[2] < space[2]; at[2]++)
                for (at[1] = 0; at[1] < space[1]; at[1]++)
                    for (at[0] = 0; at[0] < space[0]; at[0]++) {
                        machine.boxes = boxes;
                        for (int i = 0; i < 2 * machine.count; i++)
                            for (int d = 0; d < 5; d++) boxes[i].low[d] = INT32_MAX, boxes[i].high[d] = -1;
                        boxes += 2 * machine.count;
                        run_box(scalars);
                    }
}

inline void run_random_boxes(const int32_t* space, const uint32_t* scalars, uint64_t seed) {
    Random random = {seed * 2 + 1};
    Cuts cuts[5];
    int total = 1;
    for (int d = 0; d < 5; d++) {
        cuts[d] = seed ? cut(space[d], random) : Cuts{1, {0, space[d]}};  // seed 0: all of it in one box
        total *= cuts[d].pieces;
    }
    static int order[8 * 8 * 8 * 8 * 8];
    for (int i = 0; i < total; i++) {
        const int j = random.below(i + 1);
        order[i] = order[j], order[j] = i;
    }
    for (int i = 0; i < total; i++) {
        int rest = order[i];
        bool empty = false;
        for (int d = 0; d < 5; d++) {
            const int32_t* bounds = cuts[d].bounds + rest % cuts[d].pieces;
            rest /= cuts[d].pieces;
            machine.offset[d] = bounds[0];
            machine.size[d] = bounds[1] - bounds[0];
            empty = empty || bounds[1] == bounds[0];
        }
        if (!empty) run_box(scalars);
    }
}

// Local memory that the kernel declares, in bytes.
#define EMU_VECTOR_BYTES(NAME) +emu::local_bytes<decltype(NAME)>::vector
#define EMU_SCALAR_BYTES(NAME) +emu::local_bytes<decltype(NAME)>::scalar
constexpr size_t vlm = 0 EMU_SOURCE_LOCALS(EMU_VECTOR_BYTES);
constexpr size_t slm = 0 EMU_SOURCE_LOCALS(EMU_SCALAR_BYTES);
static_assert(vlm <= EMU_SOURCE_VLM, "the kernel's vectors exceed local memory: 80 KB, 16 KB with a LOOKUP");
static_assert(slm <= MAX_SLM, "the kernel's scalars exceed local memory: 16 KB");

}  // namespace emu

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

EMU_EXPORT const char* otfuse_tpc_parameters() { return EMU_SOURCE_SIGNATURE; }
EMU_EXPORT int64_t otfuse_tpc_vector_bytes() { return emu::vlm; }

// 0, or 1 with a violation. boxes: [members][tensors][load, store] for a run member by member, or null.
EMU_EXPORT int otfuse_tpc_run(emu::Tensor* tensors, int count, const uint32_t* scalars, const int32_t* space,
                              uint64_t seed, emu::Box* boxes, emu::Violation* violation) {
    emu::machine.tensors = tensors;
    emu::machine.count = count;
    emu::machine.call = 0;
    emu::machine.boxes = nullptr;
    emu::machine.violation = violation;
    const auto before = emu::flush_subnormals();
    const int broken = setjmp(emu::machine.end);
    if (!broken) {
        if (boxes)
            emu::run_member_by_member(space, scalars, boxes);
        else
            emu::run_random_boxes(space, scalars, seed);
    }
    emu::restore_subnormals(before);
    return broken;
}

#ifdef OTFUSE_TPC_COUNT
EMU_EXPORT void otfuse_tpc_reset_counts() {
    emu::counts = {};
    for (int s = 0; s < emu::SLOTS; s++) emu::counts.used[s] = -1;
    for (emu::Counter* c = emu::Counter::first; c; c = c->next) c->count = 0;
}
// counts: load, scalar, vector, store, chain, ordered. The return value is the first operation's handle.
EMU_EXPORT const void* otfuse_tpc_counts(int64_t* counts) {
    for (int s = 0; s < emu::SLOTS; s++) counts[s] = emu::counts.slots[s];
    counts[4] = emu::counts.chain;
    counts[5] = emu::counts.ordered;
    return emu::Counter::first;
}
EMU_EXPORT const void* otfuse_tpc_operation(const void* handle, const char** name, int32_t* slot, int64_t* count) {
    const emu::Counter* c = (const emu::Counter*)handle;
    *name = c->name, *slot = c->slot, *count = c->count;
    return c->next;
}
#endif
