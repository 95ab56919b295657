// Philox 4x32-10 on vectors of counters, see momkd/reference/philox.py. For *_rows.cpp, as simd.h.
#pragma once

#include "cpu/simd.h"

namespace momkd {
namespace {

typedef uint64_t WideVec __attribute__((vector_size(8 * kWidth)));

struct Counters {
  BitVec c0, c1, c2, c3;
};

struct Product {
  BitVec high, low;
};

inline Product multiply(BitVec a, uint32_t b) {
  const WideVec product = __builtin_convertvector(a, WideVec) * static_cast<uint64_t>(b);
  return {__builtin_convertvector(product >> 32, BitVec), __builtin_convertvector(product, BitVec)};
}

// Four words of each counter, in place of it.
inline Counters philox(Counters c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(c.c0, 0xD2511F53u), b = multiply(c.c2, 0xCD9E8D57u);
    c = {b.high ^ c.c1 ^ k0, b.low, a.high ^ c.c3 ^ k1, a.low};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace
}  // namespace momkd
