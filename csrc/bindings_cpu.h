// What the files of momkd._C's bindings share. Pointers come as integers; the caller checks shapes and keeps
// tensors alive.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

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

// Address, type, number, width and stride of rows, as momkd.native.rows gives them.
using RowArguments = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

inline Rows rows_of(const RowArguments &arguments) {
  const auto [address, type, n, width, stride] = arguments;
  if (n < 0 || width < 1) throw pybind11::value_error("rows: expected n >= 0 and width >= 1");
  if (n > 0 && !address) throw pybind11::value_error("rows: null with n > 0");
  return {pointer<const void>(address), row_type(type), n, width, stride};
}

void bind_ema(pybind11::module_ &m);
void bind_graph(pybind11::module_ &m);
void bind_memory(pybind11::module_ &m);
void bind_pool(pybind11::module_ &m);

}  // namespace momkd
