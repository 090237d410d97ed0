#include "cuda/cuda_device.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "cuda/cuda_error.h"
#include "cuda/keep.h"

namespace pagedkv {

CudaDevice::Guard::Guard(CudaDevice& device) : runtime_(*device.runtime_) {
  device.check(runtime_.get_device(&before_), "cudaGetDevice");
  if (before_ == device.options_.index) return;
  device.check(runtime_.set_device(device.options_.index), "cudaSetDevice");
  changed_ = true;
}

CudaDevice::Guard::Guard(CudaDevice& device, std::nothrow_t) : runtime_(*device.runtime_) {
  if (runtime_.get_device(&before_) == 0 && before_ != device.options_.index) {
    changed_ = runtime_.set_device(device.options_.index) == 0;
  }
  if (!changed_) runtime_.clear_error();
}

CudaDevice::Guard::~Guard() {
  if (changed_ && runtime_.set_device(before_) != 0) runtime_.clear_error();
}

CudaDevice::CudaDevice(std::shared_ptr<CudaRuntime> runtime, const CudaOptions& options)
    : runtime_(std::move(runtime)),
      options_(options),
      process_(::getpid()),
      methods_(available_methods()) {
  const Guard guard(*this);
  check(runtime_->load_kernels(), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  ring_ = std::make_unique<UploadRing>(*this, runtime_, options_.ring_bytes);
  transfer_ring_ = std::make_unique<UploadRing>(*this, runtime_, options_.ring_bytes);
}

CudaDevice::~CudaDevice() {
  try {
    close();
  } catch (const DeviceError&) {
  }
  if (closed_) return;
  // It is the parent's, or may be in use.
  for (auto& memory : host_) keep_for_good(std::move(memory));
  keep_for_good(std::move(ring_));
  keep_for_good(std::move(transfer_ring_));
}

void CudaDevice::check(int code, const char* call) {
  if (code == CudaRuntime::kSuccess) return;
  if (is_sticky(code) && lost_.empty()) lost_ = error_message(*runtime_, code, call);
  pagedkv::check(*runtime_, code, call);
}

void CudaDevice::note_if_lost(int code, const char* call) {
  if (code == CudaRuntime::kSuccess) return;
  if (is_sticky(code) && lost_.empty()) lost_ = error_message(*runtime_, code, call);
  runtime_->clear_error();
}

bool CudaDevice::is_parents() const { return process_ != ::getpid(); }

void CudaDevice::check_open() const {
  if (is_parents()) throw DeviceError("CUDA does not survive fork(): use spawn");
  if (closed_) throw DeviceError("the CUDA device is closed");
  if (!lost_.empty()) throw DeviceError("the CUDA device is lost: " + lost_);
}

// An event in a capture is a part of the graph, and asking for one that is not breaks the capture.
bool CudaDevice::is_capturing(CudaStream stream) {
  if (!is_open()) return false;
  const Guard guard(*this, std::nothrow);  // the legacy stream is the current device's
  bool capturing = false;
  const int code = runtime_->is_capturing(stream, &capturing);
  if (!is_sticky(code)) check(code, "cudaStreamIsCapturing");
  note_if_lost(code, "cudaStreamIsCapturing");  // whose next call tells
  return capturing && is_open();
}

void CudaDevice::check_not_capturing() {
  if (!is_capturing(stream_)) return;
  throw DeviceError(
      "the current stream is being captured into a CUDA graph: begin and end steps, and move "
      "blocks, outside of the capture");
}

void CudaDevice::use_stream(CudaStream stream) {
  check_open();
  if (stream == stream_) return;
  const Guard guard(*this);
  int device = options_.index;
  // Default streams are the current device's. CUDA does not tell of one that is being captured, as
  // that of torch.cuda.graph is, and ends the capture.
  if (!is_default(stream) && !is_capturing(stream)) {
    check(runtime_->device_of(stream, &device), "cudaStreamGetDevice");
  }
  if (device != options_.index) {
    throw DeviceError("the current stream is one of device " + std::to_string(device) +
                      ", expected one of device " + std::to_string(options_.index));
  }
  if (std::ranges::find(callers_, stream) == callers_.end()) callers_.push_back(stream);
  stream_ = stream;
}

Stream CudaDevice::compute_stream() {
  check_open();
  check_not_capturing();
  return ours(stream_);
}

Stream CudaDevice::make_stream() {
  check_open();
  const Guard guard(*this);
  CudaStream stream = nullptr;
  check(runtime_->create_stream(&stream), "cudaStreamCreateWithFlags");
  streams_.push_back(stream);
  if (methods_.may_stage()) staging(stream);  // now, while there is memory
  return ours(stream);
}

void CudaDevice::synchronize(CudaStream stream) {
  check_open();
  const Guard guard(*this);
  check(runtime_->synchronize(stream), "cudaStreamSynchronize");
}

void CudaDevice::synchronize_callers() {
  for (const CudaStream stream : callers_) synchronize(stream);
  callers_ = {stream_};
}

bool CudaDevice::is_at_rest(CudaStream stream) {
  const int code = runtime_->synchronize(stream);
  note_if_lost(code, "cudaStreamSynchronize");
  return code == CudaRuntime::kSuccess || !is_open();
}

// -------------------------------------------------------------------------------------- events

// A handle is (place + 1) and the generation above it, so that a recycled one is known.
CudaDevice::EventState& CudaDevice::find(Event event) {
  const auto number = static_cast<std::uint64_t>(event);
  const std::size_t place = static_cast<std::size_t>(number & 0xffffffff) - 1;
  KV_CHECK(place < events_.size() && events_[place].live &&
           events_[place].generation == static_cast<std::uint32_t>(number >> 32));
  return events_[place];
}

Event CudaDevice::record(Stream stream) {
  check_open();
  const Guard guard(*this);
  if (free_events_.empty()) {
    CudaEvent event = nullptr;
    check(runtime_->create_event(&event), "cudaEventCreate");
    free_events_.push_back(events_.size());
    events_.push_back({.event = event});
  }
  const std::size_t place = free_events_.back();
  EventState& state = events_[place];
  check(runtime_->record(state.event, cuda(stream)), "cudaEventRecord");
  free_events_.pop_back();
  state.live = true;
  state.status = Status::pending;
  const auto broken = broken_.extract(cuda(stream));
  state.failure = broken ? std::move(broken.mapped()) : std::string();
  return Event{(place + 1) | std::uint64_t{state.generation} << 32};
}

void CudaDevice::fence(Stream stream, Event event, FenceSite) {
  check_open();
  const EventState& state = find(event);
  if (state.status != Status::pending) return;
  const Guard guard(*this);
  check(runtime_->wait(cuda(stream), state.event), "cudaStreamWaitEvent");
}

Status CudaDevice::settle(EventState& state, int code, const char* call) {
  if (code == CudaRuntime::kSuccess) {
    return state.status = state.failure.empty() ? Status::done : Status::failed;
  }
  note_if_lost(code, call);
  if (!is_sticky(code)) return Status::pending;  // of the call, not of the work, still under way
  return state.status = Status::failed;
}

Status CudaDevice::poll(Event event) {
  check_open();
  EventState& state = find(event);
  if (state.status != Status::pending || is_capturing(stream_)) return state.status;
  const Guard guard(*this);
  const int code = runtime_->query(state.event);
  return code == CudaRuntime::kNotReady ? Status::pending : settle(state, code, "cudaEventQuery");
}

Status CudaDevice::wait(Event event) {
  const Status status = poll(event);
  if (status != Status::pending) return status;
  check_not_capturing();
  const Guard guard(*this);
  ++num_host_waits_;
  EventState& state = find(event);
  const int code = runtime_->synchronize(state.event);
  if (settle(state, code, "cudaEventSynchronize") == Status::pending) {
    check(code, "cudaEventSynchronize");
  }
  return state.status;
}

std::string CudaDevice::failure(Event event) {
  if (closed_) check_open();
  const EventState& state = find(event);
  if (state.status != Status::failed) return {};
  return state.failure.empty() ? lost_ : state.failure;
}

void CudaDevice::recycle(Event event) {
  if (closed_) check_open();
  EventState& state = find(event);
  state.live = false;
  ++state.generation;
  free_events_.push_back(static_cast<std::size_t>(&state - events_.data()));
}

double CudaDevice::seconds_between(Event first, Event second) {
  check_open();
  if (first == second) return 0;
  const Guard guard(*this);
  float milliseconds = 0;
  check(runtime_->elapsed(find(first).event, find(second).event, &milliseconds),
        "cudaEventElapsedTime");
  return std::max(0.0, double{milliseconds} / 1e3);
}

// ---------------------------------------------------------------------------------- host memory

std::byte* CudaDevice::allocate_host(std::size_t bytes) {
  check_open();
  host_.push_back(std::make_unique<PinnedMemory>(runtime_, options_.index, bytes, options_.pinned));
  return host_.back()->data();
}

void CudaDevice::free_host(std::byte* memory, std::size_t) {
  if (is_parents()) return;
  const Guard guard(*this, std::nothrow);
  const auto found =
      std::ranges::find_if(host_, [&](const auto& h) { return h->data() == memory; });
  KV_CHECK(found != host_.end());
  host_.erase(found);
}

PinnedMemory* CudaDevice::find_host(const std::byte* address) const {
  for (const auto& memory : host_) {
    if (memory->contains(address)) return memory.get();
  }
  return nullptr;
}

std::size_t CudaDevice::num_pageable_bytes() const {
  std::size_t sum = 0;
  for (const auto& memory : host_) sum += memory->num_pageable_bytes();
  return sum;
}

std::size_t CudaDevice::num_ready_bytes() const {
  std::size_t sum = 0;
  for (const auto& memory : host_) sum += memory->num_ready_bytes();
  return sum;
}

// -------------------------------------------------------------------------------------- closing

void CudaDevice::close() {
  if (is_parents()) throw DeviceError("CUDA does not survive fork(): use spawn");
  if (closed_) return;
  try {
    const Guard guard(*this);
    for (const auto& streams : {streams_, callers_}) {
      for (const CudaStream stream : streams) {
        check(runtime_->synchronize(stream), "cudaStreamSynchronize");
      }
    }
  } catch (const DeviceError&) {
    if (lost_.empty()) throw;  // work may be under way
  }
  closed_ = true;
  std::string failed;
  const auto end = [&](int code, const char* call) {
    if (code == CudaRuntime::kSuccess) return;
    std::string& what = is_sticky(code) ? lost_ : failed;
    if (what.empty()) what = error_message(*runtime_, code, call);
    runtime_->clear_error();
  };
  const Guard guard(*this, std::nothrow);
  ring_.reset();
  transfer_ring_.reset();
  while (!staging_.empty()) free_staging(staging_.back().first);
  for (const EventState& state : events_) {
    end(runtime_->destroy_event(state.event), "cudaEventDestroy");
  }
  for (const CudaStream stream : streams_) {
    end(runtime_->destroy_stream(stream), "cudaStreamDestroy");
  }
  streams_.clear();
  events_.clear();
  free_events_.clear();
  if (!failed.empty() && lost_.empty()) throw DeviceError(failed);
}

}  // namespace pagedkv
