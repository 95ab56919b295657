// What momkd._cuda holds, for its bindings. Host side, free of CUDA headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace momkd {

int cuda_version();             // of the compiler: 13000 is CUDA 13.0
std::vector<int> cuda_archs();  // compiled for: {80, 90, 100}
int driver_version();           // the newest CUDA of the driver: 12040 is 12.4; 0 without a driver
int device_count();             // 0 without a driver, or with one that is older than the compiler
unsigned task_bytes();          // of an EmaTask

// Starts the kernel `name` of cuda/ema_scatter.cuh; `task` holds the bytes of an EmaTask. Throws
// std::invalid_argument, or std::runtime_error with CUDA's text.
void launch_ema(const std::string &name, const std::string &task, unsigned blocks, unsigned threads,
                unsigned shared_bytes, int device, uintptr_t stream);

}  // namespace momkd
