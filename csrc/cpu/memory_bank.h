// The memory as the kernels read it: unit slots, in the layouts of their products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/memory_rows.h"
#include "cpu/parallel.h"

namespace momkd {

// The unit slots, and what they were divided by.
class UnitBank {
 public:
  // For products with rows of `type`, or for none.
  UnitBank(const float *memory, const MemoryShape &shape, RowType type = RowType::float32)
      : rows_(shape.classes * shape.slots * shape.width),
        view_{rows_.get(), nullptr, shape.classes, shape.slots, shape.width},
        grouped_(shape.classes * groups_of(view_) * shape.width * kSlotGroup),
        norm_(shape.classes * shape.slots) {
    view_.grouped = grouped_.get();
    std::fill_n(grouped_.get(), shape.classes * groups_of(view_) * shape.width * kSlotGroup, 0.0f);
    for (int64_t slot = 0; slot < shape.classes * shape.slots; ++slot) {
      const float *from = memory + slot * shape.width;
      double squared = 0;
      for (int64_t j = 0; j < shape.width; ++j) squared += static_cast<double>(from[j]) * from[j];
      const double length = std::sqrt(squared);
      norm_[slot] = length < kUnitEps ? double{kUnitEps} : length;
      const int64_t k = slot % shape.slots, group = slot / shape.slots * groups_of(view_) + k / kSlotGroup;
      float *row = rows_.get() + slot * shape.width;
      float *column = grouped_.get() + group * shape.width * kSlotGroup + k % kSlotGroup;
      for (int64_t j = 0; j < shape.width; ++j)
        column[j * kSlotGroup] = row[j] = static_cast<float>(from[j] / norm_[slot]);
    }
#ifdef MOMKD_HAVE_AMX
    if (type == RowType::bfloat16 && has_amx()) pack();
#else
    (void)type;
#endif
  }
  const BankView &view() const { return view_; }

  // The slots for the matrix unit; null where products are made in registers. A slot is the sum of
  // kSummands bfloat16 numbers, so these are products with float32 slots: columns (kSummands, C, K padded).
  const uint16_t *packed() const { return columns_ ? packed_.get() : nullptr; }
  int64_t columns() const { return columns_; }

  // Floats of scratch that the reduction of rows wants.
  int64_t scratch() const {
#ifdef MOMKD_HAVE_AMX
    if (columns_) return scratch_of(view_) + kAmxRows * columns_ + (amx_scratch(view_.width) + 1) / 2 + 16;
#endif
    return scratch_of(view_);
  }

  // The gradient of the memory from that of the unit slots.
  void pull(const double *d_unit, float *d_memory) const {
    for (int64_t slot = 0; slot < view_.classes * view_.slots; ++slot) {
      const float *unit = rows_.get() + slot * view_.width;
      const double *d = d_unit + slot * view_.width;
      double radial = 0;
      for (int64_t j = 0; j < view_.width; ++j) radial += d[j] * unit[j];
      if (norm_[slot] <= kUnitEps) radial = 0;
      for (int64_t j = 0; j < view_.width; ++j)
        d_memory[slot * view_.width + j] = static_cast<float>((d[j] - radial * unit[j]) / norm_[slot]);
    }
  }

 private:
#ifdef MOMKD_HAVE_AMX
  void pack() {
    const int64_t part = summand_columns(view_), width = view_.width;
    const Buffer<uint16_t> halves(kSummands * part * width);
    std::fill_n(halves.get(), kSummands * part * width, uint16_t{0});
    for (int64_t slot = 0; slot < view_.classes * view_.slots; ++slot) {
      const int64_t column = slot / view_.slots * padded_slots(view_) + slot % view_.slots;
      for (int64_t j = 0; j < width; ++j) {
        float rest = rows_[slot * width + j];
        for (int64_t summand = 0; summand < kSummands; ++summand) {
          uint32_t bits;
          std::memcpy(&bits, &rest, sizeof bits);
          halves[(summand * part + column) * width + j] = static_cast<uint16_t>(bits >> 16);
          bits &= 0xffff0000u;  // 8 of 24 digits
          float cut;
          std::memcpy(&cut, &bits, sizeof cut);
          rest -= cut;
        }
      }
    }
    columns_ = kSummands * part;
    packed_ = Buffer<uint16_t>(amx_packed_size(columns_, width));
    amx_pack(halves.get(), columns_, width, packed_.get());
  }
#endif

  Buffer<float> rows_;
  BankView view_;
  Buffer<float> grouped_;
  Buffer<double> norm_;
  int64_t columns_ = 0;
  Buffer<uint16_t> packed_{0};
};

}  // namespace momkd
