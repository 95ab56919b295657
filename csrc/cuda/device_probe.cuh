// A kernel that says for which architecture it was compiled.
#pragma once

namespace momkd {

__global__ void device_probe_kernel(int *arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__;
#endif
}

}  // namespace momkd
