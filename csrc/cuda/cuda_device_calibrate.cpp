// Copying is measured when a cache with a host tier starts, by every method, in both directions.
#include <algorithm>
#include <chrono>
#include <vector>

#include "cuda/cuda_device.h"
#include "cuda/cuda_error.h"
#include "cuda/keep.h"

namespace pagedkv {

// Pieces as a pool in layers has them: apart on the device, neighbours in host memory. The runs are
// sorted by host address.
double CudaDevice::measure(CudaStream stream, std::byte* device, std::byte* host, CopyMethod method,
                           Direction direction, std::size_t piece, std::size_t num_pieces) {
  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < num_pieces; ++i) {
    std::byte* const there = device + 2 * i * piece;
    std::byte* const here = host + i * piece;
    runs.push_back(direction == Direction::out ? CopyRun{here, there, piece}
                                               : CopyRun{there, here, piece});
  }
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int round = 0; round < 3; ++round) {
    const auto begin = Clock::now();
    bool refused = false;
    try {
      copy_by(method, stream, direction, runs);
    } catch (const DeviceError&) {
      if (!lost_.empty()) throw;
      refused = true;  // a method that is refused is not to be had here
    }
    check(runtime_->synchronize(stream), "cudaStreamSynchronize");
    if (refused) return 0;
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return static_cast<double>(num_pieces * piece) / std::max(best, 1e-9);
}

void CudaDevice::calibrate() {
  check_open();
  const std::size_t size = options_.calibration_bytes;
  const Guard guard(*this);
  auto host = std::make_unique<PinnedMemory>(runtime_, options_.index, size,
                                             PinnedOptions{.chunk_bytes = size, .ahead = false});
  host->lock_all();
  void* memory = nullptr;
  const int code = runtime_->allocate(&memory, size);
  if (code == kOutOfMemory) return runtime_->clear_error();  // then nothing is measured
  check(code, "cudaMalloc");
  CudaStream stream = nullptr;
  const auto measured = [&](CopyMethod method, Direction direction, std::size_t piece,
                            std::size_t num_pieces) {
    if (2 * piece * num_pieces > size) return 0.0;
    const bool launches = method == CopyMethod::kernel || method == CopyMethod::staged;
    if (launches && host->num_pageable_bytes() > 0) return 0.0;  // as copy() uses them
    if (method == CopyMethod::staged && staging(stream) == nullptr) return 0.0;
    return measure(stream, static_cast<std::byte*>(memory), host->data(), method, direction, piece,
                   num_pieces);
  };
  const auto give_back = [&] {
    free_staging(stream);
    if (stream != nullptr && runtime_->destroy_stream(stream) != 0) runtime_->clear_error();
    if (runtime_->free(memory) != 0) runtime_->clear_error();
  };
  try {
    check(runtime_->create_stream(&stream), "cudaStreamCreateWithFlags");
    // Clocks and the bus come up to speed first, which would count against what is measured first.
    for (int i = 0; i < 4; ++i) {
      check(runtime_->copy(host->data(), memory, size, stream), "cudaMemcpyAsync");
      check(runtime_->copy(memory, host->data(), size, stream), "cudaMemcpyAsync");
    }
    check(runtime_->synchronize(stream), "cudaStreamSynchronize");
    methods_.calibrate(measured);
  } catch (...) {
    if (stream == nullptr || is_at_rest(stream)) {
      give_back();
    } else {  // copies may be under way: the stream is waited for at the end, its memory stays
      streams_.push_back(stream);
      keep_for_good(std::move(host));
    }
    throw;
  }
  give_back();
}

void CudaDevice::free_staging(CudaStream stream) {
  std::erase_if(staging_, [&](const auto& entry) {
    if (entry.first != stream) return false;
    if (runtime_->free(entry.second) != 0) runtime_->clear_error();
    return true;
  });
}

}  // namespace pagedkv
