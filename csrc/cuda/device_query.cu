#include "cuda/device_query.h"

#include <cuda_runtime_api.h>

namespace pagedkv {

namespace {

// Whether a query succeeded. CUDA remembers a failure until it is read; nobody else shall find it.
bool ok(cudaError_t result) {
  if (result != cudaSuccess) static_cast<void>(cudaGetLastError());
  return result == cudaSuccess;
}

}  // namespace

int cuda_runtime_version() {
  int version = 0;
  return ok(cudaRuntimeGetVersion(&version)) ? version : 0;
}

int cuda_driver_version() {
  int version = 0;
  return ok(cudaDriverGetVersion(&version)) ? version : 0;
}

std::string cuda_status() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  return ok(result) ? "ok" : cudaGetErrorString(result);
}

std::vector<CudaDeviceInfo> cuda_devices() {
  int count = 0;
  if (!ok(cudaGetDeviceCount(&count))) return {};
  std::vector<CudaDeviceInfo> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (!ok(cudaGetDeviceProperties(&properties, i))) return {};
    devices.push_back({i, properties.name, properties.major, properties.minor,
                       static_cast<std::int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

}  // namespace pagedkv
