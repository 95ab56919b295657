// momkd._C: the CPU kernels for Python. Pointers come as integers; the caller checks shapes and keeps tensors
// alive.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/ema_scatter.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace momkd;

namespace {

template <typename T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

EmaRows rows_of(uintptr_t z, int type, int64_t n, int64_t s, int64_t row_stride, uintptr_t row_class,
                uintptr_t weights, bool normalize) {
  if (type < 0 || type > 2)
    throw py::value_error("z_dtype: expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  if (n < 0 || s < 1) throw py::value_error("n and s: expected n >= 0 and s >= 1");
  if (n > 0 && (!z || !row_class)) throw py::value_error("z_ptr and row_class_ptr: null with n > 0");
  return {pointer<const void>(z),
          static_cast<RowType>(type),
          n,
          s,
          row_stride,
          pointer<const int64_t>(row_class),
          pointer<const float>(weights),
          normalize};
}

void check_bank(int64_t c, int64_t k) {
  if (c < 1 || k < 1) throw py::value_error("c and k: expected at least 1");
}

void accumulate(uintptr_t z, int type, int64_t n, int64_t s, int64_t row_stride, uintptr_t row_class,
                uintptr_t weights, uintptr_t memory, int64_t c, int64_t k, bool normalize, int threads,
                uintptr_t sums, uintptr_t mass, uintptr_t assignments) {
  const EmaRows rows = rows_of(z, type, n, s, row_stride, row_class, weights, normalize);
  check_bank(c, k);
  py::gil_scoped_release release;
  ema_accumulate(rows, pointer<const float>(memory), c, k, threads, pointer<float>(sums),
                 pointer<float>(mass), pointer<int32_t>(assignments));
}

void apply(uintptr_t memory, uintptr_t usage, uintptr_t sums, uintptr_t mass, int64_t c, int64_t k, int64_t s,
           double momentum, int threads) {
  check_bank(c, k);
  py::gil_scoped_release release;
  ema_apply(pointer<float>(memory), pointer<float>(usage), pointer<const float>(sums),
            pointer<const float>(mass), c, k, s, momentum, threads);
}

void scatter(uintptr_t z, int type, int64_t n, int64_t s, int64_t row_stride, uintptr_t row_class,
             uintptr_t weights, uintptr_t memory, int64_t c, int64_t k, bool normalize, uintptr_t usage,
             double momentum, uintptr_t assignments, int threads) {
  const EmaRows rows = rows_of(z, type, n, s, row_stride, row_class, weights, normalize);
  check_bank(c, k);
  py::gil_scoped_release release;
  ema_scatter(rows, pointer<float>(memory), c, k, pointer<float>(usage), momentum,
              pointer<int32_t>(assignments), threads);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  info["compiler"] = "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#else
  info["compiler"] = "unknown";
#endif
  info["standard"] = static_cast<long>(__cplusplus);
#ifdef _OPENMP
  info["openmp"] = static_cast<int>(_OPENMP);
#else
  info["openmp"] = py::none();
#endif
  info["isa"] = isa_name(current_isa());
  info["version"] = MOMKD_VERSION;
  return info;
}

void use_isa_named(const std::string &name) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (name == isa_name(isa)) {
      if (use_isa(isa)) return;
      throw py::value_error("isa: this processor or this build has no " + name);
    }
  throw py::value_error("isa: expected baseline, avx2 or avx512, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() = "Native CPU kernels of momkd: raw pointers and sizes; called through momkd.ops.";
  m.def("ema_accumulate", &accumulate, arg("z_ptr"), arg("z_dtype"), arg("n"), arg("s"), arg("z_row_stride"),
        arg("row_class_ptr"), arg("weights_ptr"), arg("memory_ptr"), arg("c"), arg("k"), arg("normalize"),
        arg("threads"), arg("sums_ptr"), arg("mass_ptr"), arg("assignments_ptr"));
  m.def("ema_apply", &apply, arg("memory_ptr"), arg("usage_ptr"), arg("sums_ptr"), arg("mass_ptr"), arg("c"),
        arg("k"), arg("s"), arg("momentum"), arg("threads"));
  m.def("ema_scatter", &scatter, arg("z_ptr"), arg("z_dtype"), arg("n"), arg("s"), arg("z_row_stride"),
        arg("row_class_ptr"), arg("weights_ptr"), arg("memory_ptr"), arg("c"), arg("k"), arg("normalize"),
        arg("usage_ptr"), arg("momentum"), arg("assignments_ptr"), arg("threads"));
  m.def("build_info", &build_info,
        "Compiler, C++ standard, OpenMP version or None, instruction set in use, version.");
  m.def("use_isa", &use_isa_named, arg("isa"),
        "Use baseline, avx2 or avx512 from now on: for tests and measurements.");
}
