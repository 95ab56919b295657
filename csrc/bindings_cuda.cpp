// momkd._cuda: what was compiled by nvcc, for Python. Importing it needs no driver and starts no context.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device_probe.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  const int version = momkd::cuda_version();
  info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["archs"] = momkd::cuda_archs();
  info["version"] = MOMKD_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of momkd, compiled by nvcc: raw pointers, sizes and streams; called through momkd.ops.";
  m.def("build_info", &build_info, "CUDA version, architectures compiled (80, 90, ...), version of momkd.");
  m.def("device_count", &momkd::device_count, "Number of NVIDIA GPUs; 0 without a driver.");
  m.def("probe", &momkd::device_probe, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
        "Run a kernel on `device`: the architecture it was compiled for (800, 900, ...), or RuntimeError.");
}
