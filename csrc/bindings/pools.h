// What the files that bind devices and pools share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "host/simulated_device.h"
#include "transfer/pool.h"

namespace pagedkv {

// (address, bytes from block to block, bytes of a token) of each region.
std::vector<Region> regions_of(const pybind11::list& regions);

Schedule schedule_of(const std::string& name);

}  // namespace pagedkv
