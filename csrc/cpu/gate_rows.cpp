// Compiled once for each instruction set, with MOMKD_ISA its name.
#include "cpu/gate_rows.h"

#include <cstddef>

#include "cpu/philox.h"

namespace momkd {
namespace {

constexpr int kTile = 2 * kWidth;  // rows whose gradients are turned at once: a word holds two of 16 bits
static_assert(kGateRows % kTile == 0, "a task holds whole tiles");

// The words of one row: counter (row mod 2^32, row div 2^32, column div 4, 0), column d takes word d mod 4.
void dropout_words(const GateDropout &dropout, uint64_t row, int64_t columns, uint32_t *words) {
  for (int64_t first = 0; first < columns; first += 4 * kWidth) {
    const Counters words_of =
        philox({BitVec{} + static_cast<uint32_t>(row), BitVec{} + static_cast<uint32_t>(row >> 32),
                reinterpret_cast<BitVec>(kIota) + static_cast<uint32_t>(first / 4), BitVec{}},
               dropout.seed);
    for (int lane = 0; lane < kWidth; ++lane) {
      uint32_t *at = words + first + 4 * lane;
      at[0] = words_of.c0[lane];
      at[1] = words_of.c1[lane];
      at[2] = words_of.c2[lane];
      at[3] = words_of.c3[lane];
    }
  }
}

// The words of `count` rows from `row` on, gate_row_scratch(hidden) apart; null without dropout.
const uint32_t *words_of_rows(const GateShape &shape, const GateDropout &dropout, int64_t row, int64_t count,
                              float *scratch) {
  if (dropout.threshold == 0) return nullptr;
  const int64_t step = gate_row_scratch(shape.hidden);
  uint32_t *words = reinterpret_cast<uint32_t *>(scratch + step);
  for (int64_t i = 0; i < count; ++i)
    dropout_words(dropout, static_cast<uint64_t>(dropout.first_row + row + i), shape.hidden,
                  words + i * step);
  return words;
}

// What a value of each branch is multiplied by: 0, or the scale of those that are kept.
struct Keep {
  Vec tanh, sigma;
};

inline Keep keep_of(const GateDropout &dropout, const uint32_t *words, int64_t j) {
  BitVec bits;
  __builtin_memcpy(&bits, words + j, sizeof bits);
  const Vec scale = Vec{} + dropout.scale;
  return {(bits & 0xffffu) >= dropout.threshold ? scale : Vec{},
          bits >> 16 >= dropout.threshold ? scale : Vec{}};
}

inline int64_t part(const GateShape &shape, int64_t j) {
  return shape.hidden - j < kWidth ? shape.hidden - j : kWidth;
}

template <typename Product>
inline Gate activations(const typename Product::stored *products, const float *bias, const GateShape &shape,
                        int64_t j, int64_t lanes) {
  const Vec v = load_part<Product>(products + j, lanes) + load_part<Float32>(bias + j, lanes);
  if (!shape.gated) return {tanh_of(v), Vec{} + 1.0f};
  return gate_of(v, load_part<Product>(products + shape.hidden + j, lanes) +
                        load_part<Float32>(bias + shape.hidden + j, lanes));
}

template <typename Product, typename Type>
void scores(const void *products, int64_t row, int64_t count, const GateShape &shape,
            const GateDropout &dropout, const GateWeights &weights, float *scores, void *kept,
            float *scratch) {
  const uint32_t *words = words_of_rows(shape, dropout, row, count, scratch);
  const int64_t columns = shape.columns(), step = gate_row_scratch(shape.hidden);
  for (int64_t i = 0; i < count; ++i) {
    const auto *own = static_cast<const typename Product::stored *>(products) + i * columns;
    auto *keep = kept ? static_cast<typename Type::stored *>(kept) + i * columns : nullptr;
    Vec first_head = {};
    for (int64_t j = 0; j < shape.hidden; j += kWidth) {
      const int64_t lanes = part(shape, j);
      const Gate gate = activations<Product>(own, weights.bias, shape, j, lanes);
      if (keep) {
        store_part<Type>(keep + j, lanes, gate.tanh);
        if (shape.gated) store_part<Type>(keep + shape.hidden + j, lanes, gate.sigma);
      }
      Vec hidden = gate.tanh * gate.sigma;
      if (words) {
        const Keep factor = keep_of(dropout, words + i * step, j);
        hidden = gate.tanh * factor.tanh * (shape.gated ? gate.sigma * factor.sigma : gate.sigma);
      }
      first_head += hidden * load_part<Float32>(weights.w_a + j, lanes);
      if (shape.heads > 1) Float32::store(scratch + j, hidden);
    }
    float *out = scores + i * shape.heads;
    out[0] = sum_lanes(first_head) + (weights.b_a ? weights.b_a[0] : 0);
    for (int64_t h = 1; h < shape.heads; ++h) {
      Vec total = {};
      for (int64_t j = 0; j < shape.hidden; j += kWidth)
        total += Float32::load(scratch + j) *
                 load_part<Float32>(weights.w_a + h * shape.hidden + j, part(shape, j));
      out[h] = sum_lanes(total) + (weights.b_a ? weights.b_a[h] : 0);
    }
  }
}

inline void add_part(float *at, int64_t count, Vec v) {
  store_part<Float32>(at, count, load_part<Float32>(at, count) + v);
}

// kTile gradients of kWidth columns go to rows of `columns` (…, length), a column each. Those of 16 bits are
// turned in pairs.
template <typename Type>
void turn(const Vec *gradients, int64_t count, int64_t lanes, typename Type::stored *columns,
          int64_t length) {
  if constexpr (sizeof(typename Type::stored) == 2) {
    Vec pairs[kWidth];
    for (int i = 0; i < kWidth; ++i)
      pairs[i] = of_bits(Type::narrow(gradients[2 * i]) | Type::narrow(gradients[2 * i + 1]) << 16);
    transpose(pairs);
    for (int64_t c = 0; c < lanes; ++c)
      __builtin_memcpy(columns + c * length, &pairs[c], static_cast<std::size_t>(count) * 2);
  } else {
    for (int64_t half = 0; half * kWidth < count; ++half) {
      Vec turned[kWidth];
      for (int i = 0; i < kWidth; ++i) turned[i] = gradients[half * kWidth + i];
      transpose(turned);
      const int64_t here = count - half * kWidth < kWidth ? count - half * kWidth : kWidth;
      for (int64_t c = 0; c < lanes; ++c)
        __builtin_memcpy(columns + c * length + half * kWidth, &turned[c],
                         static_cast<std::size_t>(here) * 4);
    }
  }
}

template <typename Type, typename Product>
void backward_tile(const void *kept, int64_t count, const GateShape &shape, const GateDropout &dropout,
                   const uint32_t *words, const GateWeights &weights, const float *d_scores, void *d_rows,
                   void *d_columns, float *d_w_a, float *d_bias) {
  using Stored = typename Product::stored;
  const int64_t columns = shape.columns(), step = gate_row_scratch(shape.hidden);
  Vec d_tanh[kTile], d_sigma[kTile];
  for (int i = 0; i < kTile; ++i) d_tanh[i] = d_sigma[i] = Vec{};  // rows that aren't there
  for (int64_t j = 0; j < shape.hidden; j += kWidth) {
    const int64_t lanes = part(shape, j);
    const Vec a = load_part<Float32>(weights.w_a + j, lanes);
    Vec sum_tanh = {}, sum_sigma = {}, sum_head = {};
    for (int64_t i = 0; i < count; ++i) {
      const auto *own = static_cast<const typename Type::stored *>(kept) + i * columns + j;
      Gate gate = {load_part<Type>(own, lanes),
                   shape.gated ? load_part<Type>(own + shape.hidden, lanes) : Vec{} + 1.0f};
      Vec slope_tanh = 1.0f - gate.tanh * gate.tanh, slope_sigma = gate.sigma * (1.0f - gate.sigma);
      if (words) {
        const Keep factor = keep_of(dropout, words + i * step, j);
        gate.tanh *= factor.tanh;
        slope_tanh *= factor.tanh;
        if (shape.gated) {
          gate.sigma *= factor.sigma;
          slope_sigma *= factor.sigma;
        }
      }
      const float *d_score = d_scores + i * shape.heads;
      const Vec hidden = gate.tanh * gate.sigma;
      sum_head += d_score[0] * hidden;
      Vec d_hidden = d_score[0] * a;
      for (int64_t h = 1; h < shape.heads; ++h) {
        d_hidden += d_score[h] * load_part<Float32>(weights.w_a + h * shape.hidden + j, lanes);
        add_part(d_w_a + h * shape.hidden + j, lanes, d_score[h] * hidden);
      }
      d_tanh[i] = d_hidden * gate.sigma * slope_tanh;
      d_sigma[i] = d_hidden * gate.tanh * slope_sigma;
      sum_tanh += d_tanh[i];
      sum_sigma += d_sigma[i];
      if (d_rows) {
        Stored *out = static_cast<Stored *>(d_rows) + i * columns + j;
        store_part<Product>(out, lanes, d_tanh[i]);
        if (shape.gated) store_part<Product>(out + shape.hidden, lanes, d_sigma[i]);
      }
    }
    add_part(d_w_a + j, lanes, sum_head);
    add_part(d_bias + j, lanes, sum_tanh);
    if (shape.gated) add_part(d_bias + shape.hidden + j, lanes, sum_sigma);
    if (!d_columns) continue;
    Stored *turned = static_cast<Stored *>(d_columns) + j * shape.rows;
    turn<Product>(d_tanh, count, lanes, turned, shape.rows);
    if (shape.gated) turn<Product>(d_sigma, count, lanes, turned + shape.hidden * shape.rows, shape.rows);
  }
}

template <typename Type, typename Product>
void backward(const void *kept, int64_t row, int64_t count, const GateShape &shape,
              const GateDropout &dropout, const GateWeights &weights, const float *d_scores, void *d_rows,
              void *d_columns, float *d_w_a, float *d_bias, float *scratch) {
  const uint32_t *words = words_of_rows(shape, dropout, row, count, scratch);
  const auto at = [](auto *data, int64_t i) { return data ? data + i : data; };
  for (int64_t i = 0; i < count; i += kTile)
    backward_tile<Type, Product>(static_cast<const typename Type::stored *>(kept) + i * shape.columns(),
                                 count - i < kTile ? count - i : kTile, shape, dropout,
                                 at(words, i * gate_row_scratch(shape.hidden)), weights,
                                 d_scores + i * shape.heads,
                                 at(static_cast<typename Product::stored *>(d_rows), i * shape.columns()),
                                 at(static_cast<typename Product::stored *>(d_columns), i), d_w_a, d_bias);
}

}  // namespace

extern const GateKernels MOMKD_CONCAT(gate_rows_, MOMKD_ISA);
const GateKernels MOMKD_CONCAT(gate_rows_, MOMKD_ISA) = {
    {scores<Float32, Float32>, scores<Float16, Float16>, scores<Bfloat16, Bfloat16>, scores<Float32, Float16>,
     scores<Float32, Bfloat16>},
    {backward<Float32, Float32>, backward<Float16, Float16>, backward<Bfloat16, Bfloat16>,
     backward<Float16, Float32>, backward<Bfloat16, Float32>}};

}  // namespace momkd
