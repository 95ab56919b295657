// Compiled once for each instruction set, with MOMKD_ISA its name.
#include "cpu/pool_rows.h"

#include "cpu/simd.h"

namespace momkd {
namespace {

constexpr int kRowsAtOnce = 4;  // so that a sum or a vector is read once for four rows

template <typename Type>
const typename Type::stored *row_at(const void *rows, int64_t stride, int64_t i) {
  return static_cast<const typename Type::stored *>(rows) + i * stride;
}

template <typename Type, int kRows>
void add_block(const void *rows, int64_t stride, int64_t first, const float *weights, int64_t weight_stride,
               int64_t width, float *sum) {
  const typename Type::stored *row[kRows];
  float weight[kRows];
  for (int i = 0; i < kRows; ++i) {
    row[i] = row_at<Type>(rows, stride, first + i);
    weight[i] = weights[(first + i) * weight_stride];
  }
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) {
    Vec total = Float32::load(sum + j);
    for (int i = 0; i < kRows; ++i) total += weight[i] * Type::load(row[i] + j);
    Float32::store(sum + j, total);
  }
  for (; j < width; ++j)
    for (int i = 0; i < kRows; ++i) sum[j] += weight[i] * Type::load_one(row[i] + j);
}

template <typename Type>
void add(const void *rows, int64_t stride, int64_t count, const float *weights, int64_t weight_stride,
         int64_t width, float *sum) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= count; i += kRowsAtOnce)
    add_block<Type, kRowsAtOnce>(rows, stride, i, weights, weight_stride, width, sum);
  for (; i < count; ++i) add_block<Type, 1>(rows, stride, i, weights, weight_stride, width, sum);
}

template <typename Type, int kRows>
void dot_block(const void *rows, int64_t stride, int64_t first, const float *vector, int64_t width,
               float *out, int64_t out_stride) {
  const typename Type::stored *row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = row_at<Type>(rows, stride, first + i);
  Vec total[kRows] = {}, other[kRows] = {};
  float rest[kRows] = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= width; j += 2 * kWidth) {
    const Vec a = Float32::load(vector + j), b = Float32::load(vector + j + kWidth);
    for (int i = 0; i < kRows; ++i) {
      total[i] += a * Type::load(row[i] + j);
      other[i] += b * Type::load(row[i] + j + kWidth);
    }
  }
  for (; j < width; ++j)
    for (int i = 0; i < kRows; ++i) rest[i] += vector[j] * Type::load_one(row[i] + j);
  for (int i = 0; i < kRows; ++i) out[(first + i) * out_stride] = sum_lanes(total[i] + other[i]) + rest[i];
}

template <typename Type>
void dot(const void *rows, int64_t stride, int64_t count, const float *vector, int64_t width, float *out,
         int64_t out_stride) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= count; i += kRowsAtOnce)
    dot_block<Type, kRowsAtOnce>(rows, stride, i, vector, width, out, out_stride);
  for (; i < count; ++i) dot_block<Type, 1>(rows, stride, i, vector, width, out, out_stride);
}

template <typename Type>
void spread(void *rows, int64_t count, const float *weights, int64_t heads, const float *vectors,
            int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    typename Type::stored *row = static_cast<typename Type::stored *>(rows) + i * width;
    const float *weight = weights + i * heads;
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth) {
      Vec total = weight[0] * Float32::load(vectors + j);
      for (int64_t h = 1; h < heads; ++h) total += weight[h] * Float32::load(vectors + h * width + j);
      Type::store(row + j, total);
    }
    for (; j < width; ++j) {
      float total = 0;
      for (int64_t h = 0; h < heads; ++h) total += weight[h] * vectors[h * width + j];
      Type::store_one(row + j, total);
    }
  }
}

void exp_in_place(float *x, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Float32::store(x + i, exp_of(Float32::load(x + i)));
  for (; i < count; ++i) x[i] = exp_of(Vec{} + x[i])[0];
}

}  // namespace

extern const PoolKernels MOMKD_CONCAT(pool_rows_, MOMKD_ISA);
const PoolKernels MOMKD_CONCAT(pool_rows_, MOMKD_ISA) = {{add<Float32>, add<Float16>, add<Bfloat16>},
                                                         {dot<Float32>, dot<Float16>, dot<Bfloat16>},
                                                         {spread<Float32>, spread<Float16>, spread<Bfloat16>},
                                                         exp_in_place};

}  // namespace momkd
