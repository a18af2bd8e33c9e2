// Movement of lanes: 4 dual groups of 2 groups of 8. Read from documentation, never compared with hardware.
#pragma once
#include "arithmetic.h"

#define SW_GROUP0_EN 1
#define SW_GROUP1_EN 2
#define SW_DUAL_GROUP0_EN 4
#define SW_DUAL_GROUP1_EN 8
#define SW_DUAL_GROUP2_EN 16
#define SW_DUAL_GROUP3_EN 32
#define MkWrA(w0, w1, w2, w3) ((w0) << 16 | (w1) << 18 | (w2) << 20 | (w3) << 22)
#define MkWr(l, u) ((l) << 16 | (u) << 17)
#define V_LANE_ID_32 read_lane_id_4b_b()

EMU_FUNCTION uint64 read_lane_id_4b_b(const uint64& income = {}, EMU_PREDICATE) {
    uint64 r;
    for (int l = 0; l < 64; l++) emu::lanes(r)[l] = l;
    if (predicate == polarity) r = income;
    EMU_ISSUE(r, "read_lane_id_4b", VECTOR, emu::LATENCY_ADD, income);
    return r;
}

namespace emu {

inline void whole_lanes(uint32_t bytes, const char* intrinsic) {
    if (bytes != 0xFFFFFFFF) violate("subset", -1, nullptr, "%s: byte mask %#x is not in the subset", intrinsic, bytes);
}

}  // namespace emu

// Dual group d of the result is dual group s_d of a, where its two write bits (lower and upper group) say so.
EMU_FUNCTION float64 v_f32_mov_dual_group_all_b(const float64& a, uint32_t bytes, int s0, int s1, int s2, int s3,
                                                int sw, const float64& income, EMU_PREDICATE) {
    emu::whole_lanes(bytes, "v_f32_mov_dual_group_all");
    emu::only(sw, MkWrA(3, 3, 3, 3), "v_f32_mov_dual_group_all");
    float64 r;
    const int source[4] = {s0, s1, s2, s3};
    for (int d = 0; d < 4; d++) {
        if (source[d] < 0 || source[d] > 3) emu::violate("subset", -1, nullptr, "there is no dual group %d", source[d]);
        for (int half = 0; half < 2; half++) {
            const bool moved = predicate != polarity && sw >> (16 + 2 * d + half) & 1;
            const float* from = moved ? emu::lanes(a) + 16 * source[d] : emu::lanes(income) + 16 * d;
            std::memcpy(emu::lanes(r) + 16 * d + 8 * half, from + 8 * half, 8 * sizeof(float));
        }
    }
    EMU_ISSUE(r, "v_f32_mov_dual_group_all", VECTOR, emu::LATENCY_DUAL_GROUP, a, income);
    return r;
}

// One dual group, the others are income's.
EMU_FUNCTION float64 v_f32_mov_dual_group_b(const float64& a, uint32_t bytes, int source, int destination, int sw,
                                            const float64& income, EMU_PREDICATE) {
    emu::whole_lanes(bytes, "v_f32_mov_dual_group");
    emu::only(sw, MkWr(1, 1), "v_f32_mov_dual_group");
    if (source < 0 || source > 3 || destination < 0 || destination > 3)
        emu::violate("subset", -1, nullptr, "there is no dual group %d or %d", source, destination);
    float64 r = income;
    for (int half = 0; half < 2; half++)
        if (predicate != polarity && sw >> (16 + half) & 1)
            std::memcpy(emu::lanes(r) + 16 * destination + 8 * half, emu::lanes(a) + 16 * source + 8 * half,
                        8 * sizeof(float));
    EMU_ISSUE(r, "v_f32_mov_dual_group", VECTOR, emu::LATENCY_DUAL_GROUP, a, income);
    return r;
}

// The other group of the same dual group, where group and dual group are enabled.
EMU_FUNCTION float64 v_f32_mov_group_b(const float64& a, uint32_t bytes, int sw, const float64& income, EMU_PREDICATE) {
    emu::whole_lanes(bytes, "v_f32_mov_group");
    emu::only(sw, 63, "v_f32_mov_group");
    float64 r;
    for (int g = 0; g < 8; g++) {
        const bool moved = predicate != polarity && sw >> (2 + g / 2) & 1 && sw >> (g % 2) & 1;
        std::memcpy(emu::lanes(r) + 8 * g, moved ? emu::lanes(a) + 8 * (g ^ 1) : emu::lanes(income) + 8 * g,
                    8 * sizeof(float));
    }
    EMU_ISSUE(r, "v_f32_mov_group", VECTOR, emu::LATENCY_GROUP, a, income);
    return r;
}

// Within a dual group, by the byte of b at each lane: bits 0-2 the lane, bit 5 the group, bit 7 whether at all.
EMU_FUNCTION float64 v_f32_shuffle_b(const float64& a, const uchar256& b, int sw, const float64& income,
                                     EMU_PREDICATE) {
    emu::only(sw, 0, "v_f32_shuffle");
    float64 r;
    for (int l = 0; l < 64; l++) {
        const uint8_t control = emu::lanes(b)[4 * l];
        const int from = (l & ~15) | (control >> 5 & 1) << 3 | (control & 7);
        emu::lanes(r)[l] = predicate != polarity && control & 0x80 ? emu::lanes(a)[from] : emu::lanes(income)[l];
    }
    EMU_ISSUE(r, "v_f32_shuffle", VECTOR, emu::LATENCY_ADD, a, b, income);
    return r;
}
