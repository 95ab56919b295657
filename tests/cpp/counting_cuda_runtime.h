// What csrc/cuda/*.cu call of CUDA's runtime, without a GPU: it counts how often each function of each device
// was allowed shared memory, and refuses to start one with more than it is allowed at that moment.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct dim3 {
  explicit dim3(unsigned) {}
};
using cudaStream_t = void *;

namespace counting {

constexpr int kDevices = 2, kOptIn[kDevices] = {101376, 232448};
constexpr size_t kStatic = 1024;
inline thread_local int device = 0;
inline std::mutex mutex;
inline std::map<std::pair<const void *, int>, int> allowed, times_allowed;

}  // namespace counting

inline cudaError_t cudaSetDevice(int device) {
  if (device >= counting::kDevices) return cudaErrorInvalidValue;
  counting::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = counting::kDevices, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaDeviceGetAttribute(int *value, int, int device) {
  return *value = counting::kOptIn[device], cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  return attributes->sharedSizeBytes = counting::kStatic, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void *function, int, int bytes) {
  {
    const std::lock_guard<std::mutex> lock(counting::mutex);
    counting::allowed[{function, counting::device}] = bytes;
    ++counting::times_allowed[{function, counting::device}];
  }
  std::this_thread::yield();
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t shared, cudaStream_t) {
  const std::lock_guard<std::mutex> lock(counting::mutex);
  const auto found = counting::allowed.find({function, counting::device});
  return found != counting::allowed.end() && static_cast<int>(shared) <= found->second
             ? cudaSuccess
             : cudaErrorInvalidValue;
}
