#include "cpu/memory.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory_bank.h"
#include "cpu/memory_rows.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

namespace momkd {
namespace {

const void *row_of(const Rows &rows, int64_t i) {
  return static_cast<const char *>(rows.data) + i * rows.stride * item_size(rows.type);
}

// Where row i of a result begins whose rows lie one after the other; null stays null.
void *row_of(void *data, const Rows &like, int64_t i) {
  return data ? static_cast<char *>(data) + i * like.width * item_size(like.type) : nullptr;
}

constexpr int64_t kRows = BagPieces::kRows;
constexpr int64_t kWorkspace = int64_t{32} << 20;  // bytes of partial gradients of the memory, at most

// Similarities of rows [first, first + count) and their nearest slots, for one worker with its scratch.
void reduce_rows(const Rows &z, int64_t first, int64_t count, const UnitBank &bank, float tau,
                 float *similarity, int32_t *nearest, float *scratch) {
  const MemoryKernels &kernels = MOMKD_KERNELS(memory_rows);
  const BankView &view = bank.view();
#ifdef MOMKD_HAVE_AMX
  if (bank.packed()) {
    const AmxTiles tiles;
    float *products = scratch + scratch_of(view);
    auto *rows = reinterpret_cast<uint16_t *>(products + kAmxRows * bank.columns());
    for (int64_t i = 0; i < count; i += kAmxRows) {
      const int64_t here = std::min(kAmxRows, count - i), at = i * view.classes;
      const auto *from = static_cast<const uint16_t *>(row_of(z, first + i));
      amx_products(from, z.stride, here, z.width, bank.packed(), bank.columns(), products, rows);
      kernels.reduce_products(from, z.stride, here, products, bank.columns(), view, tau, similarity + at,
                              nearest + at, scratch);
    }
    return;
  }
#endif
  kernels.reduce[static_cast<int>(z.type)](row_of(z, first), z.stride, count, view, tau, similarity, nearest,
                                           scratch);
}

// The largest similarity of the other classes, and which.
struct Rival {
  float value;
  int64_t label;
};

Rival rival_of(const float *similarity, int64_t classes, int64_t own) {
  Rival best{0, -1};
  for (int64_t c = 0; c < classes; ++c) {
    if (c == own) continue;
    const float here = similarity[c];
    if (best.label < 0 || here > best.value || (here != here && best.value == best.value)) best = {here, c};
  }
  return best;
}

// (C,) similarities of a row to (H,) margins.
void margins(const float *similarity, int64_t classes, bool per_class, float *margin) {
  if (!per_class) {
    margin[0] = similarity[1] - similarity[0];
    return;
  }
  for (int64_t c = 0; c < classes; ++c) margin[c] = similarity[c] - rival_of(similarity, classes, c).value;
}

void margins_backward(const float *similarity, const float *d_margin, int64_t classes, bool per_class,
                      float *d_similarity) {
  if (!per_class) {
    d_similarity[0] = -d_margin[0];
    d_similarity[1] = d_margin[0];
    return;
  }
  for (int64_t c = 0; c < classes; ++c) d_similarity[c] = d_margin[c];
  for (int64_t c = 0; c < classes; ++c) d_similarity[rival_of(similarity, classes, c).label] -= d_margin[c];
}

}  // namespace

void memory_similarity(const Rows &z, const float *memory, const MemoryShape &shape, float tau,
                       float *similarity, int32_t *nearest, int threads) {
  const UnitBank bank(memory, shape, z.type);
  const int64_t tasks = (z.n + kRows - 1) / kRows, own_size = bank.scratch();
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * own_size);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task * kRows, at = first * shape.classes;
    reduce_rows(z, first, std::min(kRows, z.n - first), bank, tau, similarity + at, nearest + at,
                scratch.get() + worker * own_size);
  });
}

void memory_similarity_backward(const float *grad, const Rows &z, const float *memory,
                                const MemoryShape &shape, float tau, const int32_t *nearest, void *d_z,
                                float *d_memory, int threads) {
  const MemoryKernels &kernels = MOMKD_KERNELS(memory_rows);
  const UnitBank bank(memory, shape);
  const BankView &view = bank.view();
  const int type = static_cast<int>(z.type);
  const int64_t size = shape.classes * shape.slots * shape.width;
  // Rows of a task: more where their partial gradients would not fit the workspace.
  const int64_t most = d_memory ? std::max<int64_t>(kWorkspace / (size * 4), 1) : z.n;
  const int64_t rows = std::max(kRows, (z.n + most - 1) / std::max<int64_t>(most, 1));
  const int64_t tasks = (z.n + rows - 1) / rows;
  const int workers = workers_for(tasks, threads);
  const Buffer<float> scratch(workers * scratch_of(view));
  const Buffer<float> partial(d_memory ? tasks * size : 0);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task * rows, count = std::min(rows, z.n - first), at = first * shape.classes;
    float *own = scratch.get() + worker * scratch_of(view);
    float *d_bank = d_memory ? partial.get() + task * size : nullptr;
    if (d_bank) std::fill_n(d_bank, size, 0.0f);
    void *out = row_of(d_z, z, first);
    if (tau > 0)
      kernels.pull_lse[type](row_of(z, first), z.stride, count, view, tau, grad + at, out, d_bank, own);
    else
      kernels.pull_max[type](row_of(z, first), z.stride, count, view, nearest + at, grad + at, out, d_bank,
                             own);
  });
  if (!d_memory) return;
  std::vector<double> total(static_cast<size_t>(size), 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t j = 0; j < size; ++j) total[static_cast<size_t>(j)] += partial[task * size + j];
  bank.pull(total.data(), d_memory);
}

namespace {

// Of each row of similarities (N, C): β (margin − Δ), and the class of the largest other one.
struct Gap {
  float excess;
  int64_t rival;
};

Gap gap_of(const float *similarity, int64_t classes, int64_t label, const SoftAngle &angle) {
  const Rival rival = rival_of(similarity, classes, label);
  if (rival.label < 0)
    return {-std::numeric_limits<float>::infinity(), -1};  // the only class: nothing to part from
  return {angle.beta * (angle.margin - (similarity[label] - rival.value)), rival.label};
}

Buffer<float> soft_similarity(const Rows &z, const float *memory, const MemoryShape &shape, float tau,
                              int threads) {
  Buffer<float> similarity(z.n * shape.classes);
  const Buffer<int32_t> nearest(z.n * shape.classes);
  memory_similarity(z, memory, shape, tau, similarity.get(), nearest.get(), threads);
  return similarity;
}

}  // namespace

void soft_angle_loss(const Rows &z, const float *memory, const MemoryShape &shape, const SoftAngle &angle,
                     float *losses, int threads) {
  const Buffer<float> similarity = soft_similarity(z, memory, shape, angle.tau, threads);
  for (int64_t i = 0; i < z.n; ++i) {
    losses[i] = 0;
    if (angle.labels[i] < 0) continue;
    const float excess =
        gap_of(similarity.get() + i * shape.classes, shape.classes, angle.labels[i], angle).excess;
    losses[i] = std::max(excess, 0.0f) + std::log1p(std::exp(-std::fabs(excess)));
  }
}

void soft_angle_loss_backward(const float *grad, const Rows &z, const float *memory, const MemoryShape &shape,
                              const SoftAngle &angle, void *d_z, float *d_memory, int threads) {
  const Buffer<float> similarity = soft_similarity(z, memory, shape, angle.tau, threads);
  const Buffer<float> d_similarity(z.n * shape.classes);
  std::fill_n(d_similarity.get(), z.n * shape.classes, 0.0f);
  for (int64_t i = 0; i < z.n; ++i) {
    const int64_t label = angle.labels[i], at = i * shape.classes;
    if (label < 0) continue;
    const Gap gap = gap_of(similarity.get() + at, shape.classes, label, angle);
    const float d_gap = -angle.beta / (1 + std::exp(-gap.excess)) * grad[i];
    if (gap.rival < 0) continue;
    d_similarity[at + label] = d_gap;
    d_similarity[at + gap.rival] = -d_gap;
  }
  memory_similarity_backward(d_similarity.get(), z, memory, shape, angle.tau, nullptr, d_z, d_memory,
                             threads);
}

void memory_guided_pool(const Rows &z, const Rows &values, const float *memory, const MemoryShape &shape,
                        const GuidedBags &bags, float *pooled, float *attention, int32_t *nearest,
                        int threads) {
  const UnitBank bank(memory, shape, z.type);
  const int64_t heads = bags.per_class ? shape.classes : 1;
  const BagPieces pieces(bags.offsets, bags.bags);
  const int64_t tasks = static_cast<int64_t>(pieces.pieces.size());
  const int workers = workers_for(tasks, threads);
  const int64_t own_size = bank.scratch() + kRows * shape.classes;
  const Buffer<float> scratch(workers * own_size);
  const Buffer<float> stats(bags.bags * heads * 2);
  PartialPools partial(pieces, values, heads, workers);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const BagPiece &piece = pieces.pieces[static_cast<size_t>(task)];
    const int64_t rows = piece.last - piece.first;
    float *own = scratch.get() + worker * own_size, *similarity = own + bank.scratch();
    reduce_rows(z, piece.first, rows, bank, 0, similarity, nearest + piece.first * shape.classes, own);
    float *scores = attention + piece.first * heads;
    for (int64_t i = 0; i < rows; ++i) {
      margins(similarity + i * shape.classes, shape.classes, bags.per_class, scores + i * heads);
      for (int64_t h = 0; h < heads; ++h) scores[i * heads + h] /= bags.temperature;
    }
    partial.piece(task, scores, worker);
  });
  partial.combine(pooled, stats.get(), threads);
  softmax_weights(attention, stats.get(), pieces, heads, attention, threads);
}

void memory_guided_pool_backward(const float *grad, const Rows &z, const Rows &values, const float *memory,
                                 const MemoryShape &shape, const GuidedBags &bags, const float *attention,
                                 const int32_t *nearest, void *d_z, void *d_values, float *d_temperature,
                                 int threads) {
  const MemoryKernels &kernels = MOMKD_KERNELS(memory_rows);
  const UnitBank bank(memory, shape);
  const BankView &view = bank.view();
  const int64_t classes = shape.classes, heads = bags.per_class ? classes : 1;
  const int type = static_cast<int>(z.type);
  const BagPieces pieces(bags.offsets, bags.bags);
  const int64_t tasks = static_cast<int64_t>(pieces.pieces.size());
  const int workers = workers_for(tasks, threads);
  const bool scores_too = d_z || d_temperature;
  const Buffer<float> d_scores(scores_too ? values.n * heads : 0);
  const int64_t own_size = scratch_of(view) + 2 * kRows * classes + classes;
  const Buffer<float> scratch(scores_too ? workers * own_size : 0);
  std::vector<double> d_inverse(static_cast<size_t>(tasks), 0.0);  // by piece: Σ d_score · margin
  parallel_for(tasks, workers, [&](int64_t task, int) {
    pool_backward_piece(pieces.pieces[static_cast<size_t>(task)], values, grad, attention, heads,
                        scores_too ? d_scores.get() : nullptr, d_values);
  });
  if (!scores_too) return;
  softmax_backward(pieces, attention, heads, d_scores.get(), threads);
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const BagPiece &piece = pieces.pieces[static_cast<size_t>(task)];
    const int64_t rows = piece.last - piece.first;
    const int32_t *slots = nearest + piece.first * classes;
    float *own = scratch.get() + worker * own_size, *similarity = own + scratch_of(view);
    float *d_similarity = similarity + kRows * classes, *margin = d_similarity + kRows * classes;
    kernels.chosen[type](row_of(z, piece.first), z.stride, rows, view, slots, similarity, own);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      float *d_score = d_scores.get() + (piece.first + i) * heads;
      margins(similarity + i * classes, classes, bags.per_class, margin);
      for (int64_t h = 0; h < heads; ++h) {
        sum += static_cast<double>(d_score[h]) * margin[h];
        d_score[h] /= bags.temperature;
      }
      margins_backward(similarity + i * classes, d_score, classes, bags.per_class,
                       d_similarity + i * classes);
    }
    d_inverse[static_cast<size_t>(task)] = sum;
    if (d_z)
      kernels.pull_max[type](row_of(z, piece.first), z.stride, rows, view, slots, d_similarity,
                             row_of(d_z, z, piece.first), nullptr, own);
  });
  if (!d_temperature) return;
  double total = 0;
  for (double sum : d_inverse) total += sum;
  *d_temperature = static_cast<float>(-total / (static_cast<double>(bags.temperature) * bags.temperature));
}

}  // namespace momkd
