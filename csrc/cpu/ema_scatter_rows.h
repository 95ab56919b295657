// The inner loops of ema_scatter, one set for each instruction set (ema_scatter_rows.cpp is compiled several
// times).
#pragma once

#include <cstdint>

namespace momkd {

constexpr int kLanes = 16;  // slots side by side in a vector; a class's bank is padded to a multiple of it
constexpr int kBlockRows = 16;  // rows of one class at a time

// Rows to be added: target[i][0:S] += scale[i] · row[i][0:S] for i < count.
struct EmaAdditions {
  int count = 0;
  const float *row[kBlockRows];
  float scale[kBlockRows];
  float *target[kBlockRows];
};

struct EmaRowKernels {
  // Lanes of a vector. Of the padded K / width = G vectors of a bank, slot k is lane k / G of vector k % G.
  int width;
  // For each of kBlockRows rows the nearest slot, and 1 / length: 0 where that is not right, as the square of
  // the length is not a number, infinite or among the subnormal ones. Between the products, which keep other
  // parts of the processor busy, it adds what is left from before and asks for rows that come soon.
  //   bank       (S, padded K), 64-byte aligned: unit slots, transposed
  //   bias       (padded K), 64-byte aligned: 0 for a slot, −inf for padding
  //   additions  or null
  //   ahead      kBlockRows rows of `row_bytes`, `ahead_stride` bytes apart; or null
  void (*nearest)(const float *const *rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
                  const EmaAdditions *additions, const char *ahead, int64_t ahead_stride, int64_t row_bytes,
                  int32_t *slot, float *inverse);
  void (*add)(const EmaAdditions &additions, int64_t s);
  // One row of float16 or bfloat16 to float32.
  void (*widen_float16)(const uint16_t *row, int64_t s, float *out);
  void (*widen_bfloat16)(const uint16_t *row, int64_t s, float *out);
};

extern const EmaRowKernels ema_rows_baseline;
extern const EmaRowKernels ema_rows_avx2;
extern const EmaRowKernels ema_rows_avx512;

}  // namespace momkd
