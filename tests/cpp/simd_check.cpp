// The mathematics of csrc/cpu/simd.h against libm in double, for the instruction set that this is compiled
// for: all 65,536 halves, and floats by their bits. Prints what is wrong and returns 1, or prints one line of
// figures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "cpu/simd.h"

using namespace momkd;

namespace {

int failures = 0;

void fail(const char *what, double at, double got, double want) {
  if (++failures <= 20) std::printf("%s at %.9g (%a): got %.9g, expected %.9g\n", what, at, at, got, want);
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The distance of float32 numbers around x.
double unit_of(double x) { return std::ldexp(1.0, std::max(std::ilogb(x) - 23, -149)); }

// float16 (5, 10) or bfloat16 (8, 7) to double, by the definition of the format.
double value_of_half(uint16_t half, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = half >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = half & ((1 << mantissa_bits) - 1);
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <typename Half>
void check_half(const char *name, int exponent_bits, int mantissa_bits) {
  uint16_t in[kWidth], back[kWidth];
  float wide[kWidth];
  for (uint32_t first = 0; first < 65536; first += kWidth) {
    for (int i = 0; i < kWidth; ++i) in[i] = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
    const Vec v = Half::load(in);
    Float32::store(wide, v);
    Half::store(back, v);
    for (int i = 0; i < kWidth; ++i) {
      const double want = value_of_half(in[i], exponent_bits, mantissa_bits);
      if (!same(wide[i], want)) fail(name, in[i], wide[i], want);
      if (!same(Half::load_one(in + i), want)) fail("load_one", in[i], Half::load_one(in + i), want);
      const double again = value_of_half(back[i], exponent_bits, mantissa_bits);
      if (!same(again, want)) fail("there and back", want, again, want);
      uint16_t one;
      Half::store_one(&one, wide[i]);
      if (one != back[i]) fail("store_one", want, one, back[i]);
    }
  }
}

// A value narrowed by itself, which a vector of it must equal in every lane.
template <typename Half>
uint16_t narrowed(const char *name, float value) {
  uint16_t one, all[kWidth];
  Half::store_one(&one, value);
  Half::store(all, value - Vec{});  // the sum would lose the sign of −0
  for (uint16_t lane : all)
    if (lane != one) fail(name, value, lane, one);
  return one;
}

// Narrowing rounds to the nearest, ties to even: between any two neighbours, at the middle and a bit to each
// side.
template <typename Half>
void check_rounding(const char *name, int exponent_bits, int mantissa_bits) {
  const uint32_t infinite = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t sign : {0u, 0x8000u})
    for (uint32_t half = 0; half < infinite; ++half) {
      const double low = value_of_half(static_cast<uint16_t>(half), exponent_bits, mantissa_bits);
      const double step =
          low - value_of_half(static_cast<uint16_t>(half ? half - 1 : 1), exponent_bits, mantissa_bits);
      const double high = half + 1 < infinite
                              ? value_of_half(static_cast<uint16_t>(half + 1), exponent_bits, mantissa_bits)
                              : low + (half & ((1u << mantissa_bits) - 1) ? step : 2 * step);
      const float middle = static_cast<float>(low + (high - low) / 2);
      for (int side : {-1, 0, 1}) {
        const float size = side == 0 ? middle : std::nextafter(middle, side < 0 ? 0.0f : INFINITY);
        const uint32_t want = side < 0 ? half : side > 0 ? half + 1 : half + (half & 1);
        const uint16_t got = narrowed<Half>(name, sign ? -size : size);
        if (got != (want | sign)) fail(name, size, got, want | sign);
      }
    }
  for (float special : {INFINITY, -INFINITY, NAN, 3.4e38f, -3.4e38f, 0.0f, -0.0f, 1e-45f}) {
    const uint16_t got = narrowed<Half>(name, special);
    const double back = value_of_half(got, exponent_bits, mantissa_bits);
    const bool over = std::fabs(special) > 3.3e38;
    const double want = std::isnan(special) ? NAN
                        : over              ? std::copysign(INFINITY, special)
                                            : std::copysign(0.0, special);
    // 3.4e38 is the largest bfloat16 or rounds to infinity; 1e-45 is 0 in both.
    if (!same(back, want) && !(exponent_bits == 8 && std::isfinite(special) && over))
      fail(name, special, back, want);
  }
  // A NaN stays one, and keeps its sign, whichever bit of it makes it a NaN.
  for (uint32_t sign : {0u, 0x80000000u})
    for (int bit = 0; bit < 23; ++bit) {
      uint16_t all[kWidth];
      Half::store(all, of_bits(BitVec{} + (sign | 0x7f800000u | 1u << bit)));
      if (!std::isnan(value_of_half(all[0], exponent_bits, mantissa_bits)) || all[0] >> 15 != sign >> 31)
        fail("NaN", bit, all[0], NAN);
    }
}

// Every `stride`-th float32 of all 2^32; the largest error, in units of the last place.
template <typename Function, typename Exact>
double check_function(const char *name, Function function, Exact exact, uint32_t stride, double most) {
  double worst = 0;
  float in[kWidth], out[kWidth];
  uint64_t bits = 0;
  while (bits <= 0xffffffffu) {
    for (int i = 0; i < kWidth; ++i, bits += stride)
      in[i] = float_of(static_cast<uint32_t>(std::min<uint64_t>(bits, 0xffffffffu)));
    Float32::store(out, function(Float32::load(in)));
    for (int i = 0; i < kWidth; ++i) {
      const double want = exact(static_cast<double>(in[i]));
      if (std::isnan(want) || std::isinf(want) || want == 0) {
        if (!(std::isnan(want) ? std::isnan(out[i]) : out[i] == want)) fail(name, in[i], out[i], want);
        continue;
      }
      const double error = std::fabs(out[i] - want) / unit_of(want);
      if (!(error <= most)) fail(name, in[i], out[i], want);
      if (error > worst) worst = error;
    }
  }
  return worst;
}

}  // namespace

int main() {
  check_half<Float16>("float16", 5, 10);
  check_half<Bfloat16>("bfloat16", 8, 7);
  check_rounding<Float16>("rounding to float16", 5, 10);
  check_rounding<Bfloat16>("rounding to bfloat16", 8, 7);

  // What exp_of promises: 0 under the smallest normal number, infinite over the largest.
  const auto exp_exact = [](double x) {
    return x < -87.33654f ? 0.0 : x > 88.72283f ? HUGE_VAL : std::exp(x);
  };
  const auto sigmoid_exact = [](double x) { return 1 / (1 + std::exp(-x)); };
  const double e = check_function("exp", [](Vec x) { return exp_of(x); }, exp_exact, 193, 2);
  // Under e^-87 σ(x) is 0 too: less than the smallest normal float32 away.
  const double s = check_function(
      "sigmoid", [](Vec x) { return sigmoid_of(x); },
      [&](double x) { return x < -87.33654f ? 0.0 : sigmoid_exact(x); }, 193, 3);
  const double t =
      check_function("tanh", [](Vec x) { return tanh_of(x); }, [](double x) { return std::tanh(x); }, 193, 3);

  // Both sides of the gate by one division; each while the other is anything.
  for (float other : {0.0f, 0.3f, -7.0f, 60.0f, -200.0f}) {
    check_function(
        "tanh of the gate", [&](Vec x) { return gate_of(x, Vec{} + other).tanh; },
        [](double x) { return std::tanh(x); }, 1931, 6);
    check_function(
        "sigmoid of the gate", [&](Vec x) { return gate_of(Vec{} + other, x).sigma; },
        [&](double x) { return x < -87.33654f ? 0.0 : sigmoid_exact(x); }, 1931, 6);
  }

  float lanes[kWidth];
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += lanes[i] = static_cast<float>(1 << i);
  if (sum_lanes(Float32::load(lanes)) != sum) fail("sum_lanes", 0, sum_lanes(Float32::load(lanes)), sum);
  if (bits_of_float(max_of(Vec{} + 1.0f, Vec{} - 2.0f)[0]) != bits_of_float(1.0f)) fail("max_of", 1, 0, 1);
  if (!std::isnan(max_of(Vec{}, Vec{} + NAN)[0])) fail("max_of with NaN", NAN, 0, NAN);

  if (failures) std::printf("%d failures\n", failures);
  std::printf("%d lanes; units in the last place: exp %.3f, sigmoid %.3f, tanh %.3f\n", kWidth, e, s, t);
  return failures != 0;
}
