// Compiled once for each instruction set, with MOMKD_ISA its name. So nothing here may be an inline function
// of another header: the linker keeps one copy of those, and it might be the one for a processor that this
// isn't.
#include "cpu/ema_scatter_rows.h"

#include <utility>

#include "cpu/simd.h"

namespace momkd {
namespace {

// Sums of kTile rows by kGroup vectors of slots, in kSplit parts each, fill the register file: enough of them
// that no sum waits for its last addition.
#if defined(__AVX512F__)
constexpr int kTile = 8, kGroup = 1, kSplit = 2;
#else
constexpr int kTile = 4, kGroup = 2, kSplit = 1;
#endif
static_assert(kLanes % (kWidth * kGroup) == 0, "the padded bank holds whole groups");
static_assert(kBlockRows % kTile == 0 && kBlockRows % kWidth == 0, "a block holds whole tiles and vectors");

// Squared lengths in this range are right in float32: nothing overflowed or fell among the subnormal numbers.
constexpr float kSmallest = 1e-20f, kLargest = 1e30f;

// In each lane the best slot so far: of equal ones the lower, where slots come in rising order.
struct Best {
  Vec value;
  IntVec slot;
};

inline Best better(Best lower, Best upper) {
  const IntVec wins = upper.value > lower.value;
  return {wins ? upper.value : lower.value, wins ? upper.slot : lower.slot};
}

// Half of the lanes of a and of b: those without the bit kBit in their number and those with it. a's come to
// lie where the bit is not set, b's where it is.
typedef std::make_integer_sequence<int, kWidth> Lanes;
template <int kBit, typename V, int... kLane>
inline V lower_lanes(V a, V b, std::integer_sequence<int, kLane...>) {
  return MOMKD_SHUFFLE2(a, b, (kLane & kBit ? kWidth + kLane - kBit : kLane)...);
}
template <int kBit, typename V, int... kLane>
inline V upper_lanes(V a, V b, std::integer_sequence<int, kLane...>) {
  return MOMKD_SHUFFLE2(a, b, (kLane & kBit ? kWidth + kLane : kLane + kBit)...);
}
template <int kBit>
inline Best lower_lanes(Best a, Best b, Lanes all) {
  return {lower_lanes<kBit>(a.value, b.value, all), lower_lanes<kBit>(a.slot, b.slot, all)};
}
template <int kBit>
inline Best upper_lanes(Best a, Best b, Lanes all) {
  return {upper_lanes<kBit>(a.value, b.value, all), upper_lanes<kBit>(a.slot, b.slot, all)};
}

// Fold the lanes of each of kWidth vectors together, neighbours first: lane i of the result is vector i's.
template <int kBit = 1, typename V, typename Fold>
inline V fold_each(const V *v, Fold fold) {
  constexpr int kLeft = kWidth / (2 * kBit);
  V folded[kLeft];
  for (int i = 0; i < kLeft; ++i)
    folded[i] = fold(lower_lanes<kBit>(v[2 * i], v[2 * i + 1], Lanes()),
                     upper_lanes<kBit>(v[2 * i], v[2 * i + 1], Lanes()));
  if constexpr (kLeft == 1)
    return folded[0];
  else
    return fold_each<2 * kBit>(folded, fold);
}

// What is left of a row after its whole vectors: apart, as it would grow to many branches in the loops over
// rows.
__attribute__((noinline)) void add_rest(const float *row, float scale, int64_t j, int64_t s, float *out) {
  for (; j < s; ++j) out[j] += scale * row[j];
}

__attribute__((noinline)) float squares_of_rest(const float *row, int64_t j, int64_t s) {
  float sum = 0;
  for (; j < s; ++j) sum += row[j] * row[j];
  return sum;
}

inline void add_row(const EmaAdditions &additions, int i, int64_t s) {
  const float *row = additions.row[i], scale = additions.scale[i];
  float *out = additions.target[i];
  int64_t j = 0;
#pragma GCC unroll 1
  for (; j + kWidth <= s; j += kWidth)
    Float32::store(out + j, Float32::load(out + j) + scale * Float32::load(row + j));
  if (j < s) add_rest(row, scale, j, s, out);
}

void add(const EmaAdditions &additions, int64_t s) {
  for (int i = 0; i < additions.count; ++i) add_row(additions, i, s);
}

// The squares of a row, summed lane by lane.
inline Vec squares(const float *row, int64_t s) {
  Vec total = {};
  int64_t j = 0;
#pragma GCC unroll 1
  for (; j + kWidth <= s; j += kWidth) {
    const Vec a = Float32::load(row + j);
    total += a * a;
  }
  if (j < s) total[0] += squares_of_rest(row, j, s);
  return total;
}

// kTile rows against kGroup · kWidth slots, of which `lane_slots` are in the first vector.
template <bool kFirst>
inline void compare(const float *const *rows, int64_t s, const float *column, const float *bias,
                    int64_t padded_k, IntVec lane_slots, Best *best) {
  Vec dot[kTile][kGroup][kSplit] = {};
  for (int i = 0; i < kTile; ++i)
    for (int g = 0; g < kGroup; ++g) dot[i][g][0] = *reinterpret_cast<const Vec *>(bias + g * kWidth);
  const auto add_column = [&](int64_t j, int part) {
    for (int i = 0; i < kTile; ++i)
      for (int g = 0; g < kGroup; ++g)
        dot[i][g][part] += rows[i][j] * *reinterpret_cast<const Vec *>(column + g * kWidth);
    column += padded_k;
  };
  int64_t j = 0;
  for (; j + kSplit <= s; j += kSplit)
    for (int part = 0; part < kSplit; ++part) add_column(j + part, part);
  for (; j < s; ++j) add_column(j, 0);
  for (int i = 0; i < kTile; ++i) {
    if (kFirst) best[i] = {Vec{} - __builtin_inff(), lane_slots};
    for (int g = 0; g < kGroup; ++g) {
      for (int part = 1; part < kSplit; ++part) dot[i][g][0] += dot[i][g][part];
      best[i] = better(best[i], {dot[i][g][0], lane_slots + g});
    }
  }
}

void nearest(const float *const *rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
             const EmaAdditions *additions, const char *ahead, int64_t ahead_stride, int64_t row_bytes,
             int32_t *slot, float *inverse) {
  const int64_t vectors = padded_k / kWidth;
  const IntVec lane_slots = kIota * static_cast<int32_t>(vectors);
  Best best[kBlockRows];
  Vec square[kBlockRows];
  const int adding = additions ? additions->count : 0;
  for (int first = 0; first < kBlockRows; first += kTile) {
    for (int i = first; i < first + kTile; ++i) {
      if (ahead)  // past the larger caches: rows are read once, and what lies there is still wanted
        for (int64_t byte = 0; byte < row_bytes; byte += 64)
          __builtin_prefetch(ahead + i * ahead_stride + byte, 0, 0);
      if (i < adding) add_row(*additions, i, s);
      square[i] = squares(rows[i], s);
    }
    compare<true>(rows + first, s, bank, bias, padded_k, lane_slots, best + first);
  }
  for (int64_t g = kGroup; g < vectors; g += kGroup)
    for (int i = 0; i < kBlockRows; i += kTile)
      compare<false>(rows + i, s, bank + g * kWidth, bias + g * kWidth, padded_k,
                     lane_slots + static_cast<int32_t>(g), best + i);

  for (int first = 0; first < kBlockRows; first += kWidth) {
    const Vec squared = fold_each(square + first, [](Vec a, Vec b) { return a + b; });
    const IntVec nearest = fold_each(best + first, better).slot;
    for (int i = 0; i < kWidth; ++i) {
      slot[first + i] = nearest[i];
      inverse[first + i] =
          squared[i] >= kSmallest && squared[i] <= kLargest ? 1 / __builtin_sqrtf(squared[i]) : 0;
    }
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
const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA) = {kWidth, nearest, add, widen<Float16>,
                                                          widen<Bfloat16>};

}  // namespace momkd
