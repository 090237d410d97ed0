// What the files that bind devices and pools share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "host/simulated_device.h"
#include "transfer/pool.h"

namespace pagedkv {

// (address, bytes from block to block, bytes of a token) of each region.
std::vector<Region> regions_of(const pybind11::list& regions);

// Copies `bytes` in host memory, letting other Python threads in where that takes long enough to
// pay.
template <class F>
void run_without_gil_if_long(std::int64_t bytes, F&& copy) {
  constexpr std::int64_t kLongBytes = 256 * 1024;  // about 20 us
  if (bytes < kLongBytes) return copy();
  const pybind11::gil_scoped_release release;
  copy();
}

Schedule schedule_of(const std::string& name);

}  // namespace pagedkv
