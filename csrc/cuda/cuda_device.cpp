#include "cuda/cuda_device.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/check.h"
#include "cuda/cuda_error.h"
#include "cuda/kernels.h"

namespace pagedkv {

namespace {

constexpr std::int64_t kMostPieceBytes = std::int64_t{64} << 10;  // of a kernel's work on one run

CudaStream cuda(Stream stream) {
  return reinterpret_cast<CudaStream>(static_cast<std::uintptr_t>(stream));
}

Stream ours(CudaStream stream) { return Stream{reinterpret_cast<std::uintptr_t>(stream)}; }

// Streams that CUDA refuses batched copies on: the legacy default stream, by its two names.
bool is_legacy(CudaStream stream) { return reinterpret_cast<std::uintptr_t>(stream) <= 1; }

}  // namespace

CudaDevice::Guard::Guard(CudaDevice& device) : runtime_(*device.runtime_) {
  device.check(runtime_.get_device(&before_), "cudaGetDevice");
  if (before_ == device.options_.index) return;
  device.check(runtime_.set_device(device.options_.index), "cudaSetDevice");
  changed_ = true;
}

CudaDevice::Guard::~Guard() {
  if (changed_ && runtime_.set_device(before_) != 0) runtime_.clear_error();
}

CudaDevice::CudaDevice(std::shared_ptr<CudaRuntime> runtime, const CudaOptions& options)
    : runtime_(std::move(runtime)),
      options_(options),
      process_(::getpid()),
      methods_(runtime_->has_copy_batch()) {
  const Guard guard(*this);
  ring_ = std::make_unique<UploadRing>(*this, runtime_, options_.ring_bytes);
}

CudaDevice::~CudaDevice() {
  if (process_ != ::getpid()) {  // all of it is the parent's
    for (auto& memory : host_) memory->leave();
    static_cast<void>(ring_.release());
    return;
  }
  try {
    close();
  } catch (const DeviceError&) {  // lost: CUDA has nothing that could be given back
  }
}

void CudaDevice::check(int code, const char* call) {
  if (code == CudaRuntime::kSuccess) return;
  if (is_sticky(code) && lost_.empty()) lost_ = error_message(*runtime_, code, call);
  pagedkv::check(*runtime_, code, call);
}

void CudaDevice::check_open() const {
  if (process_ != ::getpid()) throw DeviceError("CUDA does not survive fork(): use spawn");
  if (closed_) throw DeviceError("the CUDA device is closed");
  if (!lost_.empty()) throw DeviceError("the CUDA device is lost: " + lost_);
}

void CudaDevice::use_stream(CudaStream stream) {
  check_open();
  if (stream == stream_) return;
  const Guard guard(*this);
  int device = options_.index;
  check(runtime_->device_of(stream, &device), "cudaStreamGetDevice");
  if (device != options_.index) {
    throw DeviceError("the current stream is one of device " + std::to_string(device) +
                      ", expected one of device " + std::to_string(options_.index));
  }
  if (std::ranges::find(callers_, stream) == callers_.end()) callers_.push_back(stream);
  stream_ = stream;
}

Stream CudaDevice::compute_stream() {
  check_open();
  return ours(stream_);
}

Stream CudaDevice::make_stream() {
  check_open();
  const Guard guard(*this);
  CudaStream stream = nullptr;
  check(runtime_->create_stream(&stream), "cudaStreamCreateWithFlags");
  streams_.push_back(stream);
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

// -------------------------------------------------------------------------------------- copies

PinnedMemory* CudaDevice::find_host(const std::byte* address) const {
  const auto found =
      std::ranges::find_if(host_, [&](const auto& memory) { return memory->contains(address); });
  return found == host_.end() ? nullptr : found->get();
}

void CudaDevice::copy(Stream stream, std::span<const CopyRun> runs) {
  check_open();
  if (runs.empty()) return;
  const Guard guard(*this);
  Direction direction = Direction::in;
  bool is_ours = true;  // all between the device and locked memory of allocate_host()
  std::vector<CopyRun> pieces;
  for (CopyRun run : runs) {
    PinnedMemory* const target = find_host(run.target);
    PinnedMemory* const source = find_host(run.source);
    if (target != nullptr) target->lock(run.target, run.bytes);
    if (source != nullptr) source->lock(run.source, run.bytes);
    const PinnedMemory* const host = target != nullptr ? target : source;
    is_ours =
        is_ours && (target == nullptr) != (source == nullptr) && host->num_pageable_bytes() == 0;
    direction = target != nullptr ? Direction::out : Direction::in;
    while (run.bytes > 0) {
      std::size_t bytes = run.bytes;
      if (target != nullptr) bytes = std::min(bytes, target->reach(run.target));
      if (source != nullptr) bytes = std::min(bytes, source->reach(run.source));
      pieces.push_back({run.target, run.source, bytes});
      run = {run.target + bytes, run.source + bytes, run.bytes - bytes};
    }
  }
  if (pieces.empty()) return;
  CopyMethod method = is_ours ? methods_.choose(direction, pieces) : CopyMethod::loop;
  if (method == CopyMethod::batch && is_legacy(cuda(stream))) method = CopyMethod::loop;
  try {
    copy_by(method, cuda(stream), pieces);
  } catch (const DeviceError&) {
    // Some of the runs may be under way. Who is told that nothing was enqueued takes their memory
    // for other things, so they have to end first. A lost device runs nothing any more.
    if (lost_.empty() && runtime_->synchronize(cuda(stream)) != 0) runtime_->clear_error();
    throw;
  }
}

void CudaDevice::copy_by(CopyMethod method, CudaStream stream, std::span<const CopyRun> runs) {
  if (method == CopyMethod::kernel) return copy_by_kernel(stream, runs);
  if (method == CopyMethod::loop) {
    for (const CopyRun& run : runs) {
      if (run.bytes == 0) continue;
      check(runtime_->copy(run.target, run.source, run.bytes, stream), "cudaMemcpyAsync");
    }
    return;
  }
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<std::size_t> bytes;
  for (const CopyRun& run : runs) {
    if (run.bytes == 0) continue;
    targets.push_back(run.target);
    sources.push_back(run.source);
    bytes.push_back(run.bytes);
  }
  if (bytes.empty()) return;
  check(runtime_->copy_batch(targets.data(), sources.data(), bytes.data(), bytes.size(), stream),
        "cudaMemcpyBatchAsync");
}

void CudaDevice::copy_by_kernel(CudaStream stream, std::span<const CopyRun> runs) {
  Alignment all;
  std::int64_t largest = 0;
  for (const CopyRun& run : runs) {
    all.with(run.target).with(run.source).with(static_cast<std::int64_t>(run.bytes));
    largest = std::max(largest, static_cast<std::int64_t>(run.bytes));
  }
  const std::int64_t piece_bytes = std::min(largest, kMostPieceBytes);
  std::vector<TransferPiece> pieces;
  for (const CopyRun& run : runs) {
    const auto bytes = static_cast<std::int64_t>(run.bytes);
    for (std::int64_t at = 0; at < bytes; at += piece_bytes) {
      pieces.push_back({run.target + at, run.source + at, std::min(piece_bytes, bytes - at)});
    }
  }
  if (pieces.empty()) return;
  const std::size_t size = pieces.size() * sizeof(TransferPiece);
  ring_->upload(
      stream, size,
      [&](std::byte* host) {
        std::copy_n(reinterpret_cast<const std::byte*>(pieces.data()), size, host);
      },
      [&](std::byte* device) {
        check(runtime_->launch(TransferBlocks::make(reinterpret_cast<const TransferPiece*>(device),
                                                    static_cast<std::int64_t>(pieces.size()),
                                                    piece_bytes, all.word_bytes()),
                               stream),
              "transfer_blocks");
      });
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
  if (code == CudaRuntime::kSuccess) return state.status = Status::done;
  if (lost_.empty()) lost_ = error_message(*runtime_, code, call);
  runtime_->clear_error();
  return state.status = Status::failed;
}

Status CudaDevice::poll(Event event) {
  check_open();
  EventState& state = find(event);
  if (state.status != Status::pending) return state.status;
  const Guard guard(*this);
  const int code = runtime_->query(state.event);
  return code == CudaRuntime::kNotReady ? Status::pending : settle(state, code, "cudaEventQuery");
}

Status CudaDevice::wait(Event event) {
  const Status status = poll(event);
  if (status != Status::pending) return status;
  const Guard guard(*this);
  ++num_host_waits_;
  EventState& state = find(event);
  return settle(state, runtime_->synchronize(state.event), "cudaEventSynchronize");
}

std::string CudaDevice::failure(Event event) {
  if (closed_) check_open();
  return find(event).status == Status::failed ? lost_ : std::string();
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
  if (process_ != ::getpid()) return;
  const auto found =
      std::ranges::find_if(host_, [&](const auto& h) { return h->data() == memory; });
  KV_CHECK(found != host_.end());
  host_.erase(found);
}

std::size_t CudaDevice::num_pageable_bytes() const {
  std::size_t sum = 0;
  for (const auto& memory : host_) sum += memory->num_pageable_bytes();
  return sum;
}

// ---------------------------------------------------------------------------------- calibration

void CudaDevice::calibrate() {
  check_open();
  constexpr std::size_t kBytes = std::size_t{16} << 20;
  const Guard guard(*this);
  PinnedMemory host(runtime_, options_.index, kBytes, {.chunk_bytes = kBytes, .ahead = false});
  host.lock_all();
  void* memory = nullptr;
  check(runtime_->allocate(&memory, kBytes), "cudaMalloc");
  CudaStream stream = nullptr;
  const auto measure = [&](CopyMethod method, Direction direction, std::size_t piece) {
    std::vector<CopyRun> runs;  // every other piece, so that no two are neighbours
    for (std::size_t at = 0; at + piece <= kBytes; at += 2 * piece) {
      std::byte* const there = static_cast<std::byte*>(memory) + at;
      std::byte* const here = host.data() + at;
      runs.push_back(direction == Direction::out ? CopyRun{here, there, piece}
                                                 : CopyRun{there, here, piece});
    }
    double best = 1e9;
    for (int round = 0; round < 3; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      copy_by(method, stream, runs);
      check(runtime_->synchronize(stream), "cudaStreamSynchronize");
      best = std::min(
          best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return static_cast<double>(runs.size() * piece) / std::max(best, 1e-9);
  };
  const auto give_back = [&] {
    if (stream != nullptr && runtime_->destroy_stream(stream) != 0) runtime_->clear_error();
    if (runtime_->free(memory) != 0) runtime_->clear_error();
  };
  try {
    check(runtime_->create_stream(&stream), "cudaStreamCreateWithFlags");
    methods_.calibrate(measure);
  } catch (...) {
    if (stream != nullptr) static_cast<void>(runtime_->synchronize(stream));
    give_back();
    throw;
  }
  give_back();
}

// -------------------------------------------------------------------------------------- closing

void CudaDevice::close() {
  if (process_ != ::getpid()) throw DeviceError("CUDA does not survive fork(): use spawn");
  if (std::exchange(closed_, true)) return;
  std::string failed;
  const auto end = [&](int code, const char* call) {
    if (code == CudaRuntime::kSuccess) return;
    std::string& what = is_sticky(code) ? lost_ : failed;
    if (what.empty()) what = error_message(*runtime_, code, call);
    runtime_->clear_error();
  };
  int before = 0;
  end(runtime_->get_device(&before), "cudaGetDevice");
  end(runtime_->set_device(options_.index), "cudaSetDevice");
  for (const CudaStream stream : streams_) {
    end(runtime_->synchronize(stream), "cudaStreamSynchronize");
  }
  for (const CudaStream stream : callers_) {
    end(runtime_->synchronize(stream), "cudaStreamSynchronize");
  }
  ring_.reset();
  for (const EventState& state : events_) {
    end(runtime_->destroy_event(state.event), "cudaEventDestroy");
  }
  for (const CudaStream stream : streams_) {
    end(runtime_->destroy_stream(stream), "cudaStreamDestroy");
  }
  end(runtime_->set_device(before), "cudaSetDevice");
  streams_.clear();
  events_.clear();
  free_events_.clear();
  if (!failed.empty() && lost_.empty()) throw DeviceError(failed);
}

}  // namespace pagedkv
