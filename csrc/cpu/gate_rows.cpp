// Compiled once for each instruction set, with MOMKD_ISA its name.
#include "cpu/gate_rows.h"

#include "cpu/philox.h"

namespace momkd {
namespace {

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

const uint32_t *words_of_row(const GateShape &shape, const GateDropout &dropout, int64_t row,
                             float *scratch) {
  if (dropout.threshold == 0) return nullptr;
  uint32_t *words = reinterpret_cast<uint32_t *>(scratch + gate_scratch(shape.hidden) / 2);
  dropout_words(dropout, static_cast<uint64_t>(dropout.first_row + row), shape.hidden, words);
  return words;
}

struct Activations {
  Vec tanh, sigma;
  Keep keep;

  Activations(const float *pre, int64_t j, int64_t count, const GateShape &shape, const GateDropout &dropout,
              const uint32_t *words)
      : tanh(tanh_of(load_part<Float32>(pre + j, count))),
        sigma(shape.gated ? sigmoid_of(load_part<Float32>(pre + shape.hidden + j, count)) : Vec{} + 1.0f),
        keep(words ? keep_of(dropout, words, j) : Keep{Vec{} + 1.0f, Vec{} + 1.0f}) {
    if (!shape.gated) keep.sigma = Vec{} + 1.0f;
  }
  Vec hidden() const { return tanh * keep.tanh * (sigma * keep.sigma); }
};

inline int64_t part(const GateShape &shape, int64_t j) {
  return shape.hidden - j < kWidth ? shape.hidden - j : kWidth;
}

void scores(const float *pre, int64_t row, int64_t count, const GateShape &shape, const GateDropout &dropout,
            const float *w_a, const float *b_a, float *scores, float *scratch) {
  const int64_t stride = shape.gated ? 2 * shape.hidden : shape.hidden;
  for (int64_t i = row; i < row + count; ++i) {
    const uint32_t *words = words_of_row(shape, dropout, i, scratch);
    for (int64_t j = 0; j < shape.hidden; j += kWidth)
      Float32::store(scratch + j,
                     Activations(pre + i * stride, j, part(shape, j), shape, dropout, words).hidden());
    for (int64_t h = 0; h < shape.heads; ++h) {
      Vec total = {};
      for (int64_t j = 0; j < shape.hidden; j += kWidth)
        total += Float32::load(scratch + j) * load_part<Float32>(w_a + h * shape.hidden + j, part(shape, j));
      scores[i * shape.heads + h] = sum_lanes(total) + (b_a ? b_a[h] : 0);
    }
  }
}

inline void add_part(float *at, int64_t count, Vec v) {
  store_part<Float32>(at, count, load_part<Float32>(at, count) + v);
}

void backward(float *pre, int64_t row, int64_t count, const GateShape &shape, const GateDropout &dropout,
              const float *w_a, const float *d_scores, float *d_w_a, float *d_bias, float *scratch) {
  const int64_t stride = shape.gated ? 2 * shape.hidden : shape.hidden;
  for (int64_t i = row; i < row + count; ++i) {
    const uint32_t *words = words_of_row(shape, dropout, i, scratch);
    float *own = pre + i * stride;
    const float *d_score = d_scores + i * shape.heads;
    for (int64_t j = 0; j < shape.hidden; j += kWidth) {
      const int64_t columns = part(shape, j);
      const Activations a(own, j, columns, shape, dropout, words);
      const Vec hidden = a.hidden();
      Vec d_hidden = {};
      for (int64_t h = 0; h < shape.heads; ++h) {
        d_hidden += d_score[h] * load_part<Float32>(w_a + h * shape.hidden + j, columns);
        add_part(d_w_a + h * shape.hidden + j, columns, d_score[h] * hidden);
      }
      const Vec d_tanh = d_hidden * (a.sigma * a.keep.sigma) * a.keep.tanh * (1.0f - a.tanh * a.tanh);
      store_part<Float32>(own + j, columns, d_tanh);
      add_part(d_bias + j, columns, d_tanh);
      if (!shape.gated) continue;
      const Vec d_sigma = d_hidden * (a.tanh * a.keep.tanh) * a.keep.sigma * a.sigma * (1.0f - a.sigma);
      store_part<Float32>(own + shape.hidden + j, columns, d_sigma);
      add_part(d_bias + shape.hidden + j, columns, d_sigma);
    }
  }
}

}  // namespace

extern const GateKernels MOMKD_CONCAT(gate_rows_, MOMKD_ISA);
const GateKernels MOMKD_CONCAT(gate_rows_, MOMKD_ISA) = {scores, backward};

}  // namespace momkd
