// The inner loops of ema_scatter, one set for each instruction set (ema_scatter_rows.cpp is compiled several
// times).
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace momkd {

constexpr int kLanes = 16;  // slots side by side in a vector; banks and sums are padded to a multiple of it
constexpr int kBlockRows = 16;  // rows of one class at a time

// Rows of one class.
struct EmaBlock {
  const char *z;
  RowType type;
  int64_t stride;      // of z, in bytes
  const int64_t *row;  // (kBlockRows,), their numbers
  const char *ahead;   // as much memory as the block has is asked for from here on, for rows that come soon
};

struct EmaRowKernels {
  // Lanes of a vector. Of the padded K / width = G vectors of a bank, slot k is lane k / G of vector k % G.
  int width;
  // The rows as float32 into `block` (padded S / width, kBlockRows, width), with zeros as padding: a column's
  // values lie constant distances apart. For each row the nearest slot, and 1 / length: 0 where that is not
  // right, as the square of the length is not a number, infinite or among the subnormal ones. False where any
  // is 0.
  //   bank   (S, padded K), 64-byte aligned: unit slots, transposed
  //   bias   (padded K), 64-byte aligned: 0 for a slot, −inf for padding
  bool (*nearest)(const EmaBlock &rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
                  float *block, int32_t *slot, float *inverse);
  // For i < count, where slot[i] >= 0: sums (K, padded S) [slot[i]] += scale[i] · row i of the block, and
  // mass (K,) [slot[i]] += weight[i].
  void (*add)(const float *block, int64_t padded_s, int count, const int32_t *slot, const float *weight,
              const float *scale, float *sums, double *mass);
};

extern const EmaRowKernels ema_rows_baseline;
extern const EmaRowKernels ema_rows_avx2;
extern const EmaRowKernels ema_rows_avx512;

}  // namespace momkd
