// Which CUDA runtime, driver and devices there are. A missing driver is an answer, not an error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pagedkv {

struct CudaDeviceInfo {
  int index;
  std::string name;
  int major;  // of the compute capability
  int minor;
  std::int64_t total_bytes;
};

// Versions as CUDA counts them: 1000 * major + 10 * minor.
int cuda_runtime_version();
int cuda_driver_version();  // the newest CUDA that the driver serves; 0 without a driver

// "ok", or why there are no devices, in CUDA's words.
std::string cuda_status();

// Empty unless cuda_status() is "ok".
std::vector<CudaDeviceInfo> cuda_devices();

}  // namespace pagedkv
