// The momentum update of the memory on the CPU: each row joins the nearest slot of its own class.
//
//   k_i  = arg-max_k cos(z_i, M[c_i, k])             ties: the lowest k; a zero row: 0
//   sums[c, k] = Σ w_i z_i,  mass[c, k] = Σ w_i      over the rows of class c that chose k
//   M[c, k] ← normalise(v), v = m M[c, k] + (1 − m) sums / mass,
//             where mass > 0 and |v| > 1e-5 (m |M[c, k]| + 1 − m); else bit for bit the same
//   usage   ← m usage + (1 − m) mass
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace momkd {

struct EmaRows {
  const void *z;             // (N, S): `row_stride` elements from row to row, columns contiguous
  RowType type;              //
  int64_t n;                 // N
  int64_t s;                 // S
  int64_t row_stride;        //
  const int64_t *row_class;  // (N,): a class outside [0, C) skips the row; Python lets only −1 through
  const float *weights;      // (N,), or null for 1
  bool normalize;            // accumulate z / max(|z|, 1e-12) rather than z
};

// sums (C, K, S), mass (C, K) and assignments (N,) are overwritten. A row with a class outside [0, C) or with
// a value that is not finite gets assignment −1 and brings nothing; so does a weight that is not finite or
// not positive, whose row keeps its assignment. Bit-identical for any number of threads. False where a class
// lies outside [−1, C).
bool ema_accumulate(const EmaRows &rows, const float *memory, int64_t c, int64_t k, int threads, float *sums,
                    float *mass, int32_t *assignments);

// memory (C, K, S) and usage (C, K) in place.
void ema_apply(float *memory, float *usage, const float *sums, const float *mass, int64_t c, int64_t k,
               int64_t s, double momentum, int threads);

// Both, with a workspace of its own. False, and memory and usage are left alone, where a class lies outside
// [−1, C).
bool ema_scatter(const EmaRows &rows, float *memory, int64_t c, int64_t k, float *usage, double momentum,
                 int32_t *assignments, int threads);

}  // namespace momkd
