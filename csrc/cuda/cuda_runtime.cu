#include "cuda/cuda_runtime.h"

namespace pagedkv {

namespace {

// Some calls end the capture of a graph, of any thread, unless theirs says that it means no harm:
// those that wait, ask or get memory. None of ours are about a stream that is being captured.
class WhileOthersCapture {
 public:
  WhileOthersCapture() { exchange(); }
  ~WhileOthersCapture() { exchange(); }
  WhileOthersCapture(const WhileOthersCapture&) = delete;
  WhileOthersCapture& operator=(const WhileOthersCapture&) = delete;

 private:
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

std::shared_ptr<CudaRuntime> real_runtime() { return std::make_shared<RealRuntime>(); }

std::string RealRuntime::error_text(int code) {
  const auto error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

void RealRuntime::clear_error() { static_cast<void>(cudaGetLastError()); }

int RealRuntime::get_device(int* device) { return cudaGetDevice(device); }
int RealRuntime::set_device(int device) { return cudaSetDevice(device); }

int RealRuntime::create_stream(CudaStream* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
}
int RealRuntime::destroy_stream(CudaStream stream) { return cudaStreamDestroy(stream); }
int RealRuntime::synchronize(CudaStream stream) {
  const WhileOthersCapture relaxed;
  return cudaStreamSynchronize(stream);
}
int RealRuntime::device_of(CudaStream stream, int* device) {
#if CUDART_VERSION >= 12080
  const cudaError_t code = cudaStreamGetDevice(stream, device);
  if (code != cudaErrorCallRequiresNewerDriver && code != cudaErrorNotSupported) return code;
  static_cast<void>(cudaGetLastError());
  return cudaGetDevice(device);
#else
  static_cast<void>(stream);
  return cudaGetDevice(device);  // these runtimes do not tell
#endif
}

int RealRuntime::is_capturing(CudaStream stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const int code = cudaStreamIsCapturing(stream, &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return code;
}

int RealRuntime::create_event(CudaEvent* event) { return cudaEventCreate(event); }
int RealRuntime::destroy_event(CudaEvent event) { return cudaEventDestroy(event); }
int RealRuntime::record(CudaEvent event, CudaStream stream) {
  return cudaEventRecord(event, stream);
}
int RealRuntime::wait(CudaStream stream, CudaEvent event) {
  return cudaStreamWaitEvent(stream, event, 0);
}
int RealRuntime::query(CudaEvent event) {
  const WhileOthersCapture relaxed;
  return cudaEventQuery(event);
}
int RealRuntime::synchronize(CudaEvent event) {
  const WhileOthersCapture relaxed;
  return cudaEventSynchronize(event);
}
int RealRuntime::elapsed(CudaEvent first, CudaEvent second, float* milliseconds) {
  return cudaEventElapsedTime(milliseconds, first, second);
}

int RealRuntime::copy(void* target, const void* source, std::size_t bytes, CudaStream stream) {
  return cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream);
}

bool RealRuntime::has_copy_batch() {
#if CUDART_VERSION >= 12080
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12080;
#else
  return false;
#endif
}

int RealRuntime::copy_batch(void** targets, const void** sources, std::size_t* bytes,
                            std::size_t count, CudaStream stream) {
#if CUDART_VERSION >= 12080
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  std::size_t first = 0;  // the attributes hold from this copy on
#if CUDART_VERSION >= 13000
  return cudaMemcpyBatchAsync(targets, sources, bytes, count, &attributes, &first, 1, stream);
#else
  std::size_t failed = 0;
  return cudaMemcpyBatchAsync(targets, const_cast<void**>(sources), bytes, count, &attributes,
                              &first, 1, &failed, stream);
#endif
#else
  static_cast<void>(targets), static_cast<void>(sources), static_cast<void>(bytes);
  static_cast<void>(count), static_cast<void>(stream);
  return cudaErrorNotSupported;
#endif
}

int RealRuntime::allocate(void** memory, std::size_t bytes) {
  const WhileOthersCapture relaxed;
  return cudaMalloc(memory, bytes);
}
int RealRuntime::free(void* memory) {
  const WhileOthersCapture relaxed;
  return cudaFree(memory);
}
bool RealRuntime::reaches_host() {
  int device = 0, reach = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&reach, cudaDevAttrCanUseHostPointerForRegisteredMem,
                                            device) == cudaSuccess;
  if (!known) static_cast<void>(cudaGetLastError());
  return known && reach != 0;
}
int RealRuntime::register_host(void* memory, std::size_t bytes) {
  const WhileOthersCapture relaxed;
  return cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
}
int RealRuntime::unregister_host(void* memory) {
  const WhileOthersCapture relaxed;
  return cudaHostUnregister(memory);
}

}  // namespace pagedkv
