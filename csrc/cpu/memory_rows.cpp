// Compiled once for each instruction set, with MOMKD_ISA its name.
//
// A tile is kWidth rows, transposed: a vector holds one column of all of them, and what is reduced over slots
// is reduced within each lane.
#include "cpu/memory_rows.h"

#include "cpu/simd.h"

namespace momkd {
namespace {

static_assert(kWidth <= kMostLanes, "scratch is sized for kMostLanes rows");

template <typename Type>
const typename Type::stored *row_at(const void *rows, int64_t stride, int64_t i) {
  return static_cast<const typename Type::stored *>(rows) + i * stride;
}

inline Vec sqrt_of(Vec v) {
  Vec root = {};
  for (int lane = 0; lane < kWidth; ++lane) root[lane] = __builtin_sqrtf(v[lane]);
  return root;
}

inline Vec log_of(Vec v) {
  Vec log = {};
  for (int lane = 0; lane < kWidth; ++lane) log[lane] = __builtin_logf(v[lane]);
  return log;
}

// `count` rows as columns: tile[j · kWidth + lane]; the lanes over repeat the last row.
template <typename Type>
void load_tile(const void *rows, int64_t stride, int64_t first, int64_t count, int64_t width, float *tile) {
  const typename Type::stored *row[kWidth];
  for (int lane = 0; lane < kWidth; ++lane)
    row[lane] = row_at<Type>(rows, stride, first + (lane < count ? lane : count - 1));
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) {
    Vec block[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) block[lane] = Type::load(row[lane] + j);
    transpose(block);
    for (int column = 0; column < kWidth; ++column)
      Float32::store(tile + (j + column) * kWidth, block[column]);
  }
  for (; j < width; ++j)
    for (int lane = 0; lane < kWidth; ++lane) tile[j * kWidth + lane] = Type::load_one(row[lane] + j);
}

template <typename Type>
void store_tile(void *rows, int64_t first, int64_t count, int64_t width, const float *tile) {
  typename Type::stored *out = static_cast<typename Type::stored *>(rows) + first * width;
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) {
    Vec block[kWidth];
    for (int column = 0; column < kWidth; ++column)
      block[column] = Float32::load(tile + (j + column) * kWidth);
    transpose(block);
    for (int lane = 0; lane < count; ++lane) Type::store(out + lane * width + j, block[lane]);
  }
  for (; j < width; ++j)
    for (int lane = 0; lane < count; ++lane) Type::store_one(out + lane * width + j, tile[j * kWidth + lane]);
}

// What rows of a tile are divided by. The squares of a row that is very long or very short leave float32: the
// tile is then divided by the largest value of each row, and `scale` says by how much.
struct Norm {
  Vec inverse;  // of what lies in the tile
  Vec scale;    // of the row to what lies in the tile
  Vec clamped;  // all ones where the row is shorter than kUnitEps, as bits
};

inline Norm norm_of_tile(float *tile, int64_t width) {
  Vec squared = {};
  for (int64_t j = 0; j < width; ++j) {
    const Vec column = Float32::load(tile + j * kWidth);
    squared += column * column;
  }
  Norm norm;
  norm.scale = Vec{} + 1.0f;
  const IntVec out_of_range = ((squared > 1e-20f) & (squared < 1e30f)) == 0;
  bool any = false;
  for (int lane = 0; lane < kWidth; ++lane) any |= out_of_range[lane] != 0;
  if (any) {
    Vec largest = {};
    for (int64_t j = 0; j < width; ++j) {
      const Vec size = of_bits(bits_of(Float32::load(tile + j * kWidth)) & 0x7fffffffu);
      largest = size > largest ? size : largest;
    }
    // A row of zeros stays as it is; one that is not finite becomes NaN, by inf / inf or by itself.
    norm.scale = out_of_range & (largest > 0) ? largest : Vec{} + 1.0f;
    squared = Vec{};
    for (int64_t j = 0; j < width; ++j) {
      const Vec column = Float32::load(tile + j * kWidth) / norm.scale;
      Float32::store(tile + j * kWidth, column);
      squared += column * column;
    }
  }
  const Vec length = sqrt_of(squared) * norm.scale;
  norm.clamped = of_bits(reinterpret_cast<BitVec>(IntVec(length <= kUnitEps)));
  norm.inverse = norm.scale / ((length > kUnitEps) | (length != length) ? length : Vec{} + kUnitEps);
  return norm;
}

// The products of a tile with a group of slots.
inline void dot_group(const float *tile, const float *group, int64_t width, Vec *dot) {
  for (int k = 0; k < kSlotGroup; ++k) dot[k] = Vec{};
  for (int64_t j = 0; j < width; ++j) {
    const Vec column = Float32::load(tile + j * kWidth);
    for (int k = 0; k < kSlotGroup; ++k) dot[k] += column * group[j * kSlotGroup + k];
  }
}

// The largest cosine so far and its slot. NaN wins, the first of them.
struct Best {
  Vec value;
  IntVec slot;
};

inline void keep_better(Best &best, Vec value, int64_t slot) {
  const IntVec better = (value > best.value) | ((value != value) & (best.value == best.value));
  best.value = better ? value : best.value;
  best.slot = better ? IntVec{} + static_cast<int32_t>(slot) : best.slot;
}

// The next slot of a class, whose cosines go to `cosines` (slots, kWidth) unless it is null.
inline void take_slot(Best &best, Vec cosine, int64_t slot, float *cosines) {
  if (slot == 0) best = {cosine, IntVec{}};
  keep_better(best, cosine, slot);
  if (cosines) Float32::store(cosines + slot * kWidth, cosine);
}

// Cosines of a tile with every slot of a class, into `cosines` (slots, kWidth) unless it is null.
inline Best class_cosines(const float *tile, const BankView &bank, int64_t label, Vec inverse,
                          float *cosines) {
  Best best = {};
  const int64_t groups = groups_of(bank);
  for (int64_t g = 0; g < groups; ++g) {
    Vec dot[kSlotGroup];
    dot_group(tile, bank.grouped + (label * groups + g) * bank.width * kSlotGroup, bank.width, dot);
    const int64_t first = g * kSlotGroup,
                  count = bank.slots - first < kSlotGroup ? bank.slots - first : kSlotGroup;
    for (int64_t k = 0; k < count; ++k) take_slot(best, dot[k] * inverse, first + k, cosines);
  }
  return best;
}

// exp(τ (cosine − top)) in place; returns their sum.
inline Vec soften(float *cosines, int64_t slots, float tau, Vec top) {
  Vec total = {};
  for (int64_t k = 0; k < slots; ++k) {
    const Vec e = exp_of(tau * (Float32::load(cosines + k * kWidth) - top));
    Float32::store(cosines + k * kWidth, e);
    total += e;
  }
  return total;
}

// A class of a tile of rows: its reduced value, for lse from all `cosines`, which are lost, and its nearest
// slot. A lane is written where `wanted` is not 0.
inline void write_class(const Best &best, float *cosines, int64_t slots, float tau, int64_t rows,
                        IntVec wanted, int64_t classes, float *value, int32_t *slot) {
  const Vec reduced =
      cosines ? best.value + log_of(soften(cosines, slots, tau, best.value)) / tau : best.value;
  float values[kWidth];
  int32_t nearest[kWidth], write[kWidth];
  Float32::store(values, reduced);
  __builtin_memcpy(nearest, &best.slot, sizeof nearest);
  __builtin_memcpy(write, &wanted, sizeof write);
  for (int lane = 0; lane < rows; ++lane)
    if (write[lane]) {
      value[lane * classes] = values[lane];
      slot[lane * classes] = nearest[lane];
    }
}

template <typename Type>
void reduce(const void *z, int64_t stride, int64_t count, const BankView &bank, float tau, float *value,
            int32_t *slot, float *scratch) {
  float *cosines = tau > 0 ? scratch + kMostLanes * bank.width : nullptr;
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t rows = count - first < kWidth ? count - first : kWidth;
    load_tile<Type>(z, stride, first, rows, bank.width, scratch);
    const Norm norm = norm_of_tile(scratch, bank.width);
    for (int64_t c = 0; c < bank.classes; ++c) {
      const Best best = class_cosines(scratch, bank, c, norm.inverse, cosines);
      write_class(best, cosines, bank.slots, tau, rows, IntVec{} + 1, bank.classes,
                  value + first * bank.classes + c, slot + first * bank.classes + c);
    }
  }
}

// The squared lengths of a tile of rows, one in a lane; the lanes over repeat the last row.
template <typename Type>
Vec squares_of(const typename Type::stored *z, int64_t stride, int64_t count, int64_t width) {
  Vec sums[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) {
    const typename Type::stored *row = z + (lane < count ? lane : count - 1) * stride;
    Vec sum = {};
    for (int64_t j = 0; j < width; j += kWidth) {
      const Vec v = load_part<Type>(row + j, width - j);
      sum += v * v;
    }
    sums[lane] = sum;
  }
  transpose(sums);
  Vec total = {};
  for (const Vec &sum : sums) total += sum;
  return total;
}

void reduce_products(const uint16_t *z, int64_t stride, int64_t count, const float *products, int64_t columns,
                     const BankView &bank, float tau, float *value, int32_t *slot, float *scratch) {
  float *cosines = tau > 0 ? scratch : nullptr;
  const int64_t part = summand_columns(bank);
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t rows = count - first < kWidth ? count - first : kWidth;
    const uint16_t *tile = z + first * stride;
    float *values = value + first * bank.classes;
    int32_t *nearest = slot + first * bank.classes;
    const Vec squared = squares_of<Bfloat16>(tile, stride, rows, bank.width);
    // Products of rows that are very long or very short leave float32: those are reduced in registers.
    const IntVec fine = (squared > 1e-20f) & (squared < 1e30f);
    bool all = true;
    for (int lane = 0; lane < rows; ++lane) all &= fine[lane] != 0;
    if (!all) reduce<Bfloat16>(tile, stride, rows, bank, tau, values, nearest, scratch);
    const Vec inverse = 1.0f / sqrt_of(squared);
    for (int64_t c = 0; c < bank.classes; ++c) {
      Best best = {};
      for (int64_t begin = 0; begin < bank.slots; begin += kWidth) {
        Vec dot[kWidth];
        for (int lane = 0; lane < kWidth; ++lane) {
          const float *from =
              products + (first + (lane < rows ? lane : 0)) * columns + c * padded_slots(bank) + begin;
          dot[lane] = Float32::load(from) + (Float32::load(from + part) + Float32::load(from + 2 * part));
        }
        transpose(dot);
        const int64_t slots = bank.slots - begin < kWidth ? bank.slots - begin : kWidth;
        for (int64_t k = 0; k < slots; ++k) take_slot(best, dot[k] * inverse, begin + k, cosines);
      }
      write_class(best, cosines, bank.slots, tau, rows, fine, bank.classes, values + c, nearest + c);
    }
  }
}

// A row as float32, divided by what its tile would be divided by.
struct UnitRow {
  float inverse;  // of the row itself
  bool clamped;
};

template <typename Type>
UnitRow unit_row(const typename Type::stored *row, int64_t width, float *unit) {
  Vec total = {};
  float rest = 0;
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) {
    const Vec v = Type::load(row + j);
    Float32::store(unit + j, v);
    total += v * v;
  }
  for (; j < width; ++j) {
    unit[j] = Type::load_one(row + j);
    rest += unit[j] * unit[j];
  }
  const float squared = sum_lanes(total) + rest;
  double length = __builtin_sqrt(static_cast<double>(squared));
  if (!(squared > 1e-20f && squared < 1e30f)) {
    double sum = 0;
    for (j = 0; j < width; ++j) sum += static_cast<double>(unit[j]) * unit[j];
    length = __builtin_sqrt(sum);
  }
  const bool clamped = length <= kUnitEps;
  const double inverse = 1 / (clamped ? static_cast<double>(kUnitEps) : length);
  for (j = 0; j + kWidth <= width; j += kWidth)
    Float32::store(unit + j, Float32::load(unit + j) * static_cast<float>(inverse));
  for (; j < width; ++j) unit[j] = static_cast<float>(unit[j] * inverse);
  return {static_cast<float>(inverse), clamped};
}

inline float dot_of(const float *a, const float *b, int64_t width) {
  Vec total = {};
  float rest = 0;
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) total += Float32::load(a + j) * Float32::load(b + j);
  for (; j < width; ++j) rest += a[j] * b[j];
  return sum_lanes(total) + rest;
}

template <typename Type>
void chosen(const void *z, int64_t stride, int64_t count, const BankView &bank, const int32_t *slot,
            float *cosine, float *scratch) {
  for (int64_t i = 0; i < count; ++i) {
    unit_row<Type>(row_at<Type>(z, stride, i), bank.width, scratch);
    for (int64_t c = 0; c < bank.classes; ++c) {
      const int64_t at = c * bank.slots + slot[i * bank.classes + c];
      cosine[i * bank.classes + c] = dot_of(scratch, bank.rows + at * bank.width, bank.width);
    }
  }
}

// Whether the gradient of any class reaches row i. One that none reaches gets 0 and gives nothing, were it
// NaN.
inline bool has_gradient(const float *d_value, int64_t classes, int64_t i) {
  for (int64_t c = 0; c < classes; ++c)
    if (d_value[i * classes + c] != 0) return true;
  return false;
}

template <typename Type>
void pull_max(const void *z, int64_t stride, int64_t count, const BankView &bank, const int32_t *slot,
              const float *d_value, void *d_z, float *d_bank, float *scratch) {
  const int64_t width = bank.width;
  float *unit = scratch, *d_unit = scratch + width;
  for (int64_t i = 0; i < count; ++i) {
    typename Type::stored *out = d_z ? static_cast<typename Type::stored *>(d_z) + i * width : nullptr;
    if (!has_gradient(d_value, bank.classes, i)) {
      for (int64_t j = 0; out && j < width; ++j) out[j] = 0;
      continue;
    }
    const UnitRow row = unit_row<Type>(row_at<Type>(z, stride, i), width, unit);
    for (int64_t j = 0; j < width; ++j) d_unit[j] = 0;
    for (int64_t c = 0; c < bank.classes; ++c) {
      const float weight = d_value[i * bank.classes + c];
      const int64_t at = (c * bank.slots + slot[i * bank.classes + c]) * width;
      int64_t j = 0;
      for (; j + kWidth <= width; j += kWidth)
        Float32::store(d_unit + j, Float32::load(d_unit + j) + weight * Float32::load(bank.rows + at + j));
      for (; j < width; ++j) d_unit[j] += weight * bank.rows[at + j];
      if (!d_bank || weight == 0) continue;
      for (j = 0; j + kWidth <= width; j += kWidth)
        Float32::store(d_bank + at + j, Float32::load(d_bank + at + j) + weight * Float32::load(unit + j));
      for (; j < width; ++j) d_bank[at + j] += weight * unit[j];
    }
    if (!out) continue;
    const float radial = row.clamped ? 0 : dot_of(d_unit, unit, width);
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth)
      Type::store(out + j, (Float32::load(d_unit + j) - radial * Float32::load(unit + j)) * row.inverse);
    for (; j < width; ++j) Type::store_one(out + j, (d_unit[j] - radial * unit[j]) * row.inverse);
  }
}

// sum[(j) · kWidth + lane] += Σ_k weights[k · kWidth + lane] · slots[k][j]
void add_slots(const float *weights, const float *slots, int64_t count, int64_t width, float *sum) {
  int64_t j = 0;
  for (; j + kSlotGroup <= width; j += kSlotGroup) {
    Vec total[kSlotGroup];
    for (int i = 0; i < kSlotGroup; ++i) total[i] = Float32::load(sum + (j + i) * kWidth);
    for (int64_t k = 0; k < count; ++k) {
      const Vec weight = Float32::load(weights + k * kWidth);
      for (int i = 0; i < kSlotGroup; ++i) total[i] += weight * slots[k * width + j + i];
    }
    for (int i = 0; i < kSlotGroup; ++i) Float32::store(sum + (j + i) * kWidth, total[i]);
  }
  for (; j < width; ++j) {
    Vec total = Float32::load(sum + j * kWidth);
    for (int64_t k = 0; k < count; ++k) total += Float32::load(weights + k * kWidth) * slots[k * width + j];
    Float32::store(sum + j * kWidth, total);
  }
}

template <typename Type>
void pull_lse(const void *z, int64_t stride, int64_t count, const BankView &bank, float tau,
              const float *d_value, void *d_z, float *d_bank, float *scratch) {
  const int64_t width = bank.width, classes = bank.classes;
  float *tile = scratch, *d_tile = tile + kMostLanes * width, *rows_of_tile = d_tile + kMostLanes * width;
  float *cosines = rows_of_tile + kMostLanes * width;
  float *shares = cosines + kMostLanes * groups_of(bank) * kSlotGroup;
  for (int64_t first = 0; first < count; first += kWidth) {
    const int64_t rows = count - first < kWidth ? count - first : kWidth;
    load_tile<Type>(z, stride, first, rows, width, tile);
    for (int lane = 0; lane < rows; ++lane)
      if (!has_gradient(d_value, classes, first + lane))
        for (int64_t j = 0; j < width; ++j) tile[j * kWidth + lane] = 0;
    const Norm norm = norm_of_tile(tile, width);
    for (int64_t j = 0; j < width; ++j) {
      Float32::store(tile + j * kWidth, Float32::load(tile + j * kWidth) * norm.inverse);
      Float32::store(d_tile + j * kWidth, Vec{});
    }
    if (d_bank) store_tile<Float32>(rows_of_tile, 0, rows, width, tile);
    Vec radial = {};
    for (int64_t c = 0; c < classes; ++c) {
      const Best best = class_cosines(tile, bank, c, Vec{} + 1.0f, cosines);
      for (int64_t k = 0; k < bank.slots; ++k)
        Float32::store(shares + k * kWidth, Float32::load(cosines + k * kWidth));
      const Vec total = soften(shares, bank.slots, tau, best.value);
      Vec weight = {};
      for (int lane = 0; lane < rows; ++lane) weight[lane] = d_value[(first + lane) * classes + c];
      weight = weight / total;
      for (int64_t k = 0; k < bank.slots; ++k) {
        const Vec share = weight * Float32::load(shares + k * kWidth);
        Float32::store(shares + k * kWidth, share);
        radial += share * Float32::load(cosines + k * kWidth);
      }
      const float *slots = bank.rows + c * bank.slots * width;
      add_slots(shares, slots, bank.slots, width, d_tile);
      if (!d_bank) continue;
      for (int64_t k = 0; k < bank.slots; ++k) {
        float *out = d_bank + (c * bank.slots + k) * width;
        for (int lane = 0; lane < rows; ++lane) {
          const float share = shares[k * kWidth + lane], *row = rows_of_tile + lane * width;
          int64_t j = 0;
          for (; j + kWidth <= width; j += kWidth)
            Float32::store(out + j, Float32::load(out + j) + share * Float32::load(row + j));
          for (; j < width; ++j) out[j] += share * row[j];
        }
      }
    }
    if (!d_z) continue;
    radial = of_bits(bits_of(radial) & ~bits_of(norm.clamped));
    const Vec inverse = norm.inverse / norm.scale;
    for (int64_t j = 0; j < width; ++j)
      Float32::store(
          d_tile + j * kWidth,
          (Float32::load(d_tile + j * kWidth) - radial * Float32::load(tile + j * kWidth)) * inverse);
    store_tile<Type>(d_z, first, rows, width, d_tile);
  }
}

}  // namespace

extern const MemoryKernels MOMKD_CONCAT(memory_rows_, MOMKD_ISA);
const MemoryKernels MOMKD_CONCAT(memory_rows_, MOMKD_ISA) = {
    {reduce<Float32>, reduce<Float16>, reduce<Bfloat16>},
    reduce_products,
    {chosen<Float32>, chosen<Float16>, chosen<Bfloat16>},
    {pull_max<Float32>, pull_max<Float16>, pull_max<Bfloat16>},
    {pull_lse<Float32>, pull_lse<Float16>, pull_lse<Bfloat16>}};

}  // namespace momkd
