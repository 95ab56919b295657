// Products of bfloat16 rows and weights by the matrix unit (AMX) that some x86 processors have.
#pragma once

#include <cstdint>

namespace momkd {

// Whether this was compiled in, the processor has it and the system lets this process use it. See isa.cpp.
bool has_amx();

#ifdef MOMKD_HAVE_AMX

constexpr int64_t kAmxRows = 32, kAmxColumns = 32,
                  kAmxDepth = 32;  // of the tiles that are multiplied at once

// Whether weights (columns, width) are cut into whole tiles; width may be any.
constexpr bool amx_takes(int64_t columns) { return columns % kAmxColumns == 0; }

// Values that packed weights hold, and those of scratch that a product wants.
constexpr int64_t amx_depth(int64_t width) { return (width + kAmxDepth - 1) / kAmxDepth * kAmxDepth; }
constexpr int64_t amx_packed_size(int64_t columns, int64_t width) { return columns * amx_depth(width); }
constexpr int64_t amx_scratch(int64_t width) { return kAmxRows * amx_depth(width); }

// Weights (columns, width) in the order in which products read them.
void amx_pack(const uint16_t *weights, int64_t columns, int64_t width, uint16_t *packed);

// The matrix unit is set up for the thread that holds one of these.
class AmxTiles {
 public:
  AmxTiles();
  ~AmxTiles();
  AmxTiles(const AmxTiles &) = delete;
  AmxTiles &operator=(const AmxTiles &) = delete;
};

// out (count, columns) float32 = rows (count, width) · weightsᵀ, count <= kAmxRows; `out` has room for
// kAmxRows rows. All are summed in float32.
void amx_products(const uint16_t *rows, int64_t stride, int64_t count, int64_t width, const uint16_t *packed,
                  int64_t columns, float *out, uint16_t *scratch);

#endif

}  // namespace momkd
