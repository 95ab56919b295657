// Compiled once for each instruction set, with MOMKD_ISA its name. So nothing here may be an inline function of another
// header: the linker keeps one copy of those, and it might be the one for a processor that this isn't.
#include "cpu/ema_scatter_rows.h"

#define MOMKD_CONCAT_(a, b) a##b
#define MOMKD_CONCAT(a, b) MOMKD_CONCAT_(a, b)

namespace momkd {
namespace {

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Fold 16 lanes to one by halves: compilers make shuffles of this.
template <typename V, typename Fold>
inline V swap_fold(V v, Fold fold) {
  v = fold(v, __builtin_shuffle(v, kIota ^ 8));
  v = fold(v, __builtin_shuffle(v, kIota ^ 4));
  v = fold(v, __builtin_shuffle(v, kIota ^ 2));
  return fold(v, __builtin_shuffle(v, kIota ^ 1));
}

inline float sum(Vec v) {
  return swap_fold(v, [](Vec a, Vec b) { return a + b; })[0];
}

float squared_length(const float *row, int64_t s) {
  Vec total = {};
  int64_t j = 0;
  for (; j + kLanes <= s; j += kLanes) {
    const Vec v = *reinterpret_cast<const LooseVec *>(row + j);
    total += v * v;
  }
  float rest = 0;
  for (; j < s; ++j) rest += row[j] * row[j];
  return sum(total) + rest;
}

void nearest(const float *const *rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
             int32_t *slot, float *squared) {
  Vec best[kBlockRows];
  IntVec where[kBlockRows];
  for (int i = 0; i < kBlockRows; ++i) {
    best[i] = Vec{} - __builtin_inff();
    where[i] = kIota;
  }
  for (int64_t first = 0; first < padded_k; first += kLanes) {
    Vec dot[kBlockRows];
    for (int i = 0; i < kBlockRows; ++i) dot[i] = *reinterpret_cast<const Vec *>(bias + first);
    const float *column = bank + first;
    for (int64_t j = 0; j < s; ++j, column += padded_k) {
      const Vec m = *reinterpret_cast<const Vec *>(column);
      for (int i = 0; i < kBlockRows; ++i) dot[i] += rows[i][j] * m;
    }
    for (int i = 0; i < kBlockRows; ++i) {
      const IntVec better = dot[i] > best[i];  // strictly: the lowest slot of equal ones stays
      best[i] = better ? dot[i] : best[i];
      where[i] = better ? kIota + static_cast<int32_t>(first) : where[i];
    }
  }
  for (int i = 0; i < kBlockRows; ++i) {
    const Vec top = swap_fold(best[i], [](Vec a, Vec b) { return a > b ? a : b; });
    const IntVec candidate = best[i] == top ? where[i] : IntVec{} + INT32_MAX;
    slot[i] = swap_fold(candidate, [](IntVec a, IntVec b) { return a < b ? a : b; })[0];
    squared[i] = squared_length(rows[i], s);
  }
}

void add(int count, const float *const *rows, const float *scale, int64_t s, float *const *target) {
  for (int i = 0; i < count; ++i) {
    const float *row = rows[i];
    float *out = target[i];
    int64_t j = 0;
    for (; j + kLanes <= s; j += kLanes)
      *reinterpret_cast<LooseVec *>(out + j) += scale[i] * *reinterpret_cast<const LooseVec *>(row + j);
    for (; j < s; ++j) out[j] += scale[i] * row[j];
  }
}

float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Move exponent and mantissa into place and scale by 2^112, which also makes subnormal numbers right; infinities and
// NaNs then lie at 2^16 and above and get the full exponent.
void widen_float16(const uint16_t *row, int64_t s, float *out) {
  for (int64_t j = 0; j < s; ++j) {
    const uint32_t half = row[j];
    const float scaled = from_bits((half & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = scaled >= 65536.0f ? 0x7f800000u : 0u;
    out[j] = from_bits(to_bits(scaled) | special | (half & 0x8000u) << 16);
  }
}

void widen_bfloat16(const uint16_t *row, int64_t s, float *out) {
  for (int64_t j = 0; j < s; ++j) out[j] = from_bits(static_cast<uint32_t>(row[j]) << 16);
}

}  // namespace

extern const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA);
const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA) = {nearest, add, widen_float16, widen_bfloat16};

}  // namespace momkd
