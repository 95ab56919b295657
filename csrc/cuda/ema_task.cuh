// What the kernels of the momentum update are told; momkd/cuda/ema.py makes it.
#pragma once

namespace momkd {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;

// What all kernels are told. Every field has eight bytes; momkd/cuda/ema.py packs them in this order.
struct EmaTask {
  const void *z;               // (N, S), `row_stride` elements from row to row
  const long long *row_class;  // (N,)
  const float *weights;        // (N,), or null for 1
  float *memory;               // (C, K, S)
  float *usage;                // (C, K), or null: no update
  float *sums;                 // (C, K, S)
  float *mass;                 // (C, K)
  int *assignments;            // (N,)
  float4 *bank;                // (C, bank_columns, bank_slots): four columns of each slot, slots side by side
  float *partial_sums;         // (blocks, C·K, sum_pitch), or (runs, 2, sum_pitch)
  double *partial_mass;        // (blocks, C·K), or (runs, 2)
  int *keys;               // (N,): class · K + slot, or C·K for a row that brings nothing; null: no sorting
  double *scales;          // (N,): of the row in the sum
  const int *sorted_keys;  // (N,)
  const long long *order;  // (N,): the rows by key, those of one key in their order
  double momentum;
  long long n, s, row_stride, classes, slots, normalize;
  long long blocks, block_rows, tile_rows;
  long long tile_pitch;  // bytes from row to row of a tile
  long long bank_columns, bank_slots, sum_pitch;
  long long slot_lanes, column_lanes;  // G = slot_lanes · column_lanes
  long long run_rows, run_lanes;       // sorted rows of a run, and the threads that walk it
  long long stages, copies_16;         // 16 bytes at a time: every row begins and ends on such a boundary
  long long mass_at, sums_at, bank_at, stage_at, stage_bytes, classes_at,
      weights_at;  // shared memory, in bytes
};

__device__ inline unsigned char *shared_memory() {
  extern __shared__ __align__(16) unsigned char momkd_shared[];
  return momkd_shared;
}

}  // namespace momkd
