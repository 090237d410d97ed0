// A CUDA device on a simulated runtime, with as little memory as will do, and what its errors say.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/cuda_device.h"
#include "cuda/cuda_error.h"
#include "cuda/simulated_runtime.h"

namespace pagedkv {

// Sanitizers touch all of it.
inline const CudaOptions kSmall{.pinned = {.chunk_bytes = 8192, .ahead = false},
                                .ring_bytes = 65536,
                                .calibration_bytes = std::size_t{2} << 20,
                                .staging_bytes = 4096};

struct CudaWorld {
  explicit CudaWorld(Schedule schedule = Schedule::lazy, std::uint64_t seed = 0,
                     const CudaOptions& options = kSmall, bool has_batch = true)
      : runtime(std::make_shared<SimulatedRuntime>(
            SimulatedOptions{.schedule = schedule, .seed = seed}, 2, has_batch)),
        device(std::make_unique<CudaDevice>(runtime, options)) {}

  void check_nothing_left() {
    device->close();
    CHECK(runtime->num_streams() == 0);
    CHECK(runtime->num_events() == 0);
    CHECK(runtime->num_allocations() == 0);
    CHECK(runtime->num_registered_bytes() == 0);
    CHECK(runtime->machine().violations().empty());
  }

  std::shared_ptr<SimulatedRuntime> runtime;
  std::unique_ptr<CudaDevice> device;
};

inline std::string message(auto&& call) {
  try {
    call();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace pagedkv
