#include "cuda/cuda_error.h"

#include "transfer/device.h"

namespace pagedkv {

namespace {

const char* what_to_do(int code) {
  switch (code) {
    case kOutOfMemory: return "free device memory, or give this cache less";
    case 35: return "update the NVIDIA driver: this build needs a newer one (`pagedkv info` tells)";
    case 46:
    case 101: return "use a device that is free and that exists";
    case 100: return "there is no CUDA device here";
    case 209:
    case 222:
      return "this build has no code for this GPU: it needs compute capability 8.0 or later, or a "
             "build for its architecture (CMAKE_CUDA_ARCHITECTURES)";
    case 400: return "the stream or event is another device's, or has been destroyed";
    case 801: return "this driver cannot do that";
    case 900: return "a stream is being captured into a CUDA graph: ask again when it is not";
    default: return is_sticky(code) ? "this process has lost the device: restart it" : "";
  }
}

}  // namespace

bool is_sticky(int code) {
  switch (code) {
    case 214:  // ECC error that cannot be corrected
    case 220:  // NVLink error
    case 226:  // an error of the hardware, contained
    case 700:  // illegal address
    case 702:  // launch timed out
    case 709:  // context is destroyed
    case 710:  // assert
    case 714:  // hardware stack error
    case 715:  // illegal instruction
    case 716:  // misaligned address
    case 717:  // invalid address space
    case 718:  // invalid program counter
    case 719:  // launch failed
    case 721:  // tensor memory leak
    case 810:  // MPS client terminated
    case 911:  // external device
    case 999: return true;
    default: return false;
  }
}

std::string error_message(CudaRuntime& runtime, int code, const char* call) {
  const std::string advice = what_to_do(code);
  return std::string(call) + ": " + runtime.error_text(code) +
         (advice.empty() ? "" : ": " + advice);
}

void check(CudaRuntime& runtime, int code, const char* call) {
  if (code == CudaRuntime::kSuccess) return;
  const std::string message = error_message(runtime, code, call);
  runtime.clear_error();
  throw DeviceError(message);
}

}  // namespace pagedkv
