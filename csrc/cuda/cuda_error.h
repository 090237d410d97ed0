// CUDA's error codes as errors that say what to do.
#pragma once

#include <string>

#include "cuda/runtime.h"

namespace pagedkv {

inline constexpr int kOutOfMemory = 2;
inline constexpr int kIllegalAddress = 700;

// A code after which nothing on this device works any more in this process.
bool is_sticky(int code);

// "cudaMemcpyAsync: cudaErrorMemoryAllocation (out of memory): free device memory, or ..."
std::string error_message(CudaRuntime& runtime, int code, const char* call);

// Throws DeviceError unless `code` says success. CUDA remembers a failure until it is read; nobody
// else shall find it.
void check(CudaRuntime& runtime, int code, const char* call);

}  // namespace pagedkv
