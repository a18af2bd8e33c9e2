// A host emulator of the TPC-C subset that our kernels use: C++17, any C++ compiler, no SDK. A kernel's source is
// included unmodified after this header and before runner.h; otfuse/_backends/tpc/emulator.py writes that file.
//
// How far it can be trusted:
// - Documented by Habana (programming model, intrinsics): vectors of 2048 bits, tensors of up to five dimensions, pad
//   values, dropped stores, predicates and income, 16 tensors and 32 scalars, boxes of index-space members in any
//   order, local memory without contents at the start and its sizes, no vector load after a vector store.
// - By the public compiler: 16 KB of vector memory beside a LOOKUP; no lane into a scalar, no double, no recursion.
// - Inferred: rounding to nearest even, subnormals flushed on input and output, one rounding in mac and madd (with
//   OTFUSE_TPC_VARIANT two), int32 shifts without sign, the order of lanes in conversions of bfloat16 (in order).
// - Never compared with hardware: anything. The rules of lane movement (mov_dual_group_all, mov_group, shuffle) are
//   read from documentation alone.
// - Where nothing is known, the two variants differ, and kernels have to be right under both: what max and min make of
//   a NaN, and what becomes of a float outside int32.
//
// Stricter than the machine, to catch mistakes: gen_addr faults outside of its tensor, no two calls may store the same
// element, a switch outside the subset faults, registers start poisoned as local memory does.
//
// Less strict in one thing: the element just past the end of a local array is not caught, only those beyond.
//
// With OTFUSE_TPC_COUNT, every vector, load and store operation is counted and its latency followed (count.h).
// Arithmetic on scalars and coordinates in plain C cannot be seen, nor can spilled registers.
#pragma once
#include "vector.h"
#include "arithmetic.h"
#include "lanes.h"
#include "memory.h"
