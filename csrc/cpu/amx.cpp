// Compiled for processors with AMX alone: nothing here may run before has_amx(), and, as in *_rows.cpp,
// nothing may be an inline function of another header, of which the linker keeps one copy.
#include "cpu/amx.h"

#ifdef MOMKD_HAVE_AMX
#include <immintrin.h>

#include <cstddef>

#include "cpu/simd.h"

namespace momkd {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

static_assert(kWidth == 16, "a vector is a row of a tile");
constexpr int64_t kTileRows = 16,
                  kTileValues = kTileRows * kAmxDepth;  // 16 rows of 32 values, or of 16 pairs

}  // namespace

void amx_pack(const uint16_t *weights, int64_t columns, int64_t width, uint16_t *packed) {
  // A tile holds 16 pairs of values of 16 columns: packed[pair][column][2]. Seen as words of two values, 16
  // by 16 of them are turned.
  const int64_t depth = amx_depth(width);
  for (int64_t panel = 0; panel < columns / kTileRows; ++panel) {
    const uint16_t *from = weights + panel * kTileRows * width;
    uint16_t *to = packed + panel / 2 * kAmxColumns * depth + panel % 2 * kTileValues;
    for (int64_t k = 0; k < depth; k += kAmxDepth, to += 2 * kTileValues) {
      Vec words[kTileRows] = {};
      const int64_t values = width - k < kAmxDepth ? width - k : kAmxDepth;
      for (int64_t column = 0; column < kTileRows; ++column)
        __builtin_memcpy(&words[column], from + column * width + k, static_cast<std::size_t>(values) * 2);
      transpose(words);
      __builtin_memcpy(to, words, sizeof words);
    }
  }
}

AmxTiles::AmxTiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[tile] = 64;
    config.rows[tile] = kTileRows;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

AmxTiles::~AmxTiles() { _tile_release(); }

void amx_products(const uint16_t *rows, int64_t stride, int64_t count, int64_t width, const uint16_t *packed,
                  int64_t columns, float *out, uint16_t *scratch) {
  const int64_t depth = amx_depth(width);
  if (count < kAmxRows || depth != width) {  // tiles are whole: the rest is zero
    __builtin_memset(scratch, 0, static_cast<std::size_t>(kAmxRows * depth) * 2);
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(scratch + i * depth, rows + i * stride, static_cast<std::size_t>(width) * 2);
    rows = scratch;
    stride = depth;
  }
  const std::size_t row_bytes = static_cast<std::size_t>(stride) * 2,
                    out_bytes = static_cast<std::size_t>(columns) * 4;
  const uint16_t *lower = rows + kTileRows * stride;
  for (int64_t column = 0; column < columns; column += kAmxColumns) {
    const uint16_t *panel = packed + column * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kAmxDepth, panel += 2 * kTileValues) {
      _tile_loadd(4, rows + k, row_bytes);
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + kTileValues, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float *to = out + column;
    _tile_stored(0, to, out_bytes);
    _tile_stored(1, to + kTileRows, out_bytes);
    _tile_stored(2, to + kTileRows * columns, out_bytes);
    _tile_stored(3, to + kTileRows * columns + kTileRows, out_bytes);
  }
}

}  // namespace momkd

#endif
