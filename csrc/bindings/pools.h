// What the files that bind devices and pools share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "host/simulated_device.h"
#include "transfer/pool.h"

namespace pagedkv {

// Of tuples (address in block 0, bytes from block to block, bytes): a Region each, or a BlockRun.
template <class Run>
std::vector<Run> runs_of(const pybind11::sequence& tuples) {
  std::vector<Run> runs;
  for (const pybind11::handle item : tuples) {
    const auto t = item.cast<pybind11::tuple>();
    runs.push_back({reinterpret_cast<std::byte*>(t[0].cast<std::uintptr_t>()),
                    t[1].cast<std::int64_t>(), t[2].cast<std::int64_t>()});
  }
  return runs;
}

// Token t of a layer's keys and values, at k + t * k_stride and v + t * v_stride, goes to slots[t].
void write_tokens(Pool& pool, std::size_t layer, std::uintptr_t slots, std::size_t num_tokens,
                  std::uintptr_t k, std::int64_t k_stride, std::uintptr_t v, std::int64_t v_stride);

Schedule schedule_of(const std::string& name);

}  // namespace pagedkv
