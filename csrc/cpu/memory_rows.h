// The inner loops on the memory, for each type of rows (in the order of RowType) and each instruction set.
#pragma once

#include <cstdint>

namespace momkd {

constexpr int kSlotGroup = 8;       // slots whose dot products are summed side by side
constexpr int kMostLanes = 16;      // rows side by side in a vector, at most
constexpr float kUnitEps = 1e-12f;  // rows are divided by max(|z|, kUnitEps)

// The unit slots in two layouts.
struct BankView {
  const float *rows;     // (C, K, S)
  const float *grouped;  // (C, K / kSlotGroup rounded up, S, kSlotGroup), padded with zeros
  int64_t classes, slots, width;
};

// Static, so that every file has its own copy: see simd.h.
static inline int64_t groups_of(const BankView &bank) { return (bank.slots + kSlotGroup - 1) / kSlotGroup; }

// Of products with slots that are kSummands numbers each: columns of a class, and of a summand, whole tiles.
constexpr int kSummands = 3;
static inline int64_t padded_slots(const BankView &bank) { return (bank.slots + 15) / 16 * 16; }
static inline int64_t summand_columns(const BankView &bank) {
  return (bank.classes * padded_slots(bank) + 31) / 32 * 32;
}

// Floats of scratch that a kernel wants: three tiles of rows, and the cosines of a class with a tile, twice.
static inline int64_t scratch_of(const BankView &bank) {
  return kMostLanes * (3 * bank.width + 2 * groups_of(bank) * kSlotGroup);
}

struct MemoryKernels {
  // value[i · classes + c] and slot[...] for i < count; tau as in memory_similarity.
  void (*reduce[3])(const void *z, int64_t stride, int64_t count, const BankView &bank, float tau,
                    float *value, int32_t *slot, float *scratch);
  // The same of bfloat16 rows whose products with the slots are there: (count, columns).
  void (*reduce_products)(const uint16_t *z, int64_t stride, int64_t count, const float *products,
                          int64_t columns, const BankView &bank, float tau, float *value, int32_t *slot,
                          float *scratch);
  // cosine[i · classes + c] of the given slots.
  void (*chosen[3])(const void *z, int64_t stride, int64_t count, const BankView &bank, const int32_t *slot,
                    float *cosine, float *scratch);
  // The gradient of the rows from that of the reduced values (count, C); d_bank (C, K, S), which may be null,
  // is added to. d_z, which may be null, has its rows one after the other. For max `slot` says which were
  // chosen.
  void (*pull_max[3])(const void *z, int64_t stride, int64_t count, const BankView &bank, const int32_t *slot,
                      const float *d_value, void *d_z, float *d_bank, float *scratch);
  void (*pull_lse[3])(const void *z, int64_t stride, int64_t count, const BankView &bank, float tau,
                      const float *d_value, void *d_z, float *d_bank, float *scratch);
};

extern const MemoryKernels memory_rows_baseline;
extern const MemoryKernels memory_rows_avx2;
extern const MemoryKernels memory_rows_avx512;

}  // namespace momkd
