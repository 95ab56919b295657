// What the files of momkd._C's bindings share. Pointers come as integers; the caller checks shapes and keeps
// tensors alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/rows.h"

namespace momkd {

template <typename T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

inline RowType row_type(int code) {
  if (code < 0 || code > 2)
    throw pybind11::value_error("dtype: expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<RowType>(code);
}

void bind_ema(pybind11::module_ &m);

}  // namespace momkd
