#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/ema_scatter.cuh"
#include "cuda/launch.h"

namespace momkd {
namespace {

struct Named {
  const char *name;
  void (*kernel)(EmaTask);
};

#define MOMKD_NAMED(kernel) {#kernel, kernel}
const Named kKernels[] = {
    MOMKD_NAMED(ema_bank_kernel),
    MOMKD_NAMED(ema_rows_float32_shared_kernel),
    MOMKD_NAMED(ema_rows_float16_shared_kernel),
    MOMKD_NAMED(ema_rows_bfloat16_shared_kernel),
    MOMKD_NAMED(ema_rows_float32_global_kernel),
    MOMKD_NAMED(ema_rows_float16_global_kernel),
    MOMKD_NAMED(ema_rows_bfloat16_global_kernel),
    MOMKD_NAMED(ema_reduce_kernel),
    MOMKD_NAMED(ema_apply_kernel),
};
#undef MOMKD_NAMED

void check(cudaError_t status, const std::string &what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: it would come up again in the next call
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

}  // namespace

void launch_ema(const std::string &name, const std::string &task, unsigned blocks, unsigned threads,
                unsigned shared_bytes, int device, uintptr_t stream) {
  const Named *found = nullptr;
  for (const Named &each : kKernels)
    if (name == each.name) found = &each;
  if (!found) throw std::invalid_argument("there is no kernel " + name);
  if (task.size() != sizeof(EmaTask))
    throw std::invalid_argument("task: expected " + std::to_string(sizeof(EmaTask)) + " bytes, got " +
                                std::to_string(task.size()));
  EmaTask packed;
  std::memcpy(&packed, task.data(), sizeof packed);
  void *arguments[] = {&packed};
  const auto *function = reinterpret_cast<const void *>(found->kernel);
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        name + ", " + std::to_string(shared_bytes) + " bytes of shared memory");
  check(cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
}

int cuda_version() { return CUDART_VERSION; }

std::vector<int> cuda_archs() {
  std::vector<int> archs;
  for (int arch : {__CUDA_ARCH_LIST__}) archs.push_back(arch / 10);
  return archs;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

}  // namespace momkd
