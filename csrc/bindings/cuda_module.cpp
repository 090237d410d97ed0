#include <pybind11/pybind11.h>

#include "cuda/device_query.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace {

py::list devices() {
  // The first call wakes the driver, which can take seconds.
  const auto found = [] {
    const py::gil_scoped_release release;
    return pagedkv::cuda_devices();
  }();
  py::list list;
  for (const pagedkv::CudaDeviceInfo& device : found) {
    py::dict entry;
    entry["index"] = device.index;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["total_bytes"] = device.total_bytes;
    list.append(entry);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA part of pagedkv. Imports, and answers, on a machine without a driver.";
  const py::call_guard<py::gil_scoped_release> wakes_the_driver;
  m.def("runtime_version", &pagedkv::cuda_runtime_version);
  m.def("driver_version", &pagedkv::cuda_driver_version, wakes_the_driver);
  m.def("status", &pagedkv::cuda_status, wakes_the_driver);
  m.def("devices", &devices);
  m.def(
      "runtime",
      [] {
        py::module_::import("pagedkv._core");  // which knows the class
        return pagedkv::real_runtime();
      },
      "The calls of CUDA, for pagedkv._core.CudaDevice.");
}
