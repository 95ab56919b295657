// The kernels of csrc/cuda/ema_scatter.cuh on the CPU, for tests/emulation.py.
#include "cpp/emulated_cuda.h"
#include "cuda/ema_scatter.cuh"

namespace momkd {
__align__(16) unsigned char momkd_shared[1 << 18];
}

namespace {

const struct {
  const char *name;
  void (*kernel)(momkd::EmaTask);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(ema_bank_kernel),
    KERNEL(ema_rows_float32_shared_kernel),
    KERNEL(ema_rows_float16_shared_kernel),
    KERNEL(ema_rows_bfloat16_shared_kernel),
    KERNEL(ema_rows_float32_global_kernel),
    KERNEL(ema_rows_float16_global_kernel),
    KERNEL(ema_rows_bfloat16_global_kernel),
    KERNEL(ema_runs_float32_kernel),
    KERNEL(ema_runs_float16_kernel),
    KERNEL(ema_runs_bfloat16_kernel),
    KERNEL(ema_reduce_kernel),
    KERNEL(ema_apply_kernel),
#undef KERNEL
};

constexpr unsigned char kPoison = 0xff;  // NaN

}  // namespace

// Runs a kernel; returns what is wrong with it, or "". Shared memory holds NaN before each block, and the
// bytes behind what was asked for must not change.
extern "C" const char *emulate(const char *name, const char *task, unsigned blocks, unsigned threads,
                               unsigned shared_bytes, unsigned schedule) {
  static std::string answer;
  momkd::EmaTask packed;
  std::memcpy(&packed, task, sizeof packed);
  answer = std::string("there is no kernel ") + name;
  if (shared_bytes > sizeof momkd::momkd_shared) return "too much shared memory";
  for (const auto &each : kKernels) {
    if (std::strcmp(each.name, name)) continue;
    const auto poison = [] { std::memset(momkd::momkd_shared, kPoison, sizeof momkd::momkd_shared); };
    emulated::machine.error.clear();
    emulated::machine.run([&] { each.kernel(packed); }, blocks, threads, schedule, poison);
    answer = emulated::machine.error;
    for (unsigned i = shared_bytes; i < sizeof momkd::momkd_shared && blocks && answer.empty(); ++i)
      if (momkd::momkd_shared[i] != kPoison) answer = "it wrote behind its shared memory";
  }
  return answer.c_str();
}

extern "C" unsigned task_bytes() { return sizeof(momkd::EmaTask); }
extern "C" unsigned state_bytes() { return momkd::kStateBytes; }
