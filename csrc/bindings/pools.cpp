// Pools: what a step does with tensors, which Python checked and keeps alive.
#include "bindings/pools.h"

#include <pybind11/pybind11.h>

#include "bindings/buffers.h"
#include "bindings/module.h"
#include "bindings/state.h"
#include "host/host_pool.h"
#include "host/simulated_pool.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

// From here on (about 20 us of copying) it pays to let other Python threads in.
constexpr std::int64_t kLongCopyBytes = 256 * 1024;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

class IntBuffer {
 public:
  IntBuffer(py::handle object, int ndim) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDED_RO | PyBUF_FORMAT) != 0) {
      throw py::error_already_set();
    }
    const bool right =
        buffer_.ndim == ndim && buffer_.itemsize == sizeof(std::int32_t) &&
        (buffer_.shape[ndim - 1] < 2 || buffer_.strides[ndim - 1] == sizeof(std::int32_t));
    if (right) return;
    PyBuffer_Release(&buffer_);
    throw py::type_error("expected an int32 buffer with a contiguous last dimension");
  }
  ~IntBuffer() { PyBuffer_Release(&buffer_); }
  IntBuffer(const IntBuffer&) = delete;
  IntBuffer& operator=(const IntBuffer&) = delete;

  const std::int32_t* data() const { return static_cast<const std::int32_t*>(buffer_.buf); }
  std::int64_t size(int d) const { return buffer_.shape[d]; }
  std::int64_t stride(int d) const {
    return buffer_.strides[d] / static_cast<std::int64_t>(sizeof(std::int32_t));
  }

 private:
  Py_buffer buffer_{};
};

template <class F>
void run(std::int64_t bytes, F&& copy) {
  if (bytes < kLongCopyBytes) return copy();
  const py::gil_scoped_release release;
  copy();
}

void copy_blocks(Pool& pool, const py::object& copies) {
  const IntBuffer rows(copies, 2);
  if (rows.size(1) != 3 || (rows.size(0) > 1 && rows.stride(0) != 3)) {
    throw py::type_error("copies: expected contiguous rows of three");
  }
  pool.copy_blocks({rows.data(), static_cast<std::size_t>(rows.size(0) * 3)});
}

void scatter(Pool& pool, std::size_t region, const py::object& slots, std::uintptr_t source,
             std::int64_t source_stride) {
  const Argument<std::int64_t> to("slots", slots);
  run(static_cast<std::int64_t>(to.span().size()) * source_stride,
      [&] { pool.scatter(region, to.span(), pointer<const std::byte>(source), source_stride); });
}

void gather(Pool& pool, std::size_t region, const py::object& block_tables,
            std::int32_t first_block, const py::object& num_tokens, std::int32_t num_heads,
            std::int32_t width, std::uintptr_t target) {
  const IntBuffer table(block_tables, 2);
  const IntBuffer tokens(num_tokens, 1);
  const TableView view{table.data(), table.stride(0), static_cast<std::int32_t>(table.size(0)),
                       static_cast<std::int32_t>(table.size(1))};
  run(table.size(0) * width * 256, [&] {
    pool.gather(region, view, first_block,
                {tokens.data(), static_cast<std::size_t>(tokens.size(0))}, num_heads, width,
                pointer<std::byte>(target));
  });
}

void write(Pool& pool, std::size_t layer, const py::object& slots, std::uintptr_t k,
           std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride) {
  const Argument<std::int64_t> to("slots", slots);
  run(static_cast<std::int64_t>(to.span().size()) * (k_stride + v_stride), [&] {
    pool.write(layer, to.span(), pointer<const std::byte>(k), k_stride, pointer<const std::byte>(v),
               v_stride);
  });
}

// The arrays of these are given by address: a tensor's, where the pool's tensors are.

void copy_blocks_there(Pool& pool, std::uintptr_t copies, std::int64_t num_copies) {
  pool.copy_blocks_there(pointer<const std::int32_t>(copies), num_copies);
}

void write_there(Pool& pool, std::size_t layer, std::uintptr_t slots, std::int64_t num_tokens,
                 std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride) {
  run(num_tokens * (k_stride + v_stride), [&] {
    pool.write_there(layer, pointer<const std::int64_t>(slots), num_tokens,
                     pointer<const std::byte>(k), k_stride, pointer<const std::byte>(v), v_stride);
  });
}

void gather_there(Pool& pool, std::size_t region, std::uintptr_t block_tables,
                  std::int64_t table_stride, std::int32_t num_rows, std::int32_t table_width,
                  std::uintptr_t num_tokens, std::int32_t num_heads, std::int32_t width,
                  std::uintptr_t target) {
  const TableView view{pointer<const std::int32_t>(block_tables), table_stride, num_rows,
                       table_width};
  run(std::int64_t{num_rows} * width * 256, [&] {
    pool.gather_there(region, view, pointer<const std::int32_t>(num_tokens), num_heads, width,
                      pointer<std::byte>(target));
  });
}

}  // namespace

std::vector<Region> regions_of(const py::list& regions) {
  std::vector<Region> list;
  for (const py::handle item : regions) {
    const auto t = item.cast<py::tuple>();
    list.push_back({pointer<std::byte>(t[0].cast<std::uintptr_t>()), t[1].cast<std::int64_t>(),
                    t[2].cast<std::int64_t>()});
  }
  return list;
}

void bind_pools(py::module_& m) {
  py::class_<Pool>(m, "Pool", "What a step does with its tensors, which the caller keeps alive.")
      .def(
          "begin_step",
          [](Pool& self, const StepPlanHandle& plan) { self.begin_step(plan.plan()); },
          py::arg("plan"))
      .def("copy_blocks", &copy_blocks, py::arg("copies"))
      .def("scatter", &scatter, py::arg("region"), py::arg("slots"), py::arg("source"),
           py::arg("source_stride"))
      .def("write", &write, py::arg("layer"), py::arg("slots"), py::arg("k"), py::arg("k_stride"),
           py::arg("v"), py::arg("v_stride"))
      .def("gather", &gather, py::arg("region"), py::arg("block_tables"), py::arg("first_block"),
           py::arg("num_tokens"), py::arg("num_heads"), py::arg("width"), py::arg("target"))
      .def("copy_blocks_there", &copy_blocks_there, py::arg("copies"), py::arg("num_copies"))
      .def("write_there", &write_there, py::arg("layer"), py::arg("slots"), py::arg("num_tokens"),
           py::arg("k"), py::arg("k_stride"), py::arg("v"), py::arg("v_stride"))
      .def("gather_there", &gather_there, py::arg("region"), py::arg("block_tables"),
           py::arg("table_stride"), py::arg("num_rows"), py::arg("table_width"),
           py::arg("num_tokens"), py::arg("num_heads"), py::arg("width"), py::arg("target"))
      .def("synchronize", &Pool::synchronize);
  py::class_<HostPool, Pool>(m, "HostPool", py::is_final(), "In host memory, at once.")
      .def(py::init([](const py::list& regions, std::int32_t num_blocks, std::int32_t block_size) {
             return std::make_unique<HostPool>(regions_of(regions), num_blocks, block_size);
           }),
           py::arg("regions"), py::arg("num_blocks"), py::arg("block_size"));
  py::class_<SimulatedPool, Pool>(m, "SimulatedPool", py::is_final(),
                                  "On the compute stream of a simulated device.")
      .def(py::init([](std::shared_ptr<SimulatedDevice> device, const py::list& regions,
                       std::int32_t num_blocks, std::int32_t block_size, const py::object&) {
             return std::make_unique<SimulatedPool>(std::move(device), regions_of(regions),
                                                    num_blocks, block_size);
           }),
           py::arg("device"), py::arg("regions"), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("owner") = py::none(), py::keep_alive<1, 6>());
}

}  // namespace pagedkv
