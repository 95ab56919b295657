// Threads that start the same kernels with different amounts of shared memory, through
// csrc/cuda/ema_scatter.cu over counting_cuda_runtime.h. Prints what is wrong and returns 1.
#include "cpp/emulated_cuda.h"
//
#include <cstdio>

#include "cuda/ema_scatter.cu"

namespace momkd {
__align__(16) unsigned char momkd_shared[16];
}

namespace {

std::string start(const char *name, unsigned shared, int device) {
  try {
    momkd::launch_ema(name, std::string(momkd::task_bytes(), '\0'), 1, 128, shared, device, 0);
  } catch (const std::runtime_error &error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  const char *const kernels[] = {"ema_rows_float32_shared_kernel", "ema_reduce_kernel"};
  int failures = 0;
  std::vector<std::thread> threads;
  std::mutex printing;
  for (unsigned t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < 500; ++i) {
        const std::string wrong =
            start(kernels[(i + t) % 2], (i * 7919 + t * 104729) % 98304, (i + t / 2) % 2);
        if (wrong.empty()) continue;
        const std::lock_guard<std::mutex> lock(printing);
        if (++failures <= 5) std::printf("%s\n", wrong.c_str());
      }
    });
  for (std::thread &thread : threads) thread.join();
  for (const auto &[where, times] : counting::times_allowed)
    if (times != 1)
      ++failures, std::printf("shared memory was allowed %d times on device %d\n", times, where.second);
  if (counting::times_allowed.size() != 4)
    ++failures, std::printf("not every kernel was allowed on every device\n");

  const std::string too_much = start(kernels[0], 101376 - 1023, 0);
  if (too_much !=
      std::string(kernels[0]) + ": 100353 bytes of shared memory, a block of this GPU has at most 100352")
    ++failures, std::printf("told of too much: %s\n", too_much.c_str());
  if (!start(kernels[0], 101376 - 1024, 0).empty() || !start(kernels[0], 200'000, 1).empty())
    ++failures, std::printf("refused what a GPU has\n");
  return failures != 0;
}
