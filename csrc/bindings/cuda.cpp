// CUDA devices and their pools, but for CUDA's own calls: the module _cuda brings those as a
// CudaRuntime, and a simulated one is here.
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "bindings/buffers.h"
#include "bindings/module.h"
#include "bindings/pools.h"
#include "bindings/state.h"
#include "cuda/cuda_pool.h"
#include "cuda/simulated_runtime.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

CudaStream stream_of(std::uintptr_t handle) { return reinterpret_cast<CudaStream>(handle); }

std::optional<CopyMethod> method_of(const std::string& wanted) {
  if (wanted == "auto") return std::nullopt;
  for (const CopyMethod method : kCopyMethods) {
    if (wanted == name(method)) return method;
  }
  throw InvalidSpec("copy_method is \"" + wanted +
                    "\", expected \"auto\", \"loop\", \"batch\", \"kernel\" or \"staged\"");
}

std::shared_ptr<CudaDevice> make_device(std::shared_ptr<CudaRuntime> runtime, int index,
                                        const std::string& copy_method) {
  const std::optional<CopyMethod> method = method_of(copy_method);
  const py::gil_scoped_release release;  // the first call wakes the driver, which can take seconds
  auto device = std::make_shared<CudaDevice>(std::move(runtime), CudaOptions{.index = index});
  device->methods().always(method);
  return device;
}

SourceType source_type_of(const std::string& dtype) {
  if (dtype == "bfloat16") return SourceType::bf16;
  if (dtype == "float16") return SourceType::fp16;
  if (dtype == "float32") return SourceType::fp32;
  throw InvalidSpec("dtype is \"" + dtype + "\", expected bfloat16, float16 or float32");
}

Fp8 fp8_of(const std::string& format) {
  if (format == "float8_e4m3fn") return Fp8::e4m3;
  if (format == "float8_e5m2") return Fp8::e5m2;
  throw InvalidSpec("format is \"" + format + "\", expected float8_e4m3fn or float8_e5m2");
}

using Source = std::tuple<std::uintptr_t, std::int64_t, float>;  // address, stride, scale

ScatterFp8::Source source_of(const Source& source) {
  const auto [address, stride, scale] = source;
  return {reinterpret_cast<const std::byte*>(address), stride, scale};
}

void write_fp8(CudaPool& pool, std::size_t layer, std::uintptr_t slots, std::size_t num_tokens,
               const std::string& dtype, const std::string& format, const Source& k,
               const Source& v) {
  pool.write_fp8(layer, {reinterpret_cast<const std::int64_t*>(slots), num_tokens},
                 source_type_of(dtype), fp8_of(format), source_of(k), source_of(v));
}

py::object address_of(const CudaPool& pool, const std::string& array) {
  using Array = StepMemory::Array;
  static const std::pair<const char*, Array> kNames[] = {
      {"input_ids", Array::input_ids}, {"slots", Array::slots},
      {"positions", Array::positions}, {"query_starts", Array::query_starts},
      {"seq_lens", Array::seq_lens},   {"block_tables", Array::block_tables},
      {"copies", Array::copies}};
  for (const auto& [known, which] : kNames) {
    if (array != known) continue;
    const std::byte* found = pool.step().address(which);
    if (found == nullptr) return py::none();
    return py::int_(reinterpret_cast<std::uintptr_t>(found));
  }
  throw InvalidSpec("array is \"" + array + "\", expected one of a step's");
}

void bind_device(py::module_& m) {
  py::class_<CudaDevice, Device, std::shared_ptr<CudaDevice>>(
      m, "CudaDevice", py::is_final(), "A GPU: copies run on its own streams.")
      .def(py::init(&make_device), py::arg("runtime"), py::arg("index") = 0, py::kw_only(),
           py::arg("copy_method") = "auto")
      .def(
          "use_stream",
          [](CudaDevice& self, std::uintptr_t handle) { self.use_stream(stream_of(handle)); },
          py::arg("stream"))
      .def(
          "is_capturing",
          [](CudaDevice& self, std::optional<std::uintptr_t> handle) {
            return self.is_capturing(handle ? stream_of(*handle) : self.stream());
          },
          py::arg("stream") = py::none())
      .def("calibrate",
           [](CudaDevice& self) {
             const py::gil_scoped_release release;
             self.calibrate();
           })
      .def("copy_methods", [](CudaDevice& self) { return self.methods().table(); })
      .def_property_readonly("index", &CudaDevice::index)
      .def_property_readonly("is_simulated",
                             [](CudaDevice& self) {
                               return dynamic_cast<SimulatedRuntime*>(&self.runtime()) != nullptr;
                             })
      .def_property_readonly("num_ready_bytes", &CudaDevice::num_ready_bytes)
      .def_property_readonly("num_pageable_bytes", &CudaDevice::num_pageable_bytes);
}

void bind_pool(py::module_& m) {
  py::class_<CudaPool, Pool>(m, "CudaPool", py::is_final(), "On the caller's stream of a GPU.")
      .def(py::init([](std::shared_ptr<CudaDevice> device, const py::sequence& regions,
                       std::int32_t num_blocks, std::int32_t block_size, std::int32_t max_batch,
                       std::int64_t max_tokens, std::int32_t table_stride,
                       std::uintptr_t step_memory, const py::object&) {
             return std::make_unique<CudaPool>(std::move(device), runs_of<Region>(regions),
                                               num_blocks, block_size,
                                               StepShape{max_batch, max_tokens, table_stride},
                                               reinterpret_cast<std::byte*>(step_memory));
           }),
           py::arg("device"), py::arg("regions"), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("max_batch"), py::arg("max_tokens"), py::arg("table_stride"),
           py::arg("step_memory"), py::arg("owner") = py::none(), py::keep_alive<1, 10>())
      .def_static(
          "step_bytes",
          [](std::int32_t max_batch, std::int64_t max_tokens, std::int32_t table_stride) {
            return StepMemory::bytes({max_batch, max_tokens, table_stride});
          },
          py::arg("max_batch"), py::arg("max_tokens"), py::arg("table_stride"))
      .def("write_fp8", &write_fp8, py::arg("layer"), py::arg("slots"), py::arg("num_tokens"),
           py::arg("dtype"), py::arg("format"), py::arg("k"), py::arg("v"))
      .def("address", &address_of, py::arg("array"));
}

void bind_simulated(py::module_& m) {
  py::class_<SimulatedRuntime, CudaRuntime, std::shared_ptr<SimulatedRuntime>>(
      m, "SimulatedCuda", py::is_final(), "CUDA on a machine without a GPU.")
      .def(py::init([](std::uint64_t seed, const std::string& schedule, int num_devices,
                       bool has_batch) {
             SimulatedOptions options;
             options.seed = seed;
             options.schedule = schedule_of(schedule);
             options.granule_bytes = 16;
             return std::make_shared<SimulatedRuntime>(options, num_devices, has_batch);
           }),
           py::arg("seed") = 0, py::kw_only(), py::arg("schedule") = "random",
           py::arg("num_devices") = 1, py::arg("has_batch") = true)
      .def("fail", &SimulatedRuntime::fail, py::arg("function"), py::arg("code"), py::arg("k") = 1)
      .def("limit_pinned", &SimulatedRuntime::limit_registered, py::arg("num_bytes"))
      .def("make_stream",
           [](SimulatedRuntime& self) {
             CudaStream stream = nullptr;
             if (self.create_stream(&stream) != 0) throw DeviceError("no stream");
             return reinterpret_cast<std::uintptr_t>(stream);
           })
      .def(
          "capture",
          [](SimulatedRuntime& self, std::uintptr_t stream, bool capturing) {
            self.capture(stream_of(stream), capturing);
          },
          py::arg("stream"), py::arg("capturing"))
      .def("num_calls", &SimulatedRuntime::num_calls, py::arg("function"))
      .def("hold_next", [](SimulatedRuntime& self) { self.machine().hold_next(); })
      .def(
          "fail_copy", [](SimulatedRuntime& self, int k) { self.machine().fail_copy(k); },
          py::arg("k") = 1)
      .def_property_readonly("violations",
                             [](SimulatedRuntime& self) {
                               py::list all;
                               for (const auto& v : self.machine().violations()) all.append(v.text);
                               return all;
                             })
      .def_property_readonly("num_pending",
                             [](SimulatedRuntime& self) { return self.machine().num_pending(); })
      .def_property_readonly("num_live", [](const SimulatedRuntime& self) {
        return self.num_streams() + self.num_events() + self.num_allocations() +
               (self.num_registered_bytes() > 0);
      });
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::class_<CudaRuntime, std::shared_ptr<CudaRuntime>>(m, "CudaRuntime", "The calls of CUDA.");
  bind_device(m);
  bind_pool(m);
  bind_simulated(m);
}

}  // namespace pagedkv
