// Pools: what a step does with tensors. These, and arrays, are given by address: Python has checked
// them and keeps them alive.
#include "bindings/pools.h"

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/module.h"
#include "bindings/state.h"
#include "host/host_attention.h"
#include "host/host_pool.h"
#include "host/simulated_pool.h"

namespace py = pybind11;

namespace pagedkv {

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Copies `bytes` in host memory, letting other Python threads in where that takes long enough to
// pay.
template <class F>
void run_without_gil_if_long(std::int64_t bytes, F&& copy) {
  constexpr std::int64_t kLongBytes = 256 * 1024;  // about 20 us
  if (bytes < kLongBytes) return copy();
  const py::gil_scoped_release release;
  copy();
}

void gather(Pool& pool, std::size_t region, std::uintptr_t block_tables, std::int64_t table_stride,
            std::int32_t num_rows, std::int32_t table_width, std::int32_t first_block,
            std::uintptr_t num_tokens, std::int32_t num_heads, std::int32_t width,
            std::uintptr_t target) {
  const TableView table{pointer<const std::int32_t>(block_tables), table_stride, num_rows,
                        table_width};
  run_without_gil_if_long(std::int64_t{num_rows} * width * 256, [&] {
    pool.gather(region, table, first_block,
                {pointer<const std::int32_t>(num_tokens), static_cast<std::size_t>(num_rows)},
                num_heads, width, pointer<std::byte>(target));
  });
}

void attend_rows(const HostPool& pool, std::size_t layer, const std::string& dtype, bool latent,
                 std::uintptr_t block_tables, std::int64_t table_stride, std::int32_t num_rows,
                 std::int32_t table_width, std::uintptr_t seq_lens, std::int32_t num_kv_heads,
                 std::int32_t group, float scale, float softcap, std::int32_t window,
                 std::uintptr_t firsts, std::uintptr_t queries, std::uintptr_t outputs,
                 std::uintptr_t sums, int num_threads) {
  const TableView table{pointer<const std::int32_t>(block_tables), table_stride, num_rows,
                        table_width};
  const DecodeRows rows{
      .layer = layer,
      .type = dtype == "bfloat16" ? FloatType::kBFloat16 : FloatType::kFloat32,
      .latent = latent,
      .num_kv_heads = num_kv_heads,
      .group = group,
      .scale = scale,
      .softcap = softcap,
      .window = window,
      .firsts = pointer<const std::int32_t>(firsts),
      .queries = pointer<const float>(queries),
      .outputs = pointer<float>(outputs),
      .sums = pointer<float>(sums),
  };
  run_without_gil_if_long(std::int64_t{num_rows} * table_width * 256, [&] {
    attend(pool, table, {pointer<const std::int32_t>(seq_lens), static_cast<std::size_t>(num_rows)},
           rows, num_threads);
  });
}

}  // namespace

void write_tokens(Pool& pool, std::size_t layer, std::uintptr_t slots, std::size_t num_tokens,
                  std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v,
                  std::int64_t v_stride) {
  run_without_gil_if_long(static_cast<std::int64_t>(num_tokens) * (k_stride + v_stride), [&] {
    pool.write(layer, {pointer<const std::int64_t>(slots), num_tokens}, pointer<const std::byte>(k),
               k_stride, pointer<const std::byte>(v), v_stride);
  });
}

void bind_pools(py::module_& m) {
  py::class_<Pool>(m, "Pool", "What a step does with its tensors, which the caller keeps alive.")
      .def(
          "begin_step",
          [](Pool& self, const StepPlanHandle& plan) { self.begin_step(plan.plan()); },
          py::arg("plan"))
      .def(
          "copy_blocks",
          [](Pool& self, std::uintptr_t copies, std::size_t num_copies) {
            self.copy_blocks({pointer<const std::int32_t>(copies), 3 * num_copies});
          },
          py::arg("copies"), py::arg("num_copies"))
      .def("write", &write_tokens, py::arg("layer"), py::arg("slots"), py::arg("num_tokens"),
           py::arg("k"), py::arg("k_stride"), py::arg("v"), py::arg("v_stride"))
      .def("gather", &gather, py::arg("region"), py::arg("block_tables"), py::arg("table_stride"),
           py::arg("num_rows"), py::arg("table_width"), py::arg("first_block"),
           py::arg("num_tokens"), py::arg("num_heads"), py::arg("width"), py::arg("target"))
      .def("synchronize", &Pool::synchronize);
  py::class_<HostPool, Pool>(m, "HostPool", py::is_final(), "In host memory, at once.")
      .def(py::init([](const py::sequence& regions, std::int32_t num_blocks,
                       std::int32_t block_size, const py::object&) {
             return std::make_unique<HostPool>(runs_of<Region>(regions), num_blocks, block_size);
           }),
           py::arg("regions"), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("owner") = py::none(), py::keep_alive<1, 5>())
      .def("attend", &attend_rows, py::arg("layer"), py::arg("dtype"), py::arg("latent"),
           py::arg("block_tables"), py::arg("table_stride"), py::arg("num_rows"),
           py::arg("table_width"), py::arg("seq_lens"), py::arg("num_kv_heads"), py::arg("group"),
           py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("firsts"),
           py::arg("queries"), py::arg("outputs"), py::arg("sums"), py::arg("num_threads"));
  py::class_<SimulatedPool, Pool>(m, "SimulatedPool", py::is_final(),
                                  "On the compute stream of a simulated device.")
      .def(py::init([](std::shared_ptr<SimulatedDevice> device, const py::sequence& regions,
                       std::int32_t num_blocks, std::int32_t block_size, const py::object&) {
             return std::make_unique<SimulatedPool>(std::move(device), runs_of<Region>(regions),
                                                    num_blocks, block_size);
           }),
           py::arg("device"), py::arg("regions"), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("owner") = py::none(), py::keep_alive<1, 6>());
}

}  // namespace pagedkv
