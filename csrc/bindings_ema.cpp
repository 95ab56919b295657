#include "bindings_cpu.h"
#include "cpu/checks.h"
#include "cpu/ema_scatter.h"

namespace py = pybind11;

namespace momkd {
namespace {

EmaRows rows_of(uintptr_t z, int type, int64_t n, int64_t s, int64_t row_stride, uintptr_t row_class,
                uintptr_t weights, bool normalize) {
  if (n < 0 || s < 1) throw py::value_error("n and s: expected n >= 0 and s >= 1");
  if (n > 0 && (!z || !row_class)) throw py::value_error("z_ptr and row_class_ptr: null with n > 0");
  return {pointer<const void>(z),        row_type(type), n, s, row_stride, pointer<const int64_t>(row_class),
          pointer<const float>(weights), normalize};
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
  if (!ema_accumulate(rows, pointer<const float>(memory), c, k, threads, pointer<float>(sums),
                      pointer<float>(mass), pointer<int32_t>(assignments)))
    check_labels("row_class", rows.row_class, rows.n, c);  // says which
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
  if (!ema_scatter(rows, pointer<float>(memory), c, k, pointer<float>(usage), momentum,
                   pointer<int32_t>(assignments), threads))
    check_labels("row_class", rows.row_class, rows.n, c);  // says which
}

}  // namespace

void bind_ema(py::module_ &m) {
  using py::arg;
  m.def("ema_accumulate", &accumulate, arg("z_ptr"), arg("z_dtype"), arg("n"), arg("s"), arg("z_row_stride"),
        arg("row_class_ptr"), arg("weights_ptr"), arg("memory_ptr"), arg("c"), arg("k"), arg("normalize"),
        arg("threads"), arg("sums_ptr"), arg("mass_ptr"), arg("assignments_ptr"));
  m.def("ema_apply", &apply, arg("memory_ptr"), arg("usage_ptr"), arg("sums_ptr"), arg("mass_ptr"), arg("c"),
        arg("k"), arg("s"), arg("momentum"), arg("threads"));
  m.def("ema_scatter", &scatter, arg("z_ptr"), arg("z_dtype"), arg("n"), arg("s"), arg("z_row_stride"),
        arg("row_class_ptr"), arg("weights_ptr"), arg("memory_ptr"), arg("c"), arg("k"), arg("normalize"),
        arg("usage_ptr"), arg("momentum"), arg("assignments_ptr"), arg("threads"));
}

}  // namespace momkd
