// The inner loops of the gate, one set for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/gate.h"

namespace momkd {

constexpr int64_t kGateRows = 32;  // of a task: a whole number of the tiles of every instruction set

struct GateKernels {
  // Of `count` rows, at most kGateRows, whose pointers come; `row` is the number of the first in the block,
  // for dropout alone; scratch: gate_scratch(hidden) floats. Both are indexed by gate_pair.
  void (*scores[5])(const void *products, int64_t row, int64_t count, const GateShape &shape,
                    const GateDropout &dropout, const GateWeights &weights, float *scores, void *kept,
                    float *scratch);
  // d_columns has shape.rows values a row. d_w_a and d_bias are added to.
  void (*backward[5])(const void *kept, int64_t row, int64_t count, const GateShape &shape,
                      const GateDropout &dropout, const GateWeights &weights, const float *d_scores,
                      void *d_rows, void *d_columns, float *d_w_a, float *d_bias, float *scratch);
};

// Which of the five pairs of types: products of the type of the features, or float32 products of 16-bit ones.
static inline int gate_pair(GateTypes types) {
  const int type = static_cast<int>(types.features);
  return types.features == types.products ? type : 2 + type;
}

// A row of hidden values and the dropout words of the rows of a task, each row up to a whole number of
// Philox blocks of vectors. Static: see simd.h.
static constexpr int64_t gate_row_scratch(int64_t hidden) { return hidden + 64; }
static constexpr int64_t gate_scratch(int64_t hidden) { return (1 + kGateRows) * gate_row_scratch(hidden); }

extern const GateKernels gate_rows_baseline;
extern const GateKernels gate_rows_avx2;
extern const GateKernels gate_rows_avx512;

}  // namespace momkd
