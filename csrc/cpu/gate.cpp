#include "cpu/gate.h"

#include <algorithm>

#include "cpu/gate_rows.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace momkd {
namespace {

constexpr int64_t kTaskRows = 64;

}  // namespace

void gate_scores(const float *pre, const GateShape &shape, const GateDropout &dropout, const float *w_a,
                 const float *b_a, float *scores, int threads) {
  const GateKernels &kernels = MOMKD_KERNELS(gate_rows);
  const int64_t tasks = (shape.rows + kTaskRows - 1) / kTaskRows, size = gate_scratch(shape.hidden);
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * size);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task * kTaskRows;
    kernels.scores(pre, first, std::min(kTaskRows, shape.rows - first), shape, dropout, w_a, b_a, scores,
                   scratch.get() + worker * size);
  });
}

void gate_backward(float *pre, const GateShape &shape, const GateDropout &dropout, const float *w_a,
                   const float *d_scores, float *d_w_a, float *d_bias, int threads) {
  const GateKernels &kernels = MOMKD_KERNELS(gate_rows);
  const int64_t tasks = (shape.rows + kTaskRows - 1) / kTaskRows, size = gate_scratch(shape.hidden);
  const int64_t heads_size = shape.heads * shape.hidden, bias_size = (shape.gated ? 2 : 1) * shape.hidden;
  const int64_t partial_size = heads_size + bias_size;
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * size), partial(tasks * partial_size);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task * kTaskRows;
    float *own = partial.get() + task * partial_size;
    std::fill_n(own, partial_size, 0.0f);
    kernels.backward(pre, first, std::min(kTaskRows, shape.rows - first), shape, dropout, w_a, d_scores, own,
                     own + heads_size, scratch.get() + worker * size);
  });
  for (int64_t task = 0; task < tasks; ++task) {
    const float *own = partial.get() + task * partial_size;
    for (int64_t j = 0; j < heads_size; ++j) d_w_a[j] += own[j];
    for (int64_t j = 0; j < bias_size; ++j) d_bias[j] += own[heads_size + j];
  }
}

}  // namespace momkd
