// momkd._C: the CPU kernels for Python.
#include "bindings_cpu.h"

#include <stdexcept>
#include <string>

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace momkd;

namespace {

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
  info["amx"] = has_amx();
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
  m.doc() = "Native CPU kernels of momkd: raw pointers and sizes; called through momkd.ops.";
  bind_ema(m);
  bind_graph(m);
  bind_memory(m);
  bind_pool(m);
  m.def("build_info", &build_info,
        "Compiler, C++ standard, OpenMP version or None, instruction set in use, whether with AMX, version.");
  m.def(
      "use_large_pages", [](uintptr_t data, int64_t bytes) { use_large_pages(pointer<void>(data), bytes); },
      py::arg("data_ptr"), py::arg("bytes"),
      "Ask for large pages behind memory that nothing has touched yet.");
  m.def("use_isa", &use_isa_named, py::arg("isa"),
        "Use baseline, avx2 or avx512 from now on: for tests and measurements.");
}
