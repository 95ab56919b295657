// Compiled once for each instruction set, with MOMKD_ISA its name. So nothing here may be an inline function
// of another header: the linker keeps one copy of those, and it might be the one for a processor that this
// isn't.
#include "cpu/ema_scatter_rows.h"

#include "cpu/simd.h"

namespace momkd {
namespace {

// kGroup registers of slots by kBlockRows rows fit the register file.
#if defined(__AVX512F__)
constexpr int kGroup = 1;
#else
constexpr int kGroup = 2;
#endif
static_assert(kLanes % (kWidth * kGroup) == 0, "the padded bank holds whole groups");

float squared_length(const float *row, int64_t s) {
  Vec total = {}, other = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= s; j += 2 * kWidth) {
    const Vec a = Float32::load(row + j);
    const Vec b = Float32::load(row + j + kWidth);
    total += a * a;
    other += b * b;
  }
  float rest = 0;
  for (; j < s; ++j) rest += row[j] * row[j];
  return sum_lanes(total + other) + rest;
}

// The best slot so far in each lane: of equal ones the lower, as slots come in rising order.
struct Best {
  Vec value;
  IntVec slot;
};

inline void keep_better(Best &best, Vec value, IntVec slot) {
  const IntVec better = value > best.value;
  best.value = better ? value : best.value;
  best.slot = better ? slot : best.slot;
}

inline int32_t lowest_of_best(const Best &best) {
  const Vec top = fold_lanes(best.value, [](Vec a, Vec b) { return a > b ? a : b; });
  const IntVec candidate = best.value == top ? best.slot : IntVec{} + INT32_MAX;
  return fold_lanes(candidate, [](IntVec a, IntVec b) { return a < b ? a : b; })[0];
}

void nearest(const float *const *rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
             int32_t *slot, float *squared) {
  Best best[kBlockRows];
  for (Best &b : best) b = {Vec{} - __builtin_inff(), IntVec{}};
  for (int64_t first = 0; first < padded_k; first += kWidth * kGroup) {
    Vec dot[kBlockRows][kGroup];
    for (int i = 0; i < kBlockRows; ++i)
      for (int g = 0; g < kGroup; ++g) dot[i][g] = *reinterpret_cast<const Vec *>(bias + first + g * kWidth);
    const float *column = bank + first;
    for (int64_t j = 0; j < s; ++j, column += padded_k)
      for (int i = 0; i < kBlockRows; ++i)
        for (int g = 0; g < kGroup; ++g)
          dot[i][g] += rows[i][j] * *reinterpret_cast<const Vec *>(column + g * kWidth);
    for (int i = 0; i < kBlockRows; ++i)
      for (int g = 0; g < kGroup; ++g)
        keep_better(best[i], dot[i][g], kIota + static_cast<int32_t>(first + g * kWidth));
  }
  for (int i = 0; i < kBlockRows; ++i) {
    slot[i] = lowest_of_best(best[i]);
    squared[i] = squared_length(rows[i], s);
  }
}

void add(int count, const float *const *rows, const float *scale, int64_t s, float *const *target) {
  for (int i = 0; i < count; ++i) {
    const float *row = rows[i];
    float *out = target[i];
    int64_t j = 0;
    for (; j + kWidth <= s; j += kWidth)
      *reinterpret_cast<LooseVec *>(out + j) += scale[i] * Float32::load(row + j);
    for (; j < s; ++j) out[j] += scale[i] * row[j];
  }
}

template <typename Type>
void widen(const uint16_t *row, int64_t s, float *out) {
  int64_t j = 0;
  for (; j + kWidth <= s; j += kWidth) Float32::store(out + j, Type::load(row + j));
  for (; j < s; ++j) out[j] = Type::load_one(row + j);
}

}  // namespace

extern const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA);
const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA) = {nearest, add, widen<Float16>, widen<Bfloat16>};

}  // namespace momkd
