// The inner loops of the gate, one set for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/gate.h"

namespace momkd {

struct GateKernels {
  // `row` numbers the first of `count` rows in `pre`; scratch: gate_scratch(hidden) floats.
  void (*scores)(const float *pre, int64_t row, int64_t count, const GateShape &shape,
                 const GateDropout &dropout, const float *w_a, const float *b_a, float *scores,
                 float *scratch);
  void (*backward)(float *pre, int64_t row, int64_t count, const GateShape &shape, const GateDropout &dropout,
                   const float *w_a, const float *d_scores, float *d_w_a, float *d_bias, float *scratch);
};

// One row of hidden values and one of dropout words, each up to a whole number of Philox blocks of vectors.
// Static: see simd.h.
static constexpr int64_t gate_scratch(int64_t hidden) { return 2 * (hidden + 64); }

extern const GateKernels gate_rows_baseline;
extern const GateKernels gate_rows_avx2;
extern const GateKernels gate_rows_avx512;

}  // namespace momkd
