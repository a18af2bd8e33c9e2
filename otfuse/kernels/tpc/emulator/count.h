// What a kernel issues, per slot and operation, and how long its chains of results are.
//
// chain: cycles of the longest chain of operations that wait for each other, with as many slots as it likes.
// ordered: cycles if bundles were filled in the order of the source, one operation a slot and cycle, each when its
// operands are there. A compiler reorders: it may do better, never better than chain nor than the fullest slot.
#pragma once
#include "machine.h"

namespace emu {

enum Slot { LOAD, SCALAR, VECTOR, STORE, SLOTS };

// Cycles between an operation and one that uses its result; seen in the public compiler's schedules for Gaudi 2.
enum Latency { LATENCY_LOAD = 4, LATENCY_ADD = 4, LATENCY_MUL = 6, LATENCY_DUAL_GROUP = 6, LATENCY_GROUP = 5,
               LATENCY_ACCUMULATOR = 4 };

#ifdef OTFUSE_TPC_COUNT

struct Times {
    int64_t chain, ordered;
};

struct Counter {
    const char* name;
    Slot slot;
    int64_t count;
    Counter* next;
    static inline Counter* first = nullptr;
    Counter(const char* name, Slot slot) : name(name), slot(slot), count(0), next(first) { first = this; }
};

struct Counts {
    int64_t slots[SLOTS];
    int64_t chain, ordered;
    int64_t clock, used[SLOTS];  // of the ordered schedule: the current bundle, and the last one with this slot taken
};
inline Counts counts;

extern "C" __attribute__((weak, visibility("hidden"))) char __start_tpc_local[], __stop_tpc_local[];

inline bool is_local(const void* p) { return (const char*)p >= __start_tpc_local && (const char*)p < __stop_tpc_local; }

inline Times issue(Counter& counter, int latency, Times operands) {
    counter.count++;
    counts.slots[counter.slot]++;
    int64_t& clock = counts.clock;
    int64_t& used = counts.used[counter.slot];
    if (operands.ordered > clock) clock = operands.ordered;
    if (used >= clock) clock = used + 1;
    used = clock;
    Times done = {operands.chain + latency, clock + latency};
    if (done.chain > counts.chain) counts.chain = done.chain;
    if (done.ordered > counts.ordered) counts.ordered = done.ordered;
    return done;
}

inline Times later(Times a, Times b) {
    return {a.chain > b.chain ? a.chain : b.chain, a.ordered > b.ordered ? a.ordered : b.ordered};
}

// When an operand can be used: a value in local memory has to be loaded first.
template <class V> Times operand(const V& v) {
    static Counter load("local load", LOAD);
    Times ready = v.times();
    return is_local(__builtin_addressof(v)) ? issue(load, LATENCY_LOAD, ready) : ready;
}
inline Times operand(Times t) { return t; }
inline Times operands() { return {0, 0}; }
template <class V, class... R> Times operands(const V& v, const R&... rest) {
    return later(operand(v), operands(rest...));
}

// An accumulator is wanted later than the factors.
template <class V> Times accumulator(const V& v) {
    Times t = operand(v);
    return {t.chain - (LATENCY_MUL - LATENCY_ACCUMULATOR), t.ordered - (LATENCY_MUL - LATENCY_ACCUMULATOR)};
}

#define EMU_ISSUE(RESULT, NAME, SLOT, LATENCY, ...)                                  \
    do {                                                                             \
        static emu::Counter counter(NAME, emu::SLOT);                                \
        (RESULT).times() = emu::issue(counter, LATENCY, emu::operands(__VA_ARGS__)); \
    } while (0)
#define EMU_ISSUE_EFFECT(NAME, SLOT, ...)                   \
    do {                                                    \
        static emu::Counter counter(NAME, emu::SLOT);       \
        emu::issue(counter, 1, emu::operands(__VA_ARGS__)); \
    } while (0)
#define EMU_ACCUMULATOR(V) emu::accumulator(V)

#else

#define EMU_ISSUE(...) ((void)0)
#define EMU_ISSUE_EFFECT(...) ((void)0)

#endif

}  // namespace emu
