// Compiled once for each instruction set, with MOMKD_ISA its name. So nothing here may be an inline function
// of another header: the linker keeps one copy of those, and it might be the one for a processor that this
// isn't.
#include "cpu/ema_scatter_rows.h"

#include <utility>

#include "cpu/simd.h"

namespace momkd {
namespace {

// Sums of kTile rows by kGroup vectors of slots fill the register file: enough of them that no sum waits for
// its last addition.
#if defined(__AVX512F__)
constexpr int kTile = 16, kGroup = 1;
#else
constexpr int kTile = 4, kGroup = 2;
#endif
static_assert(kLanes % (kWidth * kGroup) == 0, "the padded bank holds whole groups");
static_assert(kBlockRows % kTile == 0 && kBlockRows % kWidth == 0, "a block holds whole tiles and vectors");

// Squared lengths in this range are right in float32: nothing overflowed or fell among the subnormal numbers.
constexpr float kSmallest = 1e-20f, kLargest = 1e30f;

typedef int32_t LooseIntVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

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

// One row into its place in a block; returns its squares, summed lane by lane.
template <typename Type>
inline Vec pack(const void *row, int64_t s, float *out) {
  const auto *from = static_cast<const typename Type::stored *>(row);
  Vec squares = {};
  const auto place = [&](Vec v) {
    *reinterpret_cast<Vec *>(out) = v;
    out += kBlockRows * kWidth;
    squares += v * v;
  };
  int64_t j = 0;
  for (; j + kWidth <= s; j += kWidth) place(Type::load(from + j));
  if (j < s) {
    place(load_part<Type>(from + j, s - j));
    j += kWidth;
  }
  for (; j % kLanes; j += kWidth) place(Vec{});
  return squares;
}

template <typename Type>
void pack_rows(const EmaBlock &rows, int64_t s, float *block, Vec *square) {
  for (int i = 0; i < kBlockRows; ++i)
    square[i] = pack<Type>(rows.z + rows.row[i] * rows.stride, s, block + i * kWidth);
}

// kTile rows of a block against kGroup · kWidth slots, of which `lane_slots` are in the first vector. With
// the first group, each column asks for memory `ahead`.
template <bool kFirst>
inline void compare(const float *block, int64_t s, const float *column, const float *bias, int64_t padded_k,
                    IntVec lane_slots, Best *best, const char *ahead, int64_t ahead_step) {
  Vec dot[kTile][kGroup];
  for (int i = 0; i < kTile; ++i)
    for (int g = 0; g < kGroup; ++g) dot[i][g] = *reinterpret_cast<const Vec *>(bias + g * kWidth);
  for (int64_t j = 0; j < s; j += kWidth, block += kBlockRows * kWidth) {
    const float *end = block + (s - j < kWidth ? s - j : kWidth);
    for (const float *at = block; at < end; ++at, column += padded_k) {
      if (kFirst) {
        __builtin_prefetch(ahead, 0, 2);  // not 0: into the nearest cache alone takes Intel twice the time
        ahead += ahead_step;
      }
      for (int i = 0; i < kTile; ++i)
        for (int g = 0; g < kGroup; ++g)
          dot[i][g] += at[i * kWidth] * *reinterpret_cast<const Vec *>(column + g * kWidth);
    }
  }
  for (int i = 0; i < kTile; ++i) {
    if (kFirst) best[i] = {Vec{} - __builtin_inff(), lane_slots};
    for (int g = 0; g < kGroup; ++g) best[i] = better(best[i], {dot[i][g], lane_slots + g});
  }
}

bool nearest(const EmaBlock &rows, int64_t s, const float *bank, const float *bias, int64_t padded_k,
             float *block, int32_t *slot, float *inverse) {
  Vec square[kBlockRows];
  if (rows.type == RowType::float32)
    pack_rows<Float32>(rows, s, block, square);
  else if (rows.type == RowType::float16)
    pack_rows<Float16>(rows, s, block, square);
  else
    pack_rows<Bfloat16>(rows, s, block, square);

  // Before the products, which hide how long roots and quotients take.
  for (int first = 0; first < kBlockRows; first += kWidth) {
    const Vec squared = fold_each(square + first, [](Vec a, Vec b) { return a + b; });
    for (int i = 0; i < kWidth; ++i)
      inverse[first + i] =
          squared[i] >= kSmallest && squared[i] <= kLargest ? 1 / __builtin_sqrtf(squared[i]) : 0;
  }

  const int64_t vectors = padded_k / kWidth, item = rows.type == RowType::float32 ? 4 : 2;
  const IntVec lane_slots = kIota * static_cast<int32_t>(vectors);
  Best best[kBlockRows];
  for (int i = 0; i < kBlockRows; i += kTile)
    compare<true>(block + i * kWidth, s, bank, bias, padded_k, lane_slots, best + i,
                  rows.ahead + i * s * item, kTile * item);
  for (int64_t g = kGroup; g < vectors; g += kGroup)
    for (int i = 0; i < kBlockRows; i += kTile)
      compare<false>(block + i * kWidth, s, bank + g * kWidth, bias + g * kWidth, padded_k,
                     lane_slots + static_cast<int32_t>(g), best + i, nullptr, 0);
  for (int i = 0; i < kBlockRows; i += kWidth)
    *reinterpret_cast<LooseIntVec *>(slot + i) = fold_each(best + i, better).slot;
  bool fine = true;
  for (int i = 0; i < kBlockRows; ++i) fine &= inverse[i] != 0;
  return fine;
}

void add(const float *block, int64_t padded_s, int count, const int32_t *slot, const float *weight,
         const float *scale, float *sums, double *mass) {
  for (int i = 0; i < count; ++i, block += kWidth) {
    if (slot[i] < 0) continue;
    mass[slot[i]] += weight[i];
    const Vec factor = Vec{} + scale[i];
    float *out = sums + slot[i] * padded_s;
    const float *from = block;
    for (int64_t j = 0; j < padded_s; j += kWidth, from += kBlockRows * kWidth)
      *reinterpret_cast<Vec *>(out + j) += factor * *reinterpret_cast<const Vec *>(from);
  }
}

}  // namespace

extern const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA);
const EmaRowKernels MOMKD_CONCAT(ema_rows_, MOMKD_ISA) = {kWidth, nearest, add};

}  // namespace momkd
