// The inner loops of pooling, for each type of rows (in the order of RowType) and each instruction set.
#pragma once

#include <cstdint>

namespace momkd {

struct PoolKernels {
  // sum[0:width] += Σ_{i < count} weights[i · weight_stride] · row_i
  void (*add[3])(const void *rows, int64_t stride, int64_t count, const float *weights, int64_t weight_stride,
                 int64_t width, float *sum);
  // out[i · out_stride] = row_i · vector for i < count
  void (*dot[3])(const void *rows, int64_t stride, int64_t count, const float *vector, int64_t width,
                 float *out, int64_t out_stride);
  // row_i = Σ_{h < heads} weights[i · heads + h] · vectors[h · width ...] for i < count, rows one after the
  // other
  void (*spread[3])(void *rows, int64_t count, const float *weights, int64_t heads, const float *vectors,
                    int64_t width);
  // x[i] = e^x[i] for i < count
  void (*exp)(float *x, int64_t count);
};

extern const PoolKernels pool_rows_baseline;
extern const PoolKernels pool_rows_avx2;
extern const PoolKernels pool_rows_avx512;

}  // namespace momkd
