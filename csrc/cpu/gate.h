// The gate of gated attention, after its matrix products: activations, dropout and scores, forward and
// backward, on a block of rows.
//
//   hidden = drop(tanh(pre_v + b_v)) ⊙ drop(σ(pre_u + b_u)),  scores_h = w_a[h] · hidden + b_a[h]
#pragma once

#include <cstdint>

#include "cpu/pool.h"
#include "cpu/rows.h"

namespace momkd {

struct GateShape {
  int64_t rows, hidden, heads;
  bool gated;  // a row holds both branches one after the other, else that of tanh alone

  int64_t columns() const { return gated ? 2 * hidden : hidden; }
};

// Bits from Philox 4x32-10, see momkd/reference/philox.py. scale 1 and threshold 0: no dropout.
struct GateDropout {
  uint64_t seed;
  int64_t first_row;   // of the batch: the number of the first row here
  uint32_t threshold;  // of 2^16 levels, those under it are dropped
  float scale;         // of what is kept
};

struct GateWeights {
  const float *bias;  // (columns)
  const float *w_a;   // (H, hidden)
  const float *b_a;   // (H), or null
};

// What is kept has the type of the features; products, and gradients at them, have that or float32.
struct GateTypes {
  RowType features, products;
};

// Products (rows, columns) become scores (rows, H) and, where `kept` is not null, tanh(·) and σ(·) before
// dropout, (rows, columns). `kept` may be the products' own place where the types are the same.
void gate_scores(const void *products, GateTypes types, const GateShape &shape, const GateDropout &dropout,
                 const GateWeights &weights, float *scores, void *kept, int threads);

// What was kept and d_scores (rows, H) become the gradients at the products, as (rows, columns) and as
// (columns, rows), each unless null; d_w_a (H, hidden) and d_bias (columns) are added to.
void gate_backward(const void *kept, GateTypes types, const GateShape &shape, const GateDropout &dropout,
                   const GateWeights &weights, const float *d_scores, void *d_rows, void *d_columns,
                   float *d_w_a, float *d_bias, int threads);

// As gate_scores, from bfloat16 rows (shape.rows of them) and weights packed by amx_pack, a tile at a time.
// score_bias (rows, H), unless null, is added to the scores; pieces are pooled while their rows are in cache,
// unless `pools` is null.
void gate_scores_amx(const Rows &rows, const uint16_t *packed, const GateShape &shape,
                     const GateDropout &dropout, const GateWeights &weights, const float *score_bias,
                     float *scores, void *kept, PartialPools *pools, int threads);

}  // namespace momkd
