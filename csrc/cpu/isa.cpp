#include "cpu/isa.h"

#include <atomic>

#include "cpu/amx.h"

#ifdef MOMKD_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef MOMKD_HAVE_AMX
bool amx_allowed() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool told = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
  const bool processor = told && (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return processor && available(Isa::avx512) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

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

bool has_amx() {
#ifdef MOMKD_HAVE_AMX
  static const bool has = amx_allowed();
  return has && current_isa() == Isa::avx512;
#else
  return false;
#endif
}

const char *isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace momkd
