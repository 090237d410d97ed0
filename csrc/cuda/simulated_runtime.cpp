#include "cuda/simulated_runtime.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "core/error.h"
#include "cuda/cuda_error.h"
#include "cuda/kernels.h"
#include "cuda/scatter_fp8.h"

namespace pagedkv {

namespace {

constexpr int kInvalidValue = 1;
constexpr int kInvalidDevice = 101;
constexpr int kInvalidHandle = 400;
constexpr int kCaptureUnsupported = 900;
constexpr FenceSite kSite = FenceSite::transfer_after_transfer;

// Calls that are counted, and can be made to fail.
// clang-format off
constexpr std::string_view kFunctions[] = {
    "copy_blocks", "cudaEventCreate", "cudaEventDestroy", "cudaEventElapsedTime",
    "cudaEventQuery", "cudaEventRecord", "cudaEventSynchronize", "cudaFree", "cudaGetDevice",
    "cudaHostRegister", "cudaHostUnregister", "cudaMalloc", "cudaMemcpyAsync",
    "cudaMemcpyBatchAsync", "cudaSetDevice", "cudaStreamCreateWithFlags", "cudaStreamDestroy",
    "cudaStreamGetDevice", "cudaStreamIsCapturing", "cudaStreamSynchronize",
    "cudaStreamWaitEvent", "gather_kv", "load_kernels", "scatter_fp8", "scatter_kv",
    "transfer_blocks", "update_tables"};
// clang-format on

thread_local int current_device = 0;

const CudaStream kLegacy = nullptr;
const CudaStream kLegacyByName = reinterpret_cast<CudaStream>(std::uintptr_t{1});
const CudaStream kPerThread = reinterpret_cast<CudaStream>(std::uintptr_t{2});

SimulatedOptions with_default_streams(SimulatedOptions options) {
  options.num_compute_streams = 2;
  return options;
}

}  // namespace

SimulatedRuntime::SimulatedRuntime(const SimulatedOptions& options, int num_devices, bool has_batch)
    : machine_(with_default_streams(options)), num_devices_(num_devices), has_batch_(has_batch) {
  machine_.use_compute_stream(1);
  lanes_[kPerThread] = machine_.compute_stream();
  machine_.use_compute_stream(0);
  lanes_[kLegacy] = lanes_[kLegacyByName] = machine_.compute_stream();
}

SimulatedRuntime::~SimulatedRuntime() = default;

void SimulatedRuntime::fail(const std::string& function, int code, int k) {
  if (std::ranges::find(kFunctions, function) == std::end(kFunctions)) {
    throw InvalidSpec("function is \"" + function + "\", which is no call that is made");
  }
  const std::lock_guard lock(mutex_);
  failures_[function] = {k, code};
}

int SimulatedRuntime::enter(const char* function) {
  KV_CHECK(std::ranges::find(kFunctions, function) != std::end(kFunctions));
  const std::lock_guard lock(mutex_);
  ++num_calls_[function];
  if (!std::string_view(function).ends_with("etDevice")) ++num_calls_on_[current_device];
  if (sticky_ != 0) return sticky_;
  const auto found = failures_.find(function);
  if (found == failures_.end() || --found->second.first > 0) return kSuccess;
  const int code = found->second.second;
  failures_.erase(found);
  if (is_sticky(code)) {
    sticky_ = code;
    machine_.lose();
  }
  return code;
}

int SimulatedRuntime::enter(const char* function, CudaStream stream) {
  if (const int code = enter(function)) return code;
  return captured_.contains(stream) ? kCaptureUnsupported : kSuccess;
}

void SimulatedRuntime::capture(CudaStream stream, bool capturing) {
  if (capturing) {
    captured_.insert(stream);
  } else {
    captured_.erase(stream);
  }
}

std::int64_t SimulatedRuntime::num_calls_on(int device) const {
  const std::lock_guard lock(mutex_);
  const auto found = num_calls_on_.find(device);
  return found == num_calls_on_.end() ? 0 : found->second;
}

std::int64_t SimulatedRuntime::num_calls(const std::string& function) const {
  const std::lock_guard lock(mutex_);
  const auto found = num_calls_.find(function);
  return found == num_calls_.end() ? 0 : found->second;
}

std::size_t SimulatedRuntime::num_registered_bytes() const {
  const std::lock_guard lock(mutex_);
  return std::accumulate(registered_.begin(), registered_.end(), std::size_t{0},
                         [](std::size_t sum, const auto& r) { return sum + r.second; });
}

std::string SimulatedRuntime::error_text(int code) {
  return "simulated error " + std::to_string(code);
}

// -------------------------------------------------------------------------------------- devices

int SimulatedRuntime::get_device(int* device) {
  *device = current_device;
  return enter("cudaGetDevice");
}

int SimulatedRuntime::set_device(int device) {
  if (const int code = enter("cudaSetDevice")) return code;
  if (device < 0 || device >= num_devices_) return kInvalidDevice;
  current_device = device;
  return kSuccess;
}

int SimulatedRuntime::load_kernels() { return enter("load_kernels"); }

// -------------------------------------------------------------------------------------- streams

bool SimulatedRuntime::known(CudaStream stream) const { return lanes_.contains(stream); }

int SimulatedRuntime::create_stream(CudaStream* stream) {
  if (const int code = enter("cudaStreamCreateWithFlags")) return code;
  *stream = reinterpret_cast<CudaStream>(next_handle_ += 16);
  lanes_[*stream] = machine_.make_stream();
  streams_[*stream] = current_device;
  return kSuccess;
}

int SimulatedRuntime::destroy_stream(CudaStream stream) {
  if (streams_.erase(stream) == 0) return kInvalidHandle;
  lanes_.erase(stream);
  return enter("cudaStreamDestroy");
}

int SimulatedRuntime::synchronize(CudaStream stream) {
  if (const int code = enter("cudaStreamSynchronize", stream)) return code;
  if (!known(stream)) return kInvalidHandle;
  machine_.synchronize(lane_of(stream));
  return kSuccess;
}

int SimulatedRuntime::device_of(CudaStream stream, int* device) {
  if (const int code = enter("cudaStreamGetDevice", stream)) return code;
  if (!known(stream)) return kInvalidHandle;
  const auto found = streams_.find(stream);
  *device = found == streams_.end() ? current_device : found->second;
  return kSuccess;
}

int SimulatedRuntime::is_capturing(CudaStream stream, bool* capturing) {
  *capturing = captured_.contains(stream);
  return enter("cudaStreamIsCapturing");
}

// -------------------------------------------------------------------------------------- events

int SimulatedRuntime::create_event(CudaEvent* event) {
  if (const int code = enter("cudaEventCreate")) return code;
  *event = reinterpret_cast<CudaEvent>(next_handle_ += 16);
  events_[*event].device = current_device;
  return kSuccess;
}

int SimulatedRuntime::destroy_event(CudaEvent event) {
  const auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  if (found->second.recorded != Event::none && sticky_ == 0)
    machine_.recycle(found->second.recorded);
  events_.erase(found);
  return enter("cudaEventDestroy");
}

// Streams that wait for the event go on waiting for what was recorded when they were told to.
int SimulatedRuntime::record(CudaEvent event, CudaStream stream) {
  if (const int code = enter("cudaEventRecord", stream)) return code;
  const auto found = events_.find(event);
  if (found == events_.end() || !known(stream)) return kInvalidHandle;
  const auto made = streams_.find(stream);
  if ((made == streams_.end() ? current_device : made->second) != found->second.device) {
    return kInvalidHandle;
  }
  if (found->second.recorded != Event::none) machine_.recycle(found->second.recorded);
  found->second.recorded = Event::none;
  try {
    found->second.recorded = machine_.record(lane_of(stream));
  } catch (const DeviceError&) {
    return kOutOfMemory;
  }
  return kSuccess;
}

int SimulatedRuntime::wait(CudaStream stream, CudaEvent event) {
  if (const int code = enter("cudaStreamWaitEvent", stream)) return code;
  const auto found = events_.find(event);
  if (found == events_.end() || !known(stream)) return kInvalidHandle;
  if (found->second.recorded != Event::none) {
    machine_.fence(lane_of(stream), found->second.recorded, kSite);
  }
  return kSuccess;
}

int SimulatedRuntime::observe(Status status) {
  if (status == Status::pending) return kNotReady;
  if (status == Status::done) return kSuccess;
  const std::lock_guard lock(mutex_);
  return sticky_ = kIllegalAddress;
}

int SimulatedRuntime::query(CudaEvent event) {
  if (const int code = enter("cudaEventQuery")) return code;
  if (!captured_.empty()) return kCaptureUnsupported;
  const auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  if (found->second.recorded == Event::none) return kSuccess;
  return observe(machine_.poll(found->second.recorded));
}

int SimulatedRuntime::synchronize(CudaEvent event) {
  if (const int code = enter("cudaEventSynchronize")) return code;
  if (!captured_.empty()) return kCaptureUnsupported;
  const auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  if (found->second.recorded == Event::none) return kSuccess;
  return observe(machine_.wait(found->second.recorded));
}

int SimulatedRuntime::elapsed(CudaEvent first, CudaEvent second, float* milliseconds) {
  if (const int code = enter("cudaEventElapsedTime")) return code;
  for (const CudaEvent event : {first, second}) {
    const auto found = events_.find(event);
    if (found == events_.end() || found->second.recorded == Event::none) return kInvalidHandle;
    if (const int code = observe(machine_.poll(found->second.recorded))) return code;
  }
  *milliseconds = first == second ? 0.0f : 1.0f;
  return kSuccess;
}

// -------------------------------------------------------------------------------------- copies

// A copy is within one piece of memory that was registered, or outside of all.
bool SimulatedRuntime::can_copy(const void* begin, std::size_t bytes) const {
  const std::lock_guard lock(mutex_);
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  return std::ranges::none_of(registered_, [&](const auto& piece) {
    const auto piece_first = reinterpret_cast<std::uintptr_t>(piece.first);
    const auto piece_last = piece_first + piece.second;
    const bool touches = first < piece_last && piece_first < first + bytes;
    return touches && (first < piece_first || first + bytes > piece_last);
  });
}

int SimulatedRuntime::copy(void* target, const void* source, std::size_t bytes, CudaStream stream) {
  if (const int code = enter("cudaMemcpyAsync", stream)) return code;
  if (!known(stream)) return kInvalidHandle;
  if (!can_copy(target, bytes) || !can_copy(source, bytes)) return kInvalidValue;
  const CopyRun run{static_cast<std::byte*>(target), static_cast<const std::byte*>(source), bytes};
  machine_.copy(lane_of(stream), {&run, 1});
  return kSuccess;
}

int SimulatedRuntime::copy_batch(void** targets, const void** sources, std::size_t* bytes,
                                 std::size_t count, CudaStream stream) {
  if (const int code = enter("cudaMemcpyBatchAsync", stream)) return code;
  if (!has_batch_ || !known(stream) || stream == kLegacy || stream == kLegacyByName) {
    return kInvalidValue;
  }
  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < count; ++i) {
    const bool taken = can_copy(targets[i], bytes[i]) && can_copy(sources[i], bytes[i]);
    if (bytes[i] == 0 || !taken) return kInvalidValue;
    runs.push_back(
        {static_cast<std::byte*>(targets[i]), static_cast<const std::byte*>(sources[i]), bytes[i]});
  }
  if (!reaches_host_) {  // as CUDA does, which finds out when it copies
    const std::lock_guard lock(mutex_);
    sticky_ = kIllegalAddress;
    machine_.lose();
    return kSuccess;
  }
  machine_.copy(lane_of(stream), runs);
  return kSuccess;
}

// -------------------------------------------------------------------------------------- memory

int SimulatedRuntime::allocate(void** memory, std::size_t bytes) {
  if (const int code = enter("cudaMalloc")) return code;
  auto block = std::make_unique_for_overwrite<std::byte[]>(bytes + 256);
  void* const aligned =
      reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(block.get()) + 255) / 256 * 256);
  allocations_[aligned] = std::move(block);
  *memory = aligned;
  return kSuccess;
}

int SimulatedRuntime::free(void* memory) {
  if (memory != nullptr && allocations_.erase(memory) == 0) return kInvalidValue;
  return enter("cudaFree");
}

int SimulatedRuntime::register_host(void* memory, std::size_t bytes) {
  if (const int code = enter("cudaHostRegister")) return code;
  if (num_registered_bytes() + bytes > most_registered_) return kOutOfMemory;
  const std::lock_guard lock(mutex_);
  return registered_.emplace(memory, bytes).second ? kSuccess : kInvalidValue;
}

int SimulatedRuntime::unregister_host(void* memory) {
  {
    const std::lock_guard lock(mutex_);
    if (registered_.erase(memory) == 0) return kInvalidValue;
  }
  return enter("cudaHostUnregister");
}

// -------------------------------------------------------------------------------------- kernels

template <class Work>
int SimulatedRuntime::queue(const char* function, CudaStream stream, Work work) {
  if (const int code = enter(function)) return code;
  if (!known(stream)) return kInvalidHandle;
  machine_.run(lane_of(stream), {}, work);
  return kSuccess;
}

template <class Kernel>
int SimulatedRuntime::run(const char* function, const Kernel& kernel, CudaStream stream) {
  return queue(function, stream, [kernel] {
    const auto bytes = static_cast<std::size_t>(kernel.words.bytes);
    for (std::int64_t i = 0; i < kernel.words.count; ++i) {
      const Move move = kernel(i);
      if (move.to == nullptr) continue;
      if (move.from == nullptr) {
        std::memset(move.to, 0, bytes);
      } else {
        std::memcpy(move.to, move.from, bytes);
      }
    }
  });
}

int SimulatedRuntime::launch(const CopyBlocks& kernel, CudaStream stream) {
  return run("copy_blocks", kernel, stream);
}
int SimulatedRuntime::launch(const ScatterKv& kernel, CudaStream stream) {
  return run("scatter_kv", kernel, stream);
}
int SimulatedRuntime::launch(const ScatterFp8& kernel, CudaStream stream) {
  return queue("scatter_fp8", stream, [kernel] {
    kernel.dispatch([&]<class Value, int kCount>() {
      for (std::int64_t i = 0; i < kernel.count; ++i) kernel.convert<Value, kCount>(i);
    });
  });
}
int SimulatedRuntime::launch(const GatherKv& kernel, CudaStream stream) {
  return run("gather_kv", kernel, stream);
}
int SimulatedRuntime::launch(const TransferBlocks& kernel, CudaStream stream) {
  return run("transfer_blocks", kernel, stream);
}
int SimulatedRuntime::launch(const UpdateTables& kernel, CudaStream stream) {
  return run("update_tables", kernel, stream);
}

}  // namespace pagedkv
