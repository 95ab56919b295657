#include "cpu/pool.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/pool_rows.h"

namespace momkd {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

const void *row_of(const Rows &rows, int64_t i) {
  return static_cast<const char *>(rows.data) + i * rows.stride * item_size(rows.type);
}

}  // namespace

BagPieces::BagPieces(const int32_t *offsets, int64_t bags) : bags(bags) {
  begin.push_back(0);
  for (int64_t bag = 0; bag < bags; ++bag) {
    for (int64_t first = offsets[bag]; first < offsets[bag + 1]; first += kRows)
      pieces.push_back({bag, first, std::min<int64_t>(first + kRows, offsets[bag + 1])});
    begin.push_back(static_cast<int64_t>(pieces.size()));
  }
}

struct PartialPools::Memory {
  Memory(int64_t pieces, int64_t heads, int64_t width, int workers)
      : sums(pieces * heads * width),
        stats(pieces * heads * 2),
        weights(workers * BagPieces::kRows * heads) {}
  Buffer<float> sums;
  Buffer<double> stats;
  Buffer<float> weights;
};

PartialPools::PartialPools(const BagPieces &pieces, const Rows &values, int64_t heads, int workers)
    : pieces_(pieces),
      values_(values),
      heads_(heads),
      memory_(new Memory(static_cast<int64_t>(pieces.pieces.size()), heads, values.width, workers)) {}

PartialPools::~PartialPools() { delete memory_; }

void PartialPools::piece(int64_t number, const float *scores, int worker) {
  const PoolKernels &kernels = MOMKD_KERNELS(pool_rows);
  const BagPiece &piece = pieces_.pieces[static_cast<size_t>(number)];
  const int64_t rows = piece.last - piece.first, width = values_.width;
  float *weights = memory_->weights.get() + worker * BagPieces::kRows * heads_;
  double *stats = memory_->stats.get() + number * heads_ * 2;
  for (int64_t h = 0; h < heads_; ++h) {
    float top = kNone;
    for (int64_t i = 0; i < rows; ++i) {
      const float score = scores[i * heads_ + h];
      if (score > top || score != score) top = score;
    }
    stats[2 * h] = top;
    const float subtract = top == kNone ? 0 : top;
    for (int64_t i = 0; i < rows; ++i) weights[i * heads_ + h] = scores[i * heads_ + h] - subtract;
  }
  kernels.exp(weights, rows * heads_);
  float *sums = memory_->sums.get() + number * heads_ * width;
  std::fill_n(sums, heads_ * width, 0.0f);
  for (int64_t h = 0; h < heads_; ++h) {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += weights[i * heads_ + h];
    stats[2 * h + 1] = total;
    kernels.add[static_cast<int>(values_.type)](row_of(values_, piece.first), values_.stride, rows,
                                                weights + h, heads_, width, sums + h * width);
  }
}

void PartialPools::combine(float *pooled, float *stats, int threads) const {
  const int64_t width = values_.width, tasks = pieces_.bags * heads_;
  parallel_for(tasks, workers_for(tasks, threads), [&](int64_t task, int) {
    const int64_t bag = task / heads_, h = task % heads_;
    const int64_t first = pieces_.begin[static_cast<size_t>(bag)],
                  last = pieces_.begin[static_cast<size_t>(bag + 1)];
    double top = kNone;
    for (int64_t p = first; p < last; ++p) {
      const double here = memory_->stats[(p * heads_ + h) * 2];
      if (here > top || here != here) top = here;
    }
    if (top == kNone) top = 0;
    double total = 0;
    const auto scale = [&](int64_t p) { return std::exp(memory_->stats[(p * heads_ + h) * 2] - top); };
    for (int64_t p = first; p < last; ++p) total += scale(p) * memory_->stats[(p * heads_ + h) * 2 + 1];
    stats[task * 2] = static_cast<float>(top);
    stats[task * 2 + 1] = static_cast<float>(total);
    float *out = pooled + task * width;
    const double divide = total == 0 ? 1 : total;
    for (int64_t start = 0; start < width; start += 64) {
      const int64_t columns = std::min<int64_t>(64, width - start);
      double sum[64] = {};
      for (int64_t p = first; p < last; ++p) {
        const float *part = memory_->sums.get() + (p * heads_ + h) * width + start;
        const double factor = scale(p);
        for (int64_t j = 0; j < columns; ++j) sum[j] += factor * part[j];
      }
      for (int64_t j = 0; j < columns; ++j) out[start + j] = static_cast<float>(sum[j] / divide);
    }
  });
}

void attention_pool(const Rows &values, const float *scores, const int32_t *offsets, int64_t bags,
                    int64_t heads, float *pooled, float *stats, int threads) {
  const BagPieces pieces(offsets, bags);
  const int64_t tasks = static_cast<int64_t>(pieces.pieces.size());
  const int workers = workers_for(tasks, threads);
  PartialPools partial(pieces, values, heads, workers);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    partial.piece(task, scores + pieces.pieces[static_cast<size_t>(task)].first * heads, worker);
  });
  partial.combine(pooled, stats, threads);
}

void softmax_weights(const float *scores, const float *stats, const BagPieces &pieces, int64_t heads,
                     float *weights, int threads) {
  const PoolKernels &kernels = MOMKD_KERNELS(pool_rows);
  const int64_t tasks = static_cast<int64_t>(pieces.pieces.size());
  parallel_for(tasks, workers_for(tasks, threads), [&](int64_t task, int) {
    const BagPiece &piece = pieces.pieces[static_cast<size_t>(task)];
    const float *bag = stats + piece.bag * heads * 2;
    const int64_t first = piece.first * heads, count = (piece.last - piece.first) * heads;
    for (int64_t i = 0; i < count; ++i) weights[first + i] = scores[first + i] - bag[i % heads * 2];
    kernels.exp(weights + first, count);
    for (int64_t i = 0; i < count; ++i) {
      const float total = bag[i % heads * 2 + 1];
      weights[first + i] /= total == 0 ? 1 : total;
    }
  });
}

void pool_backward_piece(const BagPiece &piece, const Rows &values, const float *grad, const float *weights,
                         int64_t heads, float *dots, void *d_values) {
  const PoolKernels &kernels = MOMKD_KERNELS(pool_rows);
  const int64_t width = values.width;
  const int type = static_cast<int>(values.type);
  const float *bag_grad = grad + piece.bag * heads * width;
  constexpr int64_t kNear = 16;  // rows that stay in the nearest cache between the two uses
  for (int64_t first = piece.first; first < piece.last; first += kNear) {
    const int64_t rows = std::min(kNear, piece.last - first);
    for (int64_t h = 0; dots && h < heads; ++h)
      kernels.dot[type](row_of(values, first), values.stride, rows, bag_grad + h * width, width,
                        dots + first * heads + h, heads);
    if (d_values)
      kernels.spread[type](static_cast<char *>(d_values) + first * width * item_size(values.type), rows,
                           weights + first * heads, heads, bag_grad, width);
  }
}

void softmax_backward(const BagPieces &pieces, const float *weights, int64_t heads, float *d_scores,
                      int threads) {
  parallel_for(pieces.bags, workers_for(pieces.bags, threads), [&](int64_t bag, int) {
    const int64_t begin = pieces.begin[static_cast<size_t>(bag)],
                  end = pieces.begin[static_cast<size_t>(bag + 1)];
    if (begin == end) return;
    const int64_t first = pieces.pieces[static_cast<size_t>(begin)].first * heads;
    const int64_t last = pieces.pieces[static_cast<size_t>(end - 1)].last * heads;
    for (int64_t h = 0; h < heads; ++h) {
      double total = 0, mean = 0;
      for (int64_t i = first + h; i < last; i += heads) {
        total += weights[i];
        mean += static_cast<double>(weights[i]) * d_scores[i];
      }
      mean /= total == 0 ? 1 : total;
      for (int64_t i = first + h; i < last; i += heads)
        d_scores[i] = static_cast<float>(weights[i] * (d_scores[i] - mean));
    }
  });
}

void attention_pool_backward(const float *grad, const Rows &values, const float *scores,
                             const int32_t *offsets, int64_t bags, int64_t heads, const float *stats,
                             float *d_scores, void *d_values, int threads) {
  const BagPieces pieces(offsets, bags);
  const int64_t tasks = static_cast<int64_t>(pieces.pieces.size());
  const Buffer<float> weights(values.n * heads);
  softmax_weights(scores, stats, pieces, heads, weights.get(), threads);
  parallel_for(tasks, workers_for(tasks, threads), [&](int64_t task, int) {
    pool_backward_piece(pieces.pieces[static_cast<size_t>(task)], values, grad, weights.get(), heads,
                        d_scores, d_values);
  });
  if (d_scores) softmax_backward(pieces, weights.get(), heads, d_scores, threads);
}

}  // namespace momkd
