#include "cpu/gate.h"

#include <algorithm>
#include <vector>

#include "cpu/amx.h"
#include "cpu/gate_rows.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace momkd {
namespace {

void *at(void *data, int64_t values, RowType type) {
  return data ? static_cast<char *>(data) + values * item_size(type) : nullptr;
}
const void *at(const void *data, int64_t values, RowType type) {
  return static_cast<const char *>(data) + values * item_size(type);
}

}  // namespace

void gate_scores(const void *products, GateTypes types, const GateShape &shape, const GateDropout &dropout,
                 const GateWeights &weights, float *scores, void *kept, int threads) {
  const auto kernel = MOMKD_KERNELS(gate_rows).scores[gate_pair(types)];
  const int64_t tasks = (shape.rows + kGateRows - 1) / kGateRows, size = gate_scratch(shape.hidden);
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * size);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t row = task * kGateRows, values = row * shape.columns();
    kernel(at(products, values, types.products), row, std::min(kGateRows, shape.rows - row), shape, dropout,
           weights, scores + row * shape.heads, at(kept, values, types.features),
           scratch.get() + worker * size);
  });
}

void gate_backward(const void *kept, GateTypes types, const GateShape &shape, const GateDropout &dropout,
                   const GateWeights &weights, const float *d_scores, void *d_rows, void *d_columns,
                   float *d_w_a, float *d_bias, int threads) {
  const auto kernel = MOMKD_KERNELS(gate_rows).backward[gate_pair(types)];
  // Sums over so many rows are added up apart: the same for any number of threads.
  constexpr int64_t kPartRows = 8 * kGateRows;
  const int64_t tasks = (shape.rows + kPartRows - 1) / kPartRows, size = gate_scratch(shape.hidden);
  const int64_t heads_size = shape.heads * shape.hidden, bias_size = shape.columns();
  const int64_t partial_size = heads_size + bias_size;
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * size), partial(tasks * partial_size);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    float *own = partial.get() + task * partial_size;
    std::fill_n(own, partial_size, 0.0f);
    const int64_t last = std::min((task + 1) * kPartRows, shape.rows);
    for (int64_t row = task * kPartRows; row < last; row += kGateRows) {
      const int64_t values = row * shape.columns();
      kernel(at(kept, values, types.features), row, std::min(kGateRows, last - row), shape, dropout, weights,
             d_scores + row * shape.heads, at(d_rows, values, types.products),
             at(d_columns, row, types.products), own, own + heads_size, scratch.get() + worker * size);
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    const float *own = partial.get() + task * partial_size;
    for (int64_t j = 0; j < heads_size; ++j) d_w_a[j] += own[j];
    for (int64_t j = 0; j < bias_size; ++j) d_bias[j] += own[heads_size + j];
  }
}

#ifdef MOMKD_HAVE_AMX

static_assert(kGateRows == kAmxRows, "a tile of products is a task of the gate");

void gate_scores_amx(const Rows &rows, const uint16_t *packed, const GateShape &shape,
                     const GateDropout &dropout, const GateWeights &weights, const float *score_bias,
                     float *scores, void *kept, PartialPools *pools, int threads) {
  const auto kernel = MOMKD_KERNELS(gate_rows).scores[gate_pair({RowType::bfloat16, RowType::float32})];
  // A task is some hundred rows, so that they are in cache still when they are pooled.
  struct Task {
    int64_t first, last, piece, end_piece;
  };
  std::vector<Task> tasks;
  if (pools) {
    const std::vector<BagPiece> &pieces = pools->pieces();
    for (size_t p = 0; p < pieces.size(); ++p) {
      const int64_t number = static_cast<int64_t>(p);
      if (tasks.empty() || pieces[p].last - tasks.back().first > BagPieces::kRows)
        tasks.push_back({pieces[p].first, pieces[p].last, number, number + 1});
      else
        tasks.back().last = pieces[p].last, tasks.back().end_piece = number + 1;
    }
  } else {
    for (int64_t first = 0; first < shape.rows; first += BagPieces::kRows)
      tasks.push_back({first, std::min(first + BagPieces::kRows, shape.rows), 0, 0});
  }
  const int64_t columns = shape.columns(), size = gate_scratch(shape.hidden), count = tasks.size();
  const int64_t products_size = kAmxRows * columns, rows_size = amx_scratch(rows.width);
  const int workers = workers_for(count, threads);
  const Buffer<float> scratch(workers * size), products(workers * products_size);
  const Buffer<uint16_t> space(workers * rows_size);
  parallel_for(count, workers, [&](int64_t number, int worker) {
    const Task &task = tasks[static_cast<size_t>(number)];
    const AmxTiles tiles;
    float *made = products.get() + worker * products_size;
    for (int64_t row = task.first; row < task.last; row += kAmxRows) {
      const int64_t here = std::min(kAmxRows, task.last - row);
      amx_products(static_cast<const uint16_t *>(rows.data) + row * rows.stride, rows.stride, here,
                   rows.width, packed, columns, made, space.get() + worker * rows_size);
      float *out = scores + row * shape.heads;
      kernel(made, row, here, shape, dropout, weights, out, at(kept, row * columns, RowType::bfloat16),
             scratch.get() + worker * size);
      for (int64_t i = 0; score_bias && i < here * shape.heads; ++i)
        out[i] += score_bias[row * shape.heads + i];
    }
    for (int64_t piece = task.piece; piece < task.end_piece; ++piece)
      pools->piece(piece, scores + pools->pieces()[static_cast<size_t>(piece)].first * shape.heads, worker);
  });
}

#endif

}  // namespace momkd
