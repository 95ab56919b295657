#include "cpu/isa.h"

#include <atomic>

#if defined(MOMKD_HAVE_AVX2) || defined(MOMKD_HAVE_AVX512)
#include <cpuid.h>
#endif

namespace momkd {
namespace {

#if defined(MOMKD_HAVE_AVX2) || defined(MOMKD_HAVE_AVX512)
// Conversions of float16. Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool available(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
#ifdef MOMKD_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#else
      return false;
#endif
    case Isa::avx512:
#ifdef MOMKD_HAVE_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && has_f16c();
#else
      return false;
#endif
  }
  return false;
}

Isa best() {
#if defined(MOMKD_HAVE_AVX2) || defined(MOMKD_HAVE_AVX512)
  __builtin_cpu_init();
#endif
  if (available(Isa::avx512)) return Isa::avx512;
  return available(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

std::atomic<Isa> &chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool use_isa(Isa isa) {
  if (!available(isa)) return false;
  chosen().store(isa, std::memory_order_relaxed);
  return true;
}

const char *isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace momkd
