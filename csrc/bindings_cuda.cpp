// momkd._cuda: what was compiled by nvcc, for Python. Importing it needs no driver and starts no context.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"

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

void launch(const std::string &name, const py::bytes &task, unsigned blocks, unsigned threads,
            unsigned shared_bytes, int device, uintptr_t stream) {
  const std::string bytes = task;
  py::gil_scoped_release release;
  momkd::launch_ema(name, bytes, blocks, threads, shared_bytes, device, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using py::arg;
  m.doc() = "CUDA kernels of momkd, compiled by nvcc; called through momkd.ops.";
  m.def("build_info", &build_info, "CUDA version, architectures compiled (80, 90, ...), version of momkd.");
  m.def("device_count", &momkd::device_count,
        "Number of NVIDIA GPUs; 0 without a driver, or with one too old for the CUDA that this was built "
        "with.");
  m.def("driver_version", &momkd::driver_version,
        "The newest CUDA that the driver knows, 12040 for 12.4; 0 without one.");
  m.def("task_bytes", &momkd::task_bytes, "Bytes of the task that `launch` takes.");
  m.def("launch", &launch, arg("name"), arg("task"), arg("blocks"), arg("threads"), arg("shared_bytes"),
        arg("device"), arg("stream"),
        "Start a kernel on a stream of `device`, or raise RuntimeError with CUDA's text.");
}
