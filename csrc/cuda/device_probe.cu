#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/device_probe.cuh"
#include "cuda/device_probe.h"

namespace momkd {
namespace {

void check(cudaError_t status, const char *what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: it would come up again in the next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

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

int device_probe(int device) {
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  int *result = nullptr, arch = 0;
  cudaError_t status = cudaMalloc(&result, sizeof *result);
  if (status == cudaSuccess) {
    device_probe_kernel<<<1, 1>>>(result);
    status = cudaGetLastError();
    if (status == cudaSuccess) status = cudaMemcpy(&arch, result, sizeof arch, cudaMemcpyDeviceToHost);
    cudaFree(result);
  }
  cudaSetDevice(before);
  check(status, "device_probe");
  return arch;
}

}  // namespace momkd
