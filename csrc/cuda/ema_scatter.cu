#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

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
    MOMKD_NAMED(ema_runs_float32_kernel),
    MOMKD_NAMED(ema_runs_float16_kernel),
    MOMKD_NAMED(ema_runs_bfloat16_kernel),
    MOMKD_NAMED(ema_reduce_kernel),
    MOMKD_NAMED(ema_apply_kernel),
};
#undef MOMKD_NAMED

void check(cudaError_t status, const std::string &what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: it would come up again in the next call
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// The bytes of shared memory that a block of the kernel may take on a device: all that the GPU has. They are
// allowed once, at the first call: an amount set at each launch could be lowered by another thread just
// before it.
int allow_shared(const Named &kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const Named *, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find({&kernel, device});
  if (found != allowed.end()) return found->second;
  const auto *function = reinterpret_cast<const void *>(kernel.kernel);
  const std::string what = std::string(kernel.name) + ", its shared memory";
  cudaFuncAttributes attributes;
  int most = 0;
  check(cudaFuncGetAttributes(&attributes, function), what);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  most -= static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
  return allowed[{&kernel, device}] = most;
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
  const int most = allow_shared(*found, device);
  if (shared_bytes > static_cast<unsigned>(most))
    throw std::runtime_error(name + ": " + std::to_string(shared_bytes) +
                             " bytes of shared memory, a block of this GPU has at most " +
                             std::to_string(most));
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

unsigned task_bytes() { return sizeof(EmaTask); }

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

}  // namespace momkd
