// Vectors of the instruction set that a *_rows.cpp is compiled for, and the mathematics on them.
//
// Everything lies in an unnamed namespace: each of those files is compiled several times, and the linker
// keeps only one copy of an inline function with a name, which might be the one for a processor that this
// isn't.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOMKD_CONCAT_(a, b) a##b
#define MOMKD_CONCAT(a, b) MOMKD_CONCAT_(a, b)

namespace momkd {
namespace {

#if defined(__clang__)
#define MOMKD_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define MOMKD_SHUFFLE2(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MOMKD_SHUFFLE(v, ...) __builtin_shuffle(v, IntVec{__VA_ARGS__})
#define MOMKD_SHUFFLE2(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));
typedef float LooseVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

// Fold all lanes into every lane, by halves: a lane with its neighbour at distance kWidth / 2, ..., 2, 1.
#if defined(__AVX512F__)
constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = fold(v, MOMKD_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}
#elif defined(__AVX__)
constexpr IntVec kIota = {0, 1, 2, 3, 4, 5, 6, 7};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
}
#else
constexpr IntVec kIota = {0, 1, 2, 3};
template <typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  v = fold(v, MOMKD_SHUFFLE(v, 2, 3, 0, 1));
  return fold(v, MOMKD_SHUFFLE(v, 1, 0, 3, 2));
}
#endif

inline float sum_lanes(Vec v) {
  return fold_lanes(v, [](Vec a, Vec b) { return a + b; })[0];
}

// The larger; NaN where `b` is.
inline Vec max_of(Vec a, Vec b) { return a > b ? a : b; }

inline BitVec bits_of(Vec v) { return reinterpret_cast<BitVec>(v); }
inline Vec of_bits(BitVec v) { return reinterpret_cast<Vec>(v); }

// Widening: a type tells how its values lie in memory, and comes and goes as float32.
struct Float32 {
  typedef float stored;
  static Vec load(const float *at) { return *reinterpret_cast<const LooseVec *>(at); }
  static void store(float *at, Vec v) { *reinterpret_cast<LooseVec *>(at) = v; }
  static float load_one(const float *at) { return *at; }
  static void store_one(float *at, float v) { *at = v; }
};

// By name where there is one instruction for it: of the general form GCC makes five. The forms with a mask,
// of all lanes, spare the warnings of GCC's headers about those without.
#if defined(__AVX512F__)
inline BitVec widen_bits(const uint16_t *at) {
  return reinterpret_cast<BitVec>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i_u *)at)));
}
inline void narrow_bits(uint16_t *at, BitVec bits) {
  _mm256_storeu_si256((__m256i_u *)at, _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
}
#elif defined(__AVX2__)
inline BitVec widen_bits(const uint16_t *at) {
  return reinterpret_cast<BitVec>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)at)));
}
inline void narrow_bits(uint16_t *at, BitVec bits) {
  const __m256i all = reinterpret_cast<__m256i>(bits);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(all, all), 0x08);
  _mm_storeu_si128((__m128i_u *)at, _mm256_castsi256_si128(packed));
}
#else
inline BitVec widen_bits(const uint16_t *at) {
  return __builtin_convertvector(HalfVec(*reinterpret_cast<const LooseHalfVec *>(at)), BitVec);
}
inline void narrow_bits(uint16_t *at, BitVec bits) {
  *reinterpret_cast<LooseHalfVec *>(at) = __builtin_convertvector(bits, HalfVec);
}
#endif

// The processor's own narrowing (AVX-512 BF16) makes zeros of subnormal numbers; this keeps them.
struct Bfloat16 {
  typedef uint16_t stored;
  static BitVec narrow(Vec v) {
    const BitVec bits = bits_of(v);
    const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return v == v ? rounded : (bits >> 16 | 0x40u);
  }
  static Vec load(const uint16_t *at) { return of_bits(widen_bits(at) << 16); }
  static void store(uint16_t *at, Vec v) { narrow_bits(at, narrow(v)); }
  static float load_one(const uint16_t *at) {
    const uint32_t bits = static_cast<uint32_t>(*at) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void store_one(uint16_t *at, float v) {
    uint16_t all[kWidth];
    store(all, v - Vec{});  // the sum would lose the sign of −0
    *at = all[0];
  }
};

#if defined(__F16C__)
struct Float16 {
  typedef uint16_t stored;
#if defined(__AVX512F__)
  static Vec load(const uint16_t *at) {
    return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i_u *)at)));
  }
  static __m256i halves(Vec v) {
    return _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static void store(uint16_t *at, Vec v) { _mm256_storeu_si256((__m256i_u *)at, halves(v)); }
#else
  static Vec load(const uint16_t *at) {
    return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)at)));
  }
  static __m128i halves(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static void store(uint16_t *at, Vec v) { _mm_storeu_si128((__m128i_u *)at, halves(v)); }
#endif
  static BitVec narrow(Vec v) {
    return __builtin_convertvector(reinterpret_cast<HalfVec>(halves(v)), BitVec);
  }
  static float load_one(const uint16_t *at) { return _cvtsh_ss(*at); }
  static void store_one(uint16_t *at, float v) { *at = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
};
#else
struct Float16 {
  typedef uint16_t stored;
  // Exponent and mantissa into place, times 2^112, which also makes subnormal numbers right; infinities and
  // NaNs then lie at 2^16 and above and get the full exponent.
  static Vec widen(BitVec half) {
    const Vec scaled = of_bits((half & 0x7fffu) << 13) * 0x1p112f;
    const BitVec special = scaled >= 65536.0f ? BitVec{} + 0x7f800000u : BitVec{};
    return of_bits(bits_of(scaled) | special | (half & 0x8000u) << 16);
  }
  static BitVec narrow(Vec v) {
    const BitVec bits = bits_of(v);
    const BitVec sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    const BitVec normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    const BitVec subnormal = bits_of(of_bits(size) + 0.5f) - 0x3f000000u;  // rounds at 2^-24, as float16 does
    BitVec half = size < 0x38800000u ? subnormal : normal;
    half = size >= 0x477ff000u ? BitVec{} + 0x7c00u : half;
    half = size > 0x7f800000u ? BitVec{} + 0x7e00u : half;
    return half | sign;
  }
  static Vec load(const uint16_t *at) { return widen(widen_bits(at)); }
  static void store(uint16_t *at, Vec v) { narrow_bits(at, narrow(v)); }
  static float load_one(const uint16_t *at) { return widen(BitVec{} + *at)[0]; }
  static void store_one(uint16_t *at, float v) {
    uint16_t all[kWidth];
    store(all, v - Vec{});  // the sum would lose the sign of −0
    *at = all[0];
  }
};
#endif

// The first `count` values of a vector, at most all; the others are 0.
template <typename Type>
inline Vec load_part(const typename Type::stored *at, int64_t count) {
  if (count >= kWidth) return Type::load(at);
  typename Type::stored all[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = at[i];
  return Type::load(all);
}

template <typename Type>
inline void store_part(typename Type::stored *at, int64_t count, Vec v) {
  if (count >= kWidth) return Type::store(at, v);
  typename Type::stored all[kWidth];
  Type::store(all, v);
  for (int64_t i = 0; i < count; ++i) at[i] = all[i];
}

// e^x within 2 units in the last place; 0 under the smallest normal number, infinite over the largest.
inline Vec exp_of(Vec x) {
  const Vec low = x < -87.33654f ? Vec{} - 87.33654f : x;
  const Vec clamped = low > 88.72283f ? Vec{} + 88.72283f : low;
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to a whole number in the low bits
  const Vec whole = shifted - 12582912.0f;
  const Vec r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^whole in two factors: 2^128 is no float32.
  const IntVec power = __builtin_convertvector(whole == whole ? whole : Vec{}, IntVec);
  const IntVec half = power >> 1;
  const Vec first = of_bits(reinterpret_cast<BitVec>((half + 127) << 23));
  const Vec second = of_bits(reinterpret_cast<BitVec>((power - half + 127) << 23));
  const Vec value = p * first * second;
  return x < -87.33654f ? Vec{} : x > 88.72283f ? Vec{} + __builtin_inff() : value;
}

inline Vec sigmoid_of(Vec x) {
  const Vec e = exp_of(x > 0 ? -x : x);  // at most 1
  const Vec small = e / (1.0f + e);
  return x > 0 ? 1.0f - small : small;
}

inline Vec tanh_of(Vec x) {
  const Vec size = of_bits(bits_of(x) & 0x7fffffffu);
  const Vec e = exp_of(-2.0f * size);
  const Vec far = (1.0f - e) / (1.0f + e);
  const Vec square = x * x;
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = size + size * square * p;  // where the quotient would cancel
  const Vec value = size < 0.625f ? near : far;
  return of_bits(bits_of(value) | (bits_of(x) & 0x80000000u));
}

// tanh(v) and σ(u) by one division, within 6 units in the last place.
struct Gate {
  Vec tanh, sigma;
};

inline Gate gate_of(Vec v, Vec u) {
  // e^x − 1 for x = −2|v|: 2^whole (1 + q) − 1, so that nothing cancels where x is small.
  const Vec x = of_bits(bits_of(v) | 0x80000000u) * 2.0f;
  const Vec clamped = x < -40.0f ? Vec{} - 40.0f : x;
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec whole = shifted - 12582912.0f;
  const Vec r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec q = p * (r * r) + r;
  const Vec power = of_bits((bits_of(shifted) << 23) + 0x3f800000u);  // the low bits of `shifted` are `whole`
  const Vec less = power * q + (power - 1.0f);
  const Vec e = exp_of(of_bits(bits_of(u) | 0x80000000u));  // at most 1
  const Vec over_v = less + 2.0f, over_u = e + 1.0f;
  const Vec inverse = 1.0f / (over_v * over_u);
  const Vec size = -less * (over_u * inverse), sigma = over_v * inverse;
  return {of_bits(bits_of(size) | (bits_of(v) & 0x80000000u)), u > 0 ? sigma : sigma * e};
}

// kWidth rows of kWidth values: rows become columns.
#if defined(__clang__)
inline void transpose(Vec *v) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = i + 1; j < kWidth; ++j) {
      const float kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
}
#else
template <int kStep>
inline void transpose_blocks(Vec *v) {
  const IntVec upper = (kIota & kStep) != 0;
  const IntVec low = upper ? kIota - kStep + kWidth : kIota, high = upper ? kIota + kWidth : kIota + kStep;
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kStep)) {
      const Vec a = v[i], b = v[i + kStep];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + kStep] = __builtin_shuffle(a, b, high);
    }
}

inline void transpose(Vec *v) {
  transpose_blocks<1>(v);
  transpose_blocks<2>(v);
  if constexpr (kWidth > 4) transpose_blocks<4>(v);
  if constexpr (kWidth > 8) transpose_blocks<8>(v);
}
#endif

}  // namespace
}  // namespace momkd
