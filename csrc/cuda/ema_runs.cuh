// Sums of rows that are sorted by slot, for memories so large that sums of each block would be too many. Any
// number of rows of one slot is shared out evenly, and what is added up is float64.
#pragma once

#include "cuda/ema_task.cuh"

namespace momkd {

// The first place among the sorted rows whose key is not below `key`.
__device__ inline long long first_of(const EmaTask &task, int key) {
  long long low = 0, high = task.n;
  while (low < high) {
    const long long middle = (low + high) / 2;
    if (task.sorted_keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Where the rows of a slot lie: in `count` runs from `run` on.
struct SlotRuns {
  long long run, count;
  bool begins_inside;  // of the first of them
  bool complete;       // begins and ends inside of one run, which knows the sum

  __device__ SlotRuns(const EmaTask &task, int slot) {
    const long long begin = first_of(task, slot), end = first_of(task, slot + 1);
    run = begin / task.run_rows;
    count = begin < end ? (end - 1) / task.run_rows - run + 1 : 0;
    begins_inside = begin % task.run_rows != 0;
    complete = count == 1 && begins_inside && end % task.run_rows != 0 && end != task.n;
  }
};

// A run of sorted rows, walked by `run_lanes` threads of four columns each, which exchange nothing. What the
// first slot of a run received and what the last one did are partial sums, as these slots may have rows in
// other runs.
template <typename Row>
struct Run {
  const EmaTask &task;
  const int lane, column;
  const long long run, begin, end;
  double total[4] = {}, received = 0;

  __device__ explicit Run(const EmaTask &task)
      : task(task),
        lane(threadIdx.x % static_cast<int>(task.run_lanes)),
        column(4 * lane),
        run(blockIdx.x * (kThreads / task.run_lanes) + threadIdx.x / task.run_lanes),
        begin(run * task.run_rows),
        end(begin + task.run_rows < task.n ? begin + task.run_rows : task.n) {}

  __device__ void walk() {
    constexpr int kAhead = 4;  // loads in flight
    const int cells = static_cast<int>(task.classes * task.slots);
    if (begin >= end || column >= task.s) return;
    int cell = task.sorted_keys[begin];
    long long from = begin;
    for (long long first = begin; first < end && cell < cells; first += kAhead) {
      int key[kAhead];
      double scale[kAhead];
      float weight[kAhead];
      float4 x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        key[i] = first + i < end ? task.sorted_keys[first + i] : cells;
        const long long row = task.order[key[i] < cells ? first + i : first];
        scale[i] = task.scales[row];
        weight[i] = task.weights ? task.weights[row] : 1.0f;
        x[i] = load(row);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < end && key[i] != cell) {
          give(cell, from, first + i);
          cell = key[i], from = first + i;
        }
        if (key[i] == cells) continue;
        total[0] += scale[i] * x[i].x, total[1] += scale[i] * x[i].y;
        total[2] += scale[i] * x[i].z, total[3] += scale[i] * x[i].w;
        received += weight[i];
      }
    }
    if (cell < cells) give(cell, from, end);
  }

 private:
  __device__ float4 load(long long row) const {
    const unsigned char *from =
        static_cast<const unsigned char *>(task.z) + row * task.row_stride * Row::kItem;
    if (task.copies_16) return Row::four(from, column);
    const auto one = [&](int i) { return column + i < task.s ? Row::one(from, column + i) : 0.0f; };
    return make_float4(one(0), one(1), one(2), one(3));
  }

  __device__ void give(int cell, long long from, long long to) {
    const bool first = from == begin;
    if (first || to == end) {
      const long long place = 2 * run + (first ? 0 : 1);
      *reinterpret_cast<float4 *>(task.partial_sums + place * task.sum_pitch + column) =
          make_float4(static_cast<float>(total[0]), static_cast<float>(total[1]),
                      static_cast<float>(total[2]), static_cast<float>(total[3]));
      if (lane == 0) task.partial_mass[place] = received;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < task.s) task.sums[cell * task.s + column + i] = static_cast<float>(total[i]);
      if (lane == 0) task.mass[cell] = static_cast<float>(received);
    }
    for (int i = 0; i < 4; ++i) total[i] = 0;
    received = 0;
  }
};

}  // namespace momkd
