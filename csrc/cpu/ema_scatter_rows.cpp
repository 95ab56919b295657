// Compiled once for each instruction set, with MOMKD_ISA its name. So nothing here may be an inline function
// of another header: the linker keeps one copy of those, and it might be the one for a processor that this
// isn't.
#include "cpu/ema_scatter_rows.h"

#define MOMKD_CONCAT_(a, b) a##b
#define MOMKD_CONCAT(a, b) MOMKD_CONCAT_(a, b)

namespace momkd {
namespace {

#if defined(__clang__)
#define MOMKD_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define MOMKD_SHUFFLE(v, ...) __builtin_shuffle(v, IntVec{__VA_ARGS__})
#endif

// kWidth lanes fill a register; kGroup registers of slots by kBlockRows rows fit the register file.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kGroup = 1;
#elif defined(__AVX__)
constexpr int kWidth = 8, kGroup = 2;
#else
constexpr int kWidth = 4, kGroup = 2;
#endif
static_assert(kLanes % (kWidth * kGroup) == 0, "the padded bank holds whole groups");

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef float LooseVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

// Fold all lanes into every lane, by halves: a lane with its neighbour at distance kWidth / 2, ..., 2, 1.
#if defined(__AVX512F__)
constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = fold(v, MOMKD_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}
#elif defined(__AVX__)
constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
}
#else
constexpr IntVec kIota = {0, 1, 2, 3};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2));
}
#endif

float squared_length(const float *row, int64_t s) {
  Vec total = {}, other = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= s; j += 2 * kWidth) {
    const Vec a = *reinterpret_cast<const LooseVec *>(row + j);
    const Vec b = *reinterpret_cast<const LooseVec *>(row + j + kWidth);
    total += a * a;
    other += b * b;
  }
  float rest = 0;
  for (; j < s; ++j) rest += row[j] * row[j];
  return fold_lanes(total + other, [](Vec a, Vec b) { return a + b; })[0] + rest;
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

// Move exponent and mantissa into place and scale by 2^112, which also makes subnormal numbers right;
// infinities and NaNs then lie at 2^16 and above and get the full exponent.
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
