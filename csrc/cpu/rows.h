// Rows of values in memory, of one of three types.
#pragma once

#include <cstdint>

namespace momkd {

enum class RowType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

constexpr int64_t item_size(RowType type) { return type == RowType::float32 ? 4 : 2; }

// (n, width): `stride` elements from row to row, columns one after the other.
struct Rows {
  const void *data;
  RowType type;
  int64_t n;
  int64_t width;
  int64_t stride;
};

}  // namespace momkd
