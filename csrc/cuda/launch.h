// What momkd._cuda holds, for its bindings. Host side, free of CUDA headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace momkd {

int cuda_version();             // of the compiler: 13000 is CUDA 13.0
std::vector<int> cuda_archs();  // compiled for: {80, 90, 100}
int device_count();             // 0 without a driver

// Starts the kernel `name` of cuda/ema_scatter.cuh; `task` holds the bytes of an EmaTask. Throws
// std::invalid_argument, or std::runtime_error with CUDA's text.
void launch_ema(const std::string &name, const std::string &task, unsigned blocks, unsigned threads,
                unsigned shared_bytes, int device, uintptr_t stream);

}  // namespace momkd
