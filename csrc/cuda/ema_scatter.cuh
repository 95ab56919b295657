// The momentum update of the memory on a GPU; csrc/cpu/ema_scatter.h says what is computed. The rows are read
// once.
//
//   ema_bank_kernel     the slots as unit vectors
//   ema_rows_*_kernel   each block walks its own range of rows, a tile at a time, and keeps sums of its own:
//     receive   rows, classes and weights come to shared memory by asynchronous copies
//     inspect   a thread a row: its length, whether it is finite, what it brings
//     group     rows of one class form quads of four
//     compare   G lanes a quad, each with 4 rows × 8 slots in registers; lanes share out slots and columns
//     collect   rows sorted by slot; sixteen threads add up all rows of a slot, in the order of the rows
//   ema_runs_*_kernel   for a memory too large for sums in each block: collect above tells only the slots of
//     the rows, which are sorted by slot before they are added up here (ema_runs.cuh)
//   ema_reduce_kernel   the sums of all blocks in their order, in float64, and the update if usage is given
//   ema_apply_kernel    the update alone
//
// No atomics: which rows a sum takes, and in which order, follows from sizes alone. nvcc, NVRTC and,
// over tests/cpp/emulated_cuda.h, a C++ compiler read this file. momkd/cuda/ema.py plans the launches.
#pragma once

#include "cuda/ema_runs.cuh"
#include "cuda/ema_task.cuh"
#include "cuda/rows.cuh"

namespace momkd {

constexpr int kQuad = 4;         // rows of a lane
constexpr int kOwn = 8;          // slots of a lane
constexpr int kBins = kThreads;  // a thread a bin
constexpr int kSixteen = 16;
constexpr int kMostClasses = 64;
constexpr int kReduceThreads = 512, kReduceColumns = 64, kReduceLanes = kReduceColumns / 4;
constexpr unsigned kAll = 0xffffffffu;
constexpr double kEps = 1e-12;
constexpr double kCancelled = 1e-5;

// Squared lengths in this range are right in float32: nothing overflowed or fell among the subnormal numbers.
// Rows beyond it are compared after a change of scale, by a power of two.
constexpr float kSmallest = 1e-20f, kLargest = 1e30f, kUp = 0x1p64f, kDown = 0x1p-8f;
constexpr float kFinite = 3.402823466e38f;

// --- a block and its rows

struct BlockState {
  unsigned char table[kWarps][kBins];  // rows of a warp in each bin, then those of the warps before
  unsigned char starts[kBins], spans[kBins];
  unsigned char quads[(kThreads / kQuad + kMostClasses) * kQuad];  // the rows of each quad, kNone where fewer
  unsigned char sorted[kThreads];                                  // rows by bin of their slot
  uint2 entry[kThreads];                                           // where these rows are, and their scale
  int warp_total[kWarps];
  int units;          // of all bins
  int key[kThreads];  // class, then class · K + slot
  int slot[kThreads];
  float weight[kThreads];  // 0: brings nothing
  float scale[kThreads];   // of the row in the sum
};
constexpr unsigned kNone = 0xff;
constexpr int kStateBytes = 4480;
static_assert(sizeof(BlockState) <= kStateBytes, "momkd/cuda/ema.py reserves this much");

struct Place {
  int index, start, span;
};

template <typename Row, bool kShared>
struct RowBlock {
  const EmaTask &task;
  BlockState &state;
  float *const sums;
  double *const mass;
  const int thread, lane, warp;

  __device__ explicit RowBlock(const EmaTask &task)
      : task(task),
        state(*reinterpret_cast<BlockState *>(shared_memory())),
        sums(kShared ? reinterpret_cast<float *>(shared_memory() + task.sums_at)
                     : task.partial_sums + blockIdx.x * (task.classes * task.slots * task.sum_pitch)),
        mass(kShared ? reinterpret_cast<double *>(shared_memory() + task.mass_at)
                     : task.partial_mass + blockIdx.x * (task.classes * task.slots)),
        thread(threadIdx.x),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp) {}

  __device__ void run() {
    const int tile_rows = static_cast<int>(task.tile_rows), stages = static_cast<int>(task.stages);
    const long long begin = blockIdx.x * task.block_rows;
    const long long end = begin + task.block_rows < task.n ? begin + task.block_rows : task.n;
    prepare();
    for (int i = 0; i < stages; ++i) receive(begin + i * tile_rows, end, i);
    int stage = 0;
    for (long long first = begin; first < end; first += tile_rows) {
      if (stages == 2)
        wait_for_all_but_one();
      else
        wait_for_all();
      __syncthreads();
      unsigned char *tile = at_stage(stage);
      const int count = static_cast<int>(end - first < tile_rows ? end - first : tile_rows);
      inspect(tile, first, count);
      group();
      compare(tile);
      collect(tile, first, count);
      __syncthreads();
      receive(first + stages * tile_rows, end, stage);
      if (stages == 2) stage ^= 1;
    }
    if (kShared && !task.keys) publish();
  }

 private:
  static constexpr int kFours = Row::kChunk / 4;  // of columns, in a chunk

  __device__ int slots() const { return static_cast<int>(task.slots); }
  __device__ int cells() const { return static_cast<int>(task.classes * task.slots); }
  __device__ int columns() const { return static_cast<int>(task.s); }
  __device__ int chunks() const { return (columns() + Row::kChunk - 1) / Row::kChunk; }

  __device__ unsigned char *at_stage(int stage) const {
    return shared_memory() + task.stage_at + stage * task.stage_bytes;
  }

  __device__ void prepare() {
    clear_table();
    const long long floats = task.keys ? 0 : cells() * task.sum_pitch;
    const int masses = task.keys ? 0 : cells();
#pragma unroll 1
    for (long long i = thread; i < floats; i += kThreads) sums[i] = 0;
#pragma unroll 1
    for (int i = thread; i < masses; i += kThreads) mass[i] = 0;
    if (!kShared) return;
    float4 *to = reinterpret_cast<float4 *>(shared_memory() + task.bank_at);
    const int vectors = static_cast<int>(task.classes * task.bank_columns * task.bank_slots);
#pragma unroll 4
    for (int i = thread; i < vectors; i += kThreads) to[i] = task.bank[i];
  }

  __device__ void clear_table() {
    for (int w = 0; w < kWarps; ++w) state.table[w][thread] = 0;
  }

  // Starts the copies of the tile that begins at row `first`; columns beyond S are zero. One group of copies,
  // empty past the end.
  __device__ void receive(long long first, long long end, int stage) {
    const int count = static_cast<int>(end - first < task.tile_rows ? end - first : task.tile_rows);
    unsigned char *tile = at_stage(stage);
    const unsigned char *from =
        static_cast<const unsigned char *>(task.z) + first * task.row_stride * Row::kItem;
    const long long row_bytes = task.row_stride * Row::kItem;
    const int pitch = static_cast<int>(task.tile_pitch);
    if (task.copies_16) {
      const int chunks = this->chunks(), lanes = 1 << bits_of(chunks), rows_on = kThreads / lanes;
      const int chunk = thread % lanes;
      unsigned char *to = tile + thread / lanes * pitch + chunk * 16;
      from += thread / lanes * row_bytes + chunk * 16;
      if (chunk < chunks) {
#pragma unroll 4
        for (int row = thread / lanes; row < count; row += rows_on) {
          copy_16(to, from);
          to += rows_on * pitch;
          from += rows_on * row_bytes;
        }
      }
    } else {
#pragma unroll 1
      for (int row = warp; row < count; row += kWarps)
#pragma unroll 2
        for (int column = lane; column < chunks() * Row::kChunk; column += kWarp)
          copy_element(tile + row * pitch, from + row * row_bytes, column);
    }
    if (thread < count) {
      copy_8(tile + task.classes_at + 8 * thread, task.row_class + first + thread);
      if (task.weights) copy_4(tile + task.weights_at + 4 * thread, task.weights + first + thread);
    }
    end_of_group();
  }

  __device__ void copy_element(unsigned char *to, const unsigned char *from, int column) const {
    if (Row::kItem == 4)
      reinterpret_cast<unsigned *>(to)[column] =
          column < columns() ? reinterpret_cast<const unsigned *>(from)[column] : 0;
    else
      reinterpret_cast<unsigned short *>(to)[column] =
          column < columns() ? reinterpret_cast<const unsigned short *>(from)[column] : 0;
  }

  __device__ void inspect(unsigned char *tile, long long first, int count) {
    int label = -1;
    float weight = 0, scale = 0;
    double unscaled = 0;
    if (thread < count) {
      const long long asked = reinterpret_cast<const long long *>(tile + task.classes_at)[thread];
      if (asked >= 0 && asked < task.classes) {
        unsigned char *row = tile + thread * task.tile_pitch;
        weight = task.weights ? reinterpret_cast<const float *>(tile + task.weights_at)[thread] : 1.0f;
        if (!(weight > 0 && weight <= kFinite)) weight = 0;
        const float squared = squared_length(row);
        bool usable = squared >= kSmallest && squared <= kLargest;
        scale = task.normalize ? weight / sqrtf(squared) : weight;
        unscaled = scale;
        if (!usable) usable = rescale(row, weight, scale, unscaled);
        if (usable) label = static_cast<int>(asked);
      }
    }
    state.key[thread] = label;
    state.slot[thread] = -1;
    state.weight[thread] = label < 0 ? 0 : weight;
    state.scale[thread] = scale;
    if (task.keys && thread < count) task.scales[first + thread] = unscaled;
    for (int i = thread; i < static_cast<int>(sizeof state.quads) / 4; i += kThreads)
      reinterpret_cast<unsigned *>(state.quads)[i] = kAll;
  }

  __device__ float squared_length(const unsigned char *row) const {
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int i = 0; i < chunks(); ++i) {
      const typename Row::Chunk chunk = reinterpret_cast<const typename Row::Chunk *>(row)[i];
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        const float4 x = Row::part(chunk, j);
        total.x += x.x * x.x;
        total.y += x.y * x.y;
        total.z += x.z * x.z;
        total.w += x.w * x.w;
      }
    }
    return (total.x + total.y) + (total.z + total.w);
  }

  // A row that is zero, tiny, huge or not finite (false). `unscaled` is for the row as it was.
  __device__ bool rescale(unsigned char *row, float weight, float &scale, double &unscaled) const {
    double squared = 0;
#pragma unroll 1
    for (int column = 0; column < columns(); ++column) {
      const float x = Row::one(row, column);
      if (!(fabsf(x) <= kFinite)) return false;
      squared += static_cast<double>(x) * x;
    }
    const float factor = squared > 1 ? kDown : kUp;
#pragma unroll 1
    for (int column = 0; column < columns(); ++column) Row::put(row, column, Row::one(row, column) * factor);
    const double length = sqrt(squared) > kEps ? sqrt(squared) : kEps;
    unscaled = task.normalize ? weight / length : weight;
    scale = static_cast<float>(unscaled / factor);
    return true;
  }

  // Threads with equal bins, in the order of the threads; −1 is in none. A bin takes as many units as its
  // threads need, `each` to a unit. The table is zero before and must be zeroed after the next barrier.
  __device__ Place arrange(int bin, int bits, int each) {
    unsigned same = __ballot_sync(kAll, bin >= 0);
    for (int bit = 0; bit < bits; ++bit) {
      const unsigned set = __ballot_sync(kAll, bin >> bit & 1);
      same &= bin >> bit & 1 ? set : ~set;
    }
    const int before = __popc(same & ((1u << lane) - 1));
    if (bin >= 0 && before == 0) state.table[warp][bin] = static_cast<unsigned char>(__popc(same));
    __syncthreads();
    int count = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int here = state.table[w][thread];
      state.table[w][thread] = static_cast<unsigned char>(count);
      count += here;
    }
    const int span = (count + each - 1) / each;
    int inclusive = span;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int lower = __shfl_up_sync(kAll, inclusive, step);
      if (lane >= step) inclusive += lower;
    }
    if (lane == kWarp - 1) state.warp_total[warp] = inclusive;
    __syncthreads();
    for (int w = 0; w < warp; ++w) inclusive += state.warp_total[w];
    state.starts[thread] = static_cast<unsigned char>(inclusive - span);
    state.spans[thread] = static_cast<unsigned char>(span);
    if (thread == kBins - 1) state.units = inclusive;
    __syncthreads();
    if (bin < 0) return {0, 0, 1};
    return {state.table[warp][bin] + before, state.starts[bin], state.spans[bin]};
  }

  // Neighbouring quads hold neighbouring rows, which lie in different banks of shared memory.
  __device__ void group() {
    const Place place = arrange(state.key[thread], bits_of(static_cast<int>(task.classes)), kQuad);
    const unsigned index = place.index, span = place.span;
    if (state.key[thread] >= 0)
      state.quads[(place.start + index % span) * kQuad + index / span] = static_cast<unsigned char>(thread);
    __syncthreads();
    clear_table();
  }

  static __device__ int bits_of(int bins) { return kWarp - __clz(bins - 1); }

  __device__ void compare(const unsigned char *tile) {
    const int slot_lanes = static_cast<int>(task.slot_lanes),
              column_lanes = static_cast<int>(task.column_lanes);
    const int quads_of_warp = kWarp / (slot_lanes * column_lanes);
    const int part = lane / quads_of_warp, column_lane = part % column_lanes, slot_lane = part / column_lanes;
    const int swap = column_lane & 1 ? kOwn / 2 : 0;  // such lanes begin with the second half of their slots
    const int units = state.units;

    for (int first = warp * quads_of_warp; first < units; first += kWarps * quads_of_warp) {
      const int quad = first + lane % quads_of_warp;
      const unsigned rows = quad < units ? reinterpret_cast<const unsigned *>(state.quads)[quad] : kAll;
      const unsigned some = quad < units ? rows & 0xff : 0;
      const unsigned char *row_at[kQuad];
#pragma unroll
      for (int r = 0; r < kQuad; ++r) {
        const unsigned row = rows >> 8 * r & 0xff;
        row_at[r] = tile + (row == kNone ? some : row) * static_cast<unsigned>(task.tile_pitch);
      }
      const int label = quad < units ? state.key[some] : 0;

      float best[kQuad];
      int nearest[kQuad];
#pragma unroll
      for (int r = 0; r < kQuad; ++r) best[r] = -__int_as_float(0x7f800000), nearest[r] = 0;
      for (int block = 0; block < slots(); block += kOwn * slot_lanes) {
        const int slot = block + kOwn * slot_lane;
        float score[kQuad][kOwn] = {};
        products(row_at, label, slot, swap, column_lane, score);
        share(score, quads_of_warp, column_lanes);
#pragma unroll
        for (int i = 0; i < kOwn / 2; ++i) {
          const int k = slot + swap + i;
#pragma unroll
          for (int r = 0; r < kQuad; ++r)
            if (k < slots() && score[r][i] > best[r]) best[r] = score[r][i], nearest[r] = k;
        }
      }
      for (int step = quads_of_warp; step < kWarp; step *= 2) {
#pragma unroll
        for (int r = 0; r < kQuad; ++r) {
          const float other = __shfl_xor_sync(kAll, best[r], step);
          const int k = __shfl_xor_sync(kAll, nearest[r], step);
          if (other > best[r] || (other == best[r] && k < nearest[r])) best[r] = other, nearest[r] = k;
        }
      }
      if (part == 0) {
#pragma unroll
        for (int r = 0; r < kQuad; ++r) {
          const unsigned row = rows >> 8 * r & 0xff;
          if (row != kNone) state.slot[row] = nearest[r];
        }
      }
    }
    __syncthreads();
  }

  // Adds up the column lanes: of each two that are neighbours, one ends with the first half of its own
  // scores, which are the second half of the other's.
  __device__ static void share(float (&score)[kQuad][kOwn], int lanes_apart, int column_lanes) {
    constexpr int kHalf = kOwn / 2;
#pragma unroll
    for (int r = 0; r < kQuad; ++r)
#pragma unroll
      for (int i = 0; i < kHalf; ++i) score[r][i] += __shfl_xor_sync(kAll, score[r][i + kHalf], lanes_apart);
#pragma unroll 1
    for (int step = 2; step < column_lanes; step *= 2)
#pragma unroll
      for (int r = 0; r < kQuad; ++r)
#pragma unroll
        for (int i = 0; i < kHalf; ++i) score[r][i] += __shfl_xor_sync(kAll, score[r][i], lanes_apart * step);
  }

  // Of 4 rows with 8 slots from `slot` on, over every `column_lanes`-th chunk of columns.
  __device__ void products(const unsigned char *const (&row_at)[kQuad], int label, int slot, int swap,
                           int column_lane, float (&score)[kQuad][kOwn]) const {
    const int step = static_cast<int>(task.bank_slots);
    const float4 *bank =
        kShared ? reinterpret_cast<const float4 *>(shared_memory() + task.bank_at) : task.bank;
    bank += (label * static_cast<int>(task.bank_columns) + column_lane * kFours) * step + slot;
    const int chunks = this->chunks(), column_lanes = static_cast<int>(task.column_lanes);
#pragma unroll 1
    for (int chunk = column_lane; chunk < chunks; chunk += column_lanes) {
      typename Row::Chunk row[kQuad];
#pragma unroll
      for (int r = 0; r < kQuad; ++r)
        row[r] = reinterpret_cast<const typename Row::Chunk *>(row_at[r])[chunk];
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        float4 x[kQuad];
#pragma unroll
        for (int r = 0; r < kQuad; ++r) x[r] = Row::part(row[r], j);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float4 b = bank[j * step + (i < kOwn / 2 ? i + swap : i - swap)];
#pragma unroll
          for (int r = 0; r < kQuad; ++r) {
            score[r][i] += x[r].x * b.x;
            score[r][i] += x[r].y * b.y;
            score[r][i] += x[r].z * b.z;
            score[r][i] += x[r].w * b.w;
          }
        }
      }
      bank += column_lanes * kFours * step;
    }
  }

  __device__ void collect(const unsigned char *tile, long long first, int count) {
    const int slot = state.slot[thread], cells = this->cells();
    if (thread < count) task.assignments[first + thread] = slot;
    const int key = state.key[thread] * slots() + slot;
    const bool brings = slot >= 0 && state.weight[thread] > 0;
    if (task.keys) {
      if (thread < count) task.keys[first + thread] = brings ? key : cells;
      return;
    }
    const int bin = brings ? key % kBins : -1;
    const int used = cells < kBins ? cells : kBins;
    const Place place = arrange(bin, bits_of(used), 1);
    state.key[thread] = key;
    if (bin >= 0) {
      const int at = place.start + place.index;
      state.sorted[at] = static_cast<unsigned char>(thread);
      state.entry[at] =
          make_uint2(thread * static_cast<unsigned>(task.tile_pitch), __float_as_uint(state.scale[thread]));
    }
    __syncthreads();
    clear_table();

    weigh();
    // Each sixteen threads own every eighth bin, and with it the slots whose keys fall there.
    constexpr int kOwners = kThreads / kSixteen;
    const int member = thread % kSixteen;
#pragma unroll 1
    for (int own = thread / kSixteen; own < used; own += kOwners) {
      int from = state.starts[own];
      const int end = from + state.spans[own];
      if (cells <= kBins) {
        if (from < end) add(tile, from, end, own, member);
        continue;
      }
      while (from < end) {
        const int cell = state.key[state.sorted[from]];
        int to = from + 1;
        while (to < end && state.key[state.sorted[to]] == cell) ++to;
        add(tile, from, to, cell, member);
        from = to;
      }
    }
  }

  // Sorted rows [from, to) to slot `cell`, by sixteen threads of four columns each.
  __device__ void add(const unsigned char *tile, int from, int to, int cell, int member) {
    constexpr int kAhead = 4;
    const int sum_pitch = static_cast<int>(task.sum_pitch);
#pragma unroll 1
    for (int column = 4 * member; column < sum_pitch; column += 4 * kSixteen) {
      float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (int first = from; first < to; first += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const uint2 entry = state.entry[first + i < to ? first + i : from];
          const float scale = first + i < to ? __uint_as_float(entry.y) : 0.0f;
          const float4 x = Row::four(tile + entry.x, column);
          total.x += scale * x.x;
          total.y += scale * x.y;
          total.z += scale * x.z;
          total.w += scale * x.w;
        }
      }
      float4 *target = reinterpret_cast<float4 *>(sums + static_cast<long long>(cell) * sum_pitch + column);
      const float4 before = *target;
      *target = make_float4(before.x + total.x, before.y + total.y, before.z + total.z, before.w + total.w);
    }
  }

  // The mass of the slots, a thread a bin.
  __device__ void weigh() {
    const int from = state.starts[thread], to = from + state.spans[thread];
    int cell = -1;
    float total = 0;
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      const int row = state.sorted[i];
      if (state.key[row] != cell) {
        if (cell >= 0) mass[cell] += total;
        cell = state.key[row];
        total = 0;
      }
      total += state.weight[row];
    }
    if (cell >= 0) mass[cell] += total;
  }

  __device__ void publish() const {
    const int cells = this->cells(), floats = cells * static_cast<int>(task.sum_pitch);
    float4 *to = reinterpret_cast<float4 *>(task.partial_sums + blockIdx.x * static_cast<long long>(floats));
#pragma unroll 1
    for (int i = thread; i < floats / 4; i += kThreads) to[i] = reinterpret_cast<const float4 *>(sums)[i];
#pragma unroll 1
    for (int i = thread; i < cells; i += kThreads)
      task.partial_mass[blockIdx.x * static_cast<long long>(cells) + i] = mass[i];
  }
};

// --- the other kernels

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// Place `place` of (C, bank_slots): a slot as a unit vector, zero beyond K and beyond S.
__device__ inline void unit_slot(const EmaTask &task, int place, int lane) {
  const int label = place / static_cast<int>(task.bank_slots), k = place % static_cast<int>(task.bank_slots);
  const float *from = task.memory + (label * task.slots + k) * task.s;
  const int columns = k < task.slots ? static_cast<int>(task.s) : 0;
  double squared = 0;
  for (int j = lane; j < columns; j += kWarp) squared += static_cast<double>(from[j]) * from[j];
  squared = warp_sum(squared);
  const double scale = 1 / (sqrt(squared) < kEps ? kEps : sqrt(squared));
  for (int j = lane; j < 4 * task.bank_columns; j += kWarp) {
    float *to =
        reinterpret_cast<float *>(task.bank + (label * task.bank_columns + j / 4) * task.bank_slots + k);
    to[j % 4] = j < columns ? static_cast<float>(from[j] * scale) : 0.0f;
  }
}

// Where nothing is left of slot and mean but rounding, or it is not finite, the slot keeps what it was.
__device__ inline void apply_slot(const EmaTask &task, long long slot, int lane) {
  const double received = task.mass[slot];
  if (lane == 0)
    task.usage[slot] = static_cast<float>(task.momentum * task.usage[slot] + (1 - task.momentum) * received);
  if (!(received > 0)) return;
  float *vector = task.memory + slot * task.s;
  const float *total = task.sums + slot * task.s;
  const double take = (1 - task.momentum) / received;
  double squared = 0, squared_before = 0;
  for (int j = lane; j < task.s; j += kWarp) {
    const double before = vector[j], moved = task.momentum * before + take * total[j];
    squared += moved * moved;
    squared_before += before * before;
  }
  const double length = sqrt(warp_sum(squared)), length_before = sqrt(warp_sum(squared_before));
  const double least = kCancelled * (task.momentum * length_before + (1 - task.momentum));
  if (!(length > least && length < 1e300)) return;
  for (int j = lane; j < task.s; j += kWarp)
    vector[j] = static_cast<float>((task.momentum * vector[j] + take * total[j]) / length);
}

// Adds up what blocks or runs have for a slot. 16 lanes of 4 columns, 32 groups: group g takes parts g, g +
// 32, ... in turn.
__device__ inline void add_parts(const EmaTask &task, long long slot, long long parts, long long first_part,
                                 long long next_part, long long step) {
  constexpr int kGroups = kReduceThreads / kReduceLanes, kAhead = 8;  // loads in flight
  double (&columns)[kGroups][kReduceColumns] =
      *reinterpret_cast<double (*)[kGroups][kReduceColumns]>(shared_memory());
  const int thread = threadIdx.x, quarter = thread % kReduceLanes, group = thread / kReduceLanes;
  const auto place = [&](int part) { return part ? next_part + (part - 1) * step : first_part; };
  const int count = static_cast<int>(parts);
  for (int first = 0; first < task.s; first += kReduceColumns) {
    const int column = first + 4 * quarter;
    double total[4] = {};
    if (column < task.sum_pitch) {
      const float *from = task.partial_sums + column;
      const auto at = [&](int part) {
        return *reinterpret_cast<const float4 *>(from + place(part) * task.sum_pitch);
      };
      const auto add = [&](const float4 &x) {
        total[0] += x.x, total[1] += x.y, total[2] += x.z, total[3] += x.w;
      };
      int part = group;
      for (; part + (kAhead - 1) * kGroups < count; part += kAhead * kGroups) {
        float4 x[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) x[i] = at(part + i * kGroups);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) add(x[i]);
      }
#pragma unroll 1
      for (; part < count; part += kGroups) add(at(part));
    }
    for (int i = 0; i < 4; ++i) columns[group][4 * quarter + i] = total[i];
    __syncthreads();
    if (thread < kReduceColumns && first + thread < task.s) {
      double all = 0;
      for (int g = 0; g < kGroups; ++g) all += columns[g][thread];
      task.sums[slot * task.s + first + thread] = static_cast<float>(all);
    }
    __syncthreads();
  }
  if (thread >= kWarp) return;
  double received = 0;
#pragma unroll 8
  for (int part = thread; part < count; part += kWarp) received += task.partial_mass[place(part)];
  received = warp_sum(received);
  if (thread == 0) task.mass[slot] = static_cast<float>(received);
  __syncwarp();
}

__device__ inline void reduce_slot(const EmaTask &task, int slot) {
  const long long cells = task.classes * task.slots;
  if (task.keys) {
    const SlotRuns runs(task, slot);
    const long long first = 2 * runs.run + (runs.begins_inside ? 1 : 0);
    if (!runs.complete) add_parts(task, slot, runs.count, first, 2 * runs.run + 2, 2);
  } else {
    add_parts(task, slot, task.blocks, slot, slot + cells, cells);
  }
  if (task.usage && threadIdx.x < kWarp) apply_slot(task, slot, threadIdx.x);
}

}  // namespace momkd

#define MOMKD_ROWS_KERNEL(name, Row, shared)                                    \
  extern "C" __global__ void __launch_bounds__(momkd::kThreads, shared ? 4 : 3) \
      name(const __grid_constant__ momkd::EmaTask task) {                       \
    momkd::RowBlock<momkd::Row, shared>(task).run();                            \
  }
MOMKD_ROWS_KERNEL(ema_rows_float32_shared_kernel, Float32, true)
MOMKD_ROWS_KERNEL(ema_rows_float16_shared_kernel, Float16, true)
MOMKD_ROWS_KERNEL(ema_rows_bfloat16_shared_kernel, BFloat16, true)
MOMKD_ROWS_KERNEL(ema_rows_float32_global_kernel, Float32, false)
MOMKD_ROWS_KERNEL(ema_rows_float16_global_kernel, Float16, false)
MOMKD_ROWS_KERNEL(ema_rows_bfloat16_global_kernel, BFloat16, false)
#undef MOMKD_ROWS_KERNEL

#define MOMKD_RUNS_KERNEL(name, Row)                            \
  extern "C" __global__ void __launch_bounds__(momkd::kThreads) \
      name(const __grid_constant__ momkd::EmaTask task) {       \
    momkd::Run<momkd::Row>(task).walk();                        \
  }
MOMKD_RUNS_KERNEL(ema_runs_float32_kernel, Float32)
MOMKD_RUNS_KERNEL(ema_runs_float16_kernel, Float16)
MOMKD_RUNS_KERNEL(ema_runs_bfloat16_kernel, BFloat16)
#undef MOMKD_RUNS_KERNEL

extern "C" __global__ void ema_bank_kernel(const __grid_constant__ momkd::EmaTask task) {
  momkd::unit_slot(task, blockIdx.x, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(momkd::kReduceThreads, 1)
    ema_reduce_kernel(const __grid_constant__ momkd::EmaTask task) {
  momkd::reduce_slot(task, blockIdx.x);
}

extern "C" __global__ void ema_apply_kernel(const __grid_constant__ momkd::EmaTask task) {
  momkd::apply_slot(task, blockIdx.x, threadIdx.x);
}
