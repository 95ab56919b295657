// The gate of gated attention, after its two matrix products: activations, dropout and scores, forward and
// backward.
//
//   hidden = drop(tanh(pre_v)) ⊙ drop(σ(pre_u)),  scores_h = w_a[h] · hidden + b_a[h]
#pragma once

#include <cstdint>

namespace momkd {

struct GateShape {
  int64_t rows, hidden, heads;
  bool gated;  // pre (rows, 2 hidden) holds both branches one after the other, else (rows, hidden) that of
               // tanh
};

// Bits from Philox 4x32-10, see momkd/reference/philox.py. scale 1 and threshold 0: no dropout.
struct GateDropout {
  uint64_t seed;
  int64_t first_row;   // of the batch: the number of the first row here
  uint32_t threshold;  // of 2^16 levels, those under it are dropped
  float scale;         // of what is kept
};

// scores (rows, H) is overwritten; w_a (H, hidden), b_a (H) or null.
void gate_scores(const float *pre, const GateShape &shape, const GateDropout &dropout, const float *w_a,
                 const float *b_a, float *scores, int threads);

// From d_scores (rows, H): `pre` becomes its own gradient; d_w_a (H, hidden) and d_bias (2 hidden, or
// hidden), the column sums of that, are added to.
void gate_backward(float *pre, const GateShape &shape, const GateDropout &dropout, const float *w_a,
                   const float *d_scores, float *d_w_a, float *d_bias, int threads);

}  // namespace momkd
