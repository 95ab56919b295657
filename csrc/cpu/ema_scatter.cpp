#include "cpu/ema_scatter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/ema_scatter_rows.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace momkd {
namespace {

constexpr int64_t kAheadBytes = 8192;
constexpr double kEps = 1e-12;
constexpr double kCancelled = 1e-5;
constexpr int64_t kWorkspace = int64_t{64} << 20;  // bytes of partial sums, at most

// The slots of each class as unit columns, in the order of the kernels: (C, S, padded K), with a bias row
// (padded K) that rules out the padding.
struct Bank {
  Bank(const float *memory, int64_t c, int64_t k, int64_t s, int width)
      : s(s), padded_k((k + kLanes - 1) / kLanes * kLanes), columns(c * s * padded_k), bias(padded_k) {
    const int64_t vectors = padded_k / width;
    const auto place = [&](int64_t slot) { return slot % vectors * width + slot / vectors; };
    for (int64_t slot = 0; slot < padded_k; ++slot)
      bias.get()[place(slot)] = slot < k ? 0.0f : -std::numeric_limits<float>::infinity();
    std::fill_n(columns.get(), c * s * padded_k, 0.0f);
    for (int64_t slot = 0; slot < c * k; ++slot) {
      const float *from = memory + slot * s;
      double squared = 0;
      for (int64_t j = 0; j < s; ++j) squared += static_cast<double>(from[j]) * from[j];
      const double scale = 1 / std::max(std::sqrt(squared), kEps);
      float *to = of(slot / k) + place(slot % k);
      for (int64_t j = 0; j < s; ++j) to[j * padded_k] = static_cast<float>(from[j] * scale);
    }
  }
  float *of(int64_t label) const { return columns.get() + label * s * padded_k; }

  int64_t s, padded_k;
  Buffer<float> columns, bias;
};

// How the rows are cut: by sizes alone, never by the number of threads, so that sums are the same for any
// number.
struct Chunks {
  Chunks(int64_t n, int64_t c, int64_t k, int64_t s) {
    const int64_t enough_work = (int64_t{1} << 21) / std::max<int64_t>(s * std::max<int64_t>(k, kLanes), 1);
    int64_t least = std::max<int64_t>(std::min<int64_t>(std::max<int64_t>(enough_work, 64), 4096), 8 * c * k);
    const int64_t most_chunks = std::max<int64_t>(kWorkspace / (c * k * (s * 4 + 8)), 1);
    least = std::max(least, (n + most_chunks - 1) / most_chunks);
    rows = least;
    count = (n + rows - 1) / rows;
  }
  int64_t rows, count;
};

// What one thread needs to walk a chunk: the rows that wait, by class, until a block of them is full.
struct Walker {
  Walker(int64_t c, int64_t s, bool widen)
      : rows(static_cast<size_t>(c * kBlockRows)),
        which(static_cast<size_t>(c * kBlockRows)),
        filled(static_cast<size_t>(c)),
        wide(static_cast<size_t>(widen ? 2 * kBlockRows * s : 0)),
        scaled(static_cast<size_t>(s)) {}
  std::vector<const void *> rows;  // (C, kBlockRows)
  std::vector<int64_t> which;      // (C, kBlockRows), their numbers
  std::vector<int> filled;         // (C,)
  std::vector<float> wide;         // (2, kBlockRows, S): a block as float32, and the one before
  std::vector<float> scaled;       // (S,): a row whose squared length leaves float32
  EmaAdditions additions;          // of the block before
  int64_t blocks = 0;
  int64_t ahead = 0;  // the first row not yet asked for
};

class Accumulation {
 public:
  Accumulation(const EmaRows &rows, const Bank &bank, const EmaRowKernels &kernels, int64_t c, int64_t k,
               int32_t *assignments)
      : rows_(rows), bank_(bank), kernels_(kernels), c_(c), k_(k), assignments_(assignments) {}

  // Rows [first, last) into sums (C, K, S) and mass (C, K), which start at zero here.
  void chunk(int64_t first, int64_t last, Walker &walker, float *sums, double *mass) const {
    std::fill_n(sums, c_ * k_ * rows_.s, 0.0f);
    std::fill_n(mass, c_ * k_, 0.0);
    std::fill(walker.filled.begin(), walker.filled.end(), 0);
    walker.ahead = first;
    walker.additions.count = 0;
    const int64_t *row_class = rows_.row_class, classes = c_, stride = rows_.row_stride * item_;
    const void **waiting = walker.rows.data();
    int64_t *which = walker.which.data();
    int *filled = walker.filled.data();
    const char *row = static_cast<const char *>(rows_.z) + first * stride;
    for (int64_t i = first; i < last; ++i, row += stride) {
      const int64_t label = row_class[i];
      if (label < 0 || label >= classes) {
        assignments_[i] = -1;
        continue;
      }
      const int count = filled[label]++;
      const int64_t at = label * kBlockRows + count;
      waiting[at] = row;
      which[at] = i;
      if (count == kBlockRows - 1) {
        block(label, kBlockRows, i, walker, sums, mass);
        filled[label] = 0;
      }
    }
    for (int64_t label = 0; label < classes; ++label)
      if (filled[label]) block(label, filled[label], last, walker, sums, mass);
    kernels_.add(walker.additions, rows_.s);
  }

 private:
  // The rows that wait for class `label`; `now` is the row that the walker has come to. They are added during
  // the next block.
  void block(int64_t label, int count, int64_t now, Walker &walker, float *sums, double *mass) const {
    const int64_t *which = walker.which.data() + label * kBlockRows, s = rows_.s;
    const void *const *from = walker.rows.data() + label * kBlockRows;
    const float *row_at[kBlockRows];
    if (rows_.type == RowType::float32) {
      for (int i = 0; i < count; ++i) row_at[i] = static_cast<const float *>(from[i]);
    } else {
      const auto widen = rows_.type == RowType::float16 ? kernels_.widen_float16 : kernels_.widen_bfloat16;
      float *wide = walker.wide.data() + (walker.blocks++ & 1) * kBlockRows * s;
      for (int i = 0; i < count; ++i, wide += s) {
        widen(static_cast<const uint16_t *>(from[i]), s, wide);
        row_at[i] = wide;
      }
    }
    for (int i = count; i < kBlockRows; ++i) row_at[i] = row_at[0];

    // Rows wait for others of their class, so the processor sees no simple stream: say what comes.
    walker.ahead = std::max(walker.ahead, now + ahead_);
    const int64_t stride = rows_.row_stride * item_;
    const bool more = walker.ahead + kBlockRows <= rows_.n;
    const char *ahead = more ? static_cast<const char *>(rows_.z) + walker.ahead * stride : nullptr;
    walker.ahead += kBlockRows;

    int32_t slot[kBlockRows];
    float inverse[kBlockRows];  // of the length
    EmaAdditions &additions = walker.additions;
    kernels_.nearest(row_at, s, bank_.of(label), bank_.bias.get(), bank_.padded_k, &additions, ahead, stride,
                     s * item_, slot, inverse);

    int32_t *const assignments = assignments_;
    const float *const weights = rows_.weights;
    const bool normalize = rows_.normalize;
    float *const bank_sums = sums + label * k_ * s;
    double *const bank_mass = mass + label * k_;
    int adding = 0;
    for (int i = 0; i < count; ++i) {
      if (inverse[i] == 0) careful(row_at[i], label, walker.scaled.data(), slot[i], inverse[i]);
      assignments[which[i]] = slot[i];
      float weight = 1;
      if (weights) {
        weight = weights[which[i]];
        if (!(weight > 0 && weight <= std::numeric_limits<float>::max())) continue;
      }
      if (slot[i] < 0) continue;
      bank_mass[slot[i]] += weight;
      additions.row[adding] = row_at[i];
      additions.scale[adding] = normalize ? weight * inverse[i] : weight;
      additions.target[adding++] = bank_sums + slot[i] * s;
    }
    additions.count = adding;
  }

  // The slot of a row that is zero, tiny, huge or not finite (−1), and 1 / max(length, 1e-12), through the
  // row scaled to size 1.
  void careful(const float *row, int64_t label, float *scaled, int32_t &slot, float &inverse) const {
    float largest = 0;
    for (int64_t j = 0; j < rows_.s; ++j) {
      if (!std::isfinite(row[j])) {
        slot = -1;
        return;
      }
      largest = std::max(largest, std::fabs(row[j]));
    }
    double squared = 0;
    for (int64_t j = 0; j < rows_.s; ++j) {
      scaled[j] = largest > 0 ? static_cast<float>(static_cast<double>(row[j]) / largest) : 0.0f;
      squared += static_cast<double>(scaled[j]) * scaled[j];
    }
    inverse = static_cast<float>(1 / std::max(std::sqrt(squared) * largest, kEps));
    const float *block[kBlockRows];
    int32_t slots[kBlockRows];
    float unused[kBlockRows];
    std::fill_n(block, kBlockRows, scaled);
    kernels_.nearest(block, rows_.s, bank_.of(label), bank_.bias.get(), bank_.padded_k, nullptr, nullptr, 0,
                     0, slots, unused);
    slot = slots[0];
  }

  const EmaRows &rows_;
  const Bank &bank_;
  const EmaRowKernels &kernels_;
  const int64_t c_, k_;
  int32_t *assignments_;
  const int64_t item_ = item_size(rows_.type);
  const int64_t ahead_ = std::max<int64_t>(kAheadBytes / (rows_.s * item_), kBlockRows);
};

}  // namespace

void ema_accumulate(const EmaRows &rows, const float *memory, int64_t c, int64_t k, int threads, float *sums,
                    float *mass, int32_t *assignments) {
  const int64_t slots = c * k, s = rows.s;
  const Chunks chunks(rows.n, c, k, s);
  if (chunks.count == 0) {
    std::fill_n(sums, slots * s, 0.0f);
    std::fill_n(mass, slots, 0.0f);
    return;
  }
  const EmaRowKernels &kernels = MOMKD_KERNELS(ema_rows);
  const Bank bank(memory, c, k, s, kernels.width);
  const Accumulation accumulation(rows, bank, kernels, c, k, assignments);
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), chunks.count));
  std::vector<Walker> walkers;  // made here: nothing may throw inside the parallel region
  for (int i = 0; i < workers; ++i) walkers.emplace_back(c, s, rows.type != RowType::float32);
  const Buffer<float> partial_sums(chunks.count * slots * s);
  const std::unique_ptr<double[]> partial_mass(new double[static_cast<size_t>(chunks.count * slots)]);

#pragma omp parallel num_threads(workers) if (workers > 1)
  {
#ifdef _OPENMP
    Walker &walker = walkers[static_cast<size_t>(omp_get_thread_num())];
#else
    Walker &walker = walkers[0];
#endif
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < chunks.count; ++i)
      accumulation.chunk(i * chunks.rows, std::min((i + 1) * chunks.rows, rows.n), walker,
                         partial_sums.get() + i * slots * s, partial_mass.get() + i * slots);

    // The partial sums of each slot in the order of the chunks.
#pragma omp for schedule(static) nowait
    for (int64_t slot = 0; slot < slots; ++slot) {
      double total = 0;
      for (int64_t i = 0; i < chunks.count; ++i) total += partial_mass[static_cast<size_t>(i * slots + slot)];
      mass[slot] = static_cast<float>(total);
      for (int64_t first = 0; first < s; first += 64) {
        const int64_t width = std::min<int64_t>(64, s - first);
        double column[64] = {};
        for (int64_t i = 0; i < chunks.count; ++i) {
          const float *from = partial_sums.get() + (i * slots + slot) * s + first;
          for (int64_t j = 0; j < width; ++j) column[j] += from[j];
        }
        for (int64_t j = 0; j < width; ++j) sums[slot * s + first + j] = static_cast<float>(column[j]);
      }
    }
  }
}

void ema_apply(float *memory, float *usage, const float *sums, const float *mass, int64_t c, int64_t k,
               int64_t s, double momentum, int threads) {
  const int64_t slots = c * k;
  [[maybe_unused]] const int workers = slots * s < 16384 ? 1 : std::max(threads, 1);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t slot = 0; slot < slots; ++slot) {
    const double received = mass[slot];
    usage[slot] = static_cast<float>(momentum * usage[slot] + (1 - momentum) * received);
    if (!(received > 0)) continue;
    float *vector = memory + slot * s;
    const float *total = sums + slot * s;
    const double take = (1 - momentum) / received;
    double squared = 0, squared_before = 0;
    for (int64_t j = 0; j < s; ++j) {
      const double before = vector[j], moved = momentum * before + take * total[j];
      squared += moved * moved;
      squared_before += before * before;
    }
    const double length = std::sqrt(squared);
    const double least = kCancelled * (momentum * std::sqrt(squared_before) + (1 - momentum));
    if (!(length > least && length < 1e300))
      continue;  // nothing is left but rounding, or it is not finite: keep what was there
    for (int64_t j = 0; j < s; ++j)
      vector[j] = static_cast<float>((momentum * vector[j] + take * total[j]) / length);
  }
}

void ema_scatter(const EmaRows &rows, float *memory, int64_t c, int64_t k, float *usage, double momentum,
                 int32_t *assignments, int threads) {
  const Buffer<float> sums(c * k * rows.s), mass(c * k);
  ema_accumulate(rows, memory, c, k, threads, sums.get(), mass.get(), assignments);
  ema_apply(memory, usage, sums.get(), mass.get(), c, k, rows.s, momentum, threads);
}

}  // namespace momkd
