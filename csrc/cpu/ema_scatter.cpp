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

constexpr int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// The slots of each class as unit columns, in the order of the kernels: (C, S, padded K), with a bias row
// (padded K) that rules out the padding.
struct Bank {
  Bank(const float *memory, int64_t c, int64_t k, int64_t s, int width)
      : s(s), padded_k(padded(k)), columns(c * s * padded_k), bias(padded_k) {
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
    const int64_t most_chunks = std::max<int64_t>(kWorkspace / (c * k * (padded(s) * 4 + 8)), 1);
    least = std::max(least, (n + most_chunks - 1) / most_chunks);
    rows = least;
    count = (n + rows - 1) / rows;
  }
  int64_t rows, count;
};

// What one thread needs to walk a chunk: the rows that wait, by class, until a block of them is full.
struct Walker {
  Walker(int64_t c, int64_t s)
      : which(static_cast<size_t>(c * kBlockRows)),
        filled(static_cast<size_t>(c)),
        row(static_cast<size_t>(s)),
        block(kBlockRows * padded(s)),
        spare(kBlockRows * padded(s)) {}
  std::vector<int64_t> which;   // (C, kBlockRows), their numbers
  std::vector<int> filled;      // (C,)
  std::vector<float> row;       // (S,): one whose squared length leaves float32
  Buffer<float> block, spare;   // of the kernels
  const char *ahead = nullptr;  // the first row not yet asked for
  bool classes_fit = true;
};

class Accumulation {
 public:
  Accumulation(const EmaRows &rows, const Bank &bank, const EmaRowKernels &kernels, int64_t c, int64_t k,
               int32_t *assignments)
      : rows_(rows), bank_(bank), kernels_(kernels), c_(c), k_(k), assignments_(assignments) {}

  // Rows [first, last) into sums (C, K, padded S) and mass (C, K), which start at zero here.
  void chunk(int64_t first, int64_t last, Walker &walker, float *sums, double *mass) const {
    std::fill_n(sums, c_ * k_ * padded_s_, 0.0f);
    std::fill_n(mass, c_ * k_, 0.0);
    std::fill(walker.filled.begin(), walker.filled.end(), 0);
    walker.ahead = at(first) + kAheadBytes;
    const int64_t *row_class = rows_.row_class, classes = c_;
    int64_t *which = walker.which.data();
    int *filled = walker.filled.data();
    for (int64_t i = first; i < last; ++i) {
      const int64_t label = row_class[i];
      if (label < 0 || label >= classes) {
        assignments_[i] = -1;
        walker.classes_fit &= label == -1;
        continue;
      }
      const int count = filled[label]++;
      which[label * kBlockRows + count] = i;
      if (count == kBlockRows - 1) {
        block(label, kBlockRows, i, walker, sums, mass);
        filled[label] = 0;
      }
    }
    for (int64_t label = 0; label < classes; ++label)
      if (filled[label]) block(label, filled[label], last, walker, sums, mass);
  }

 private:
  const char *at(int64_t row) const { return static_cast<const char *>(rows_.z) + row * stride_; }

  // The rows that wait for class `label`; `now` is the row that the walker has come to.
  void block(int64_t label, int count, int64_t now, Walker &walker, float *sums, double *mass) const {
    int64_t *which = walker.which.data() + label * kBlockRows;
    for (int i = count; i < kBlockRows; ++i) which[i] = which[0];
    // Rows wait for others of their class, so the processor sees no simple stream: say what comes.
    walker.ahead = std::max(walker.ahead, at(now) + kAheadBytes);
    const EmaBlock rows = {at(0), rows_.type, stride_, which, walker.ahead};
    walker.ahead += kBlockRows * rows_.s * item_size(rows_.type);

    int32_t slot[kBlockRows];
    float scale[kBlockRows], weight[kBlockRows];  // scale: 1 / length, then what the row is added with
    const bool fine = kernels_.nearest(rows, rows_.s, bank_.of(label), bank_.bias.get(), bank_.padded_k,
                                       walker.block.get(), slot, scale);
    if (!fine)
      for (int i = 0; i < count; ++i)
        if (scale[i] == 0) careful(i, label, walker, slot[i], scale[i]);
    for (int i = 0; i < count; ++i) assignments_[which[i]] = slot[i];
    if (!rows_.normalize) std::fill_n(scale, kBlockRows, 1.0f);
    std::fill_n(weight, kBlockRows, 1.0f);
    if (rows_.weights)
      for (int i = 0; i < count; ++i) {
        weight[i] = rows_.weights[which[i]];
        if (!(weight[i] > 0 && weight[i] <= std::numeric_limits<float>::max())) slot[i] = -1;
        scale[i] *= weight[i];
      }
    kernels_.add(walker.block.get(), padded_s_, count, slot, weight, scale, sums + label * k_ * padded_s_,
                 mass + label * k_);
  }

  // The slot of row i of the block that is zero, tiny, huge or not finite (−1), and 1 / max(length, 1e-12),
  // through the row scaled to size 1.
  void careful(int i, int64_t label, Walker &walker, int32_t &slot, float &inverse) const {
    const int64_t width = kernels_.width;
    float *row = walker.row.data(), largest = 0;
    for (int64_t j = 0; j < rows_.s; ++j) {
      row[j] = walker.block[(j / width * kBlockRows + i) * width + j % width];
      if (!std::isfinite(row[j])) {
        slot = -1;
        return;
      }
      largest = std::max(largest, std::fabs(row[j]));
    }
    double squared = 0;
    for (int64_t j = 0; j < rows_.s; ++j) {
      row[j] = largest > 0 ? static_cast<float>(static_cast<double>(row[j]) / largest) : 0.0f;
      squared += static_cast<double>(row[j]) * row[j];
    }
    inverse = static_cast<float>(1 / std::max(std::sqrt(squared) * largest, kEps));
    const int64_t first[kBlockRows] = {};
    int32_t slots[kBlockRows];
    float unused[kBlockRows];
    const auto *z = reinterpret_cast<const char *>(row);
    kernels_.nearest({z, RowType::float32, 0, first, z}, rows_.s, bank_.of(label), bank_.bias.get(),
                     bank_.padded_k, walker.spare.get(), slots, unused);
    slot = slots[0];
  }

  const EmaRows &rows_;
  const Bank &bank_;
  const EmaRowKernels &kernels_;
  const int64_t c_, k_;
  int32_t *assignments_;
  const int64_t padded_s_ = padded(rows_.s), stride_ = rows_.row_stride * item_size(rows_.type);
};

}  // namespace

bool ema_accumulate(const EmaRows &rows, const float *memory, int64_t c, int64_t k, int threads, float *sums,
                    float *mass, int32_t *assignments) {
  const int64_t slots = c * k, s = rows.s;
  const Chunks chunks(rows.n, c, k, s);
  if (chunks.count == 0) {
    std::fill_n(sums, slots * s, 0.0f);
    std::fill_n(mass, slots, 0.0f);
    return true;
  }
  const EmaRowKernels &kernels = MOMKD_KERNELS(ema_rows);
  const Bank bank(memory, c, k, s, kernels.width);
  const Accumulation accumulation(rows, bank, kernels, c, k, assignments);
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), chunks.count));
  std::vector<Walker> walkers;  // made here: nothing may throw inside the parallel region
  for (int i = 0; i < workers; ++i) walkers.emplace_back(c, s);
  const Buffer<float> partial_sums(chunks.count * slots * padded(s));
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
                         partial_sums.get() + i * slots * padded(s), partial_mass.get() + i * slots);

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
          const float *from = partial_sums.get() + (i * slots + slot) * padded(s) + first;
          for (int64_t j = 0; j < width; ++j) column[j] += from[j];
        }
        for (int64_t j = 0; j < width; ++j) sums[slot * s + first + j] = static_cast<float>(column[j]);
      }
    }
  }
  return std::all_of(walkers.begin(), walkers.end(), [](const Walker &walker) { return walker.classes_fit; });
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

bool ema_scatter(const EmaRows &rows, float *memory, int64_t c, int64_t k, float *usage, double momentum,
                 int32_t *assignments, int threads) {
  const Buffer<float> sums(c * k * rows.s), mass(c * k);
  if (!ema_accumulate(rows, memory, c, k, threads, sums.get(), mass.get(), assignments)) return false;
  ema_apply(memory, usage, sums.get(), mass.get(), c, k, rows.s, momentum, threads);
  return true;
}

}  // namespace momkd
