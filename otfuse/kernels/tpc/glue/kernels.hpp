// The kernels as the host sees them: what each takes, gives and reads, in one table for glue and ops alike.
//
// Letters stand for sizes: B items, N rows and M columns of an item's matrix, T rounds, K rounds that are kept, S column
// tiles of a slice, H numbers of a kept round. The first tensor or scalar that has a letter says what it is; every other
// must agree.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace otfuse {

enum class Type {
    VALUES,  // float32 or bfloat16, the same for all tensors of a call: which source is run
    F32,
};

struct TensorRow {
    const char* name;
    Type type;
    const char* sizes;  // a letter or a digit each, outermost first, as in PyTorch
};

struct ScalarRow {
    const char* name;
    bool real;        // a float, else an int
    char letter = 0;  // the size that it gives
};

// A dimension of the index space. Member i works on entries [i * step, (i + 1) * step) of every tensor dimension of this
// letter, and on all of any other. With `tiles`, a step is so many times as long, and its entries lie apart: a member
// may touch them all.
struct Walk {
    char letter;
    unsigned step;
    char tiles = 0;
};

template <class Int>
using Sizes = std::map<char, Int>;

struct Kernel {
    const char* name;  // the op otfuse_tpc::NAME, the guid otfuse_NAME, the sources NAME_f32.c and NAME_bf16.c
    std::vector<TensorRow> inputs, outputs;
    std::vector<ScalarRow> scalars;
    std::vector<Walk> index_space;
    bool (*fits)(Sizes<uint64_t>);  // in a core's local memory

    std::string guid() const { return std::string("otfuse_") + name; }
    std::string op() const { return std::string("otfuse_tpc::") + name; }
};

template <class Int>
Int ceil_div(Int size, int64_t unit) {
    return (size + (unit - 1)) / unit;
}

// A size of a tensor, learned from `given` where its letter is new.
template <class Int>
Int expected(char size, Sizes<Int>& known, Int given) {
    if (size >= '0' && size <= '9') return Int(size - '0');
    if (size == 'H') return (ceil_div(known.at('N'), 64) + ceil_div(known.at('M'), 64)) * 128;
    return known.emplace(size, given).first->second;
}

// A size of an output; every letter has been learned from the inputs.
template <class Int>
Int size_of(char size, Sizes<Int> known) {
    return expected(size, known, Int(0));
}

// Vectors of local memory, of 256 bytes: a matrix of N x M in tiles of 16 x 4, and what each kernel has beside it.
constexpr uint64_t MOST_VECTORS = 300;

inline uint64_t matrix_vectors(const Sizes<uint64_t>& of) {
    return ceil_div(of.at('N'), 16) * ceil_div(of.at('M'), 4);
}

inline uint64_t side_vectors(const Sizes<uint64_t>& of) {
    return ceil_div(of.at('N'), 64) + ceil_div(of.at('M'), 64);
}

inline bool any_size(Sizes<uint64_t>) { return true; }

inline bool solver_fits(Sizes<uint64_t> of) { return matrix_vectors(of) + 4 * side_vectors(of) <= MOST_VECTORS; }

inline bool unroll_fits(Sizes<uint64_t> of) {
    const uint64_t slice = ceil_div(of.at('N'), 16) * of.at('S');
    return of.at('S') > 0 && matrix_vectors(of) + 8 * side_vectors(of) + slice <= MOST_VECTORS;
}

inline bool implicit_fits(Sizes<uint64_t> of) { return matrix_vectors(of) + 8 * side_vectors(of) <= MOST_VECTORS; }

inline bool small_fits(Sizes<uint64_t> of) { return of.at('N') <= 8 && of.at('M') <= 8; }

inline const std::vector<Kernel>& kernels() {
    static const TensorRow values{"values", Type::VALUES, "BMN"}, a{"a", Type::F32, "BN"}, b{"b", Type::F32, "BM"};
    static const TensorRow form{"form", Type::F32, "B1"}, report{"report", Type::F32, "B2"};
    static const TensorRow plan{"plan", Type::VALUES, "BMN"}, f{"f", Type::F32, "BN"}, g{"g", Type::F32, "BM"};
    static const TensorRow history{"history", Type::F32, "BKH"};
    static const std::vector<TensorRow> grads = {
        {"grad_plan", Type::VALUES, "BMN"}, {"grad_f", Type::F32, "BN"}, {"grad_g", Type::F32, "BM"}};
    static const std::vector<TensorRow> solved = {values, a, b, form, report, history, grads[0], grads[1], grads[2]};
    static const std::vector<TensorRow> gradients = {
        {"grad_values", Type::VALUES, "BMN"}, {"grad_a", Type::F32, "BN"}, {"grad_b", Type::F32, "BM"}};
    static const ScalarRow scale{"scale", true}, num_iters{"num_iters", false, 'T'}, tol{"tol", true};

    static const std::vector<Kernel> table = {
        {"survey", {values, a, b}, {form}, {scale}, {{'B', 1}}, any_size},
        {"sinkhorn", {values, a, b, form}, {plan, f, g, report}, {scale, num_iters, tol}, {{'B', 1}}, solver_fits},
        {"sinkhorn_history",
         {values, a, b, form},
         {plan, f, g, report, history},
         {scale, num_iters, tol, {"kept", false, 'K'}},
         {{'B', 1}},
         solver_fits},
        {"unroll", solved, gradients, {scale, {"slice", false, 'S'}}, {{'M', 4, 'S'}, {'B', 1}}, unroll_fits},
        {"implicit", solved, gradients, {scale, {"steps", false}}, {{'B', 1}}, implicit_fits},
        {"small",
         {{"values", Type::VALUES, "NMB"}, {"a", Type::F32, "NB"}, {"b", Type::F32, "MB"}},
         {{"plan", Type::VALUES, "NMB"}, {"f", Type::F32, "NB"}, {"g", Type::F32, "MB"}, {"report", Type::F32, "2B"}},
         {scale, num_iters, tol, {"fold_every", false}},
         {{'B', 64}},
         small_fits},
    };
    return table;
}

}  // namespace otfuse
