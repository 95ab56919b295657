// Is there a GPU, and does this module hold code for it? Host side, free of CUDA headers.
#pragma once

#include <string>
#include <vector>

namespace momkd {

int cuda_version();             // of the compiler: 13000 is CUDA 13.0
std::vector<int> cuda_archs();  // compiled for: {80, 90, 100}
int device_count();             // 0 without a driver

// The architecture of the code that ran on `device` (800, 900, ...). Throws std::runtime_error with CUDA's
// text.
int device_probe(int device);

}  // namespace momkd
