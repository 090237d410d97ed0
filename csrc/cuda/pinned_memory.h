// Host memory that the GPU copies at full speed: mapped at once, and pinned chunk by chunk.
//
// Pinning costs the time of touching all of it, seconds for a large tier, so it is not done
// before somebody waits for it: a helper thread goes through the chunks, in order, and whoever
// needs a chunk before that locks it himself, ahead of the helper. A chunk that the system refuses
// to lock stays pageable: the copies are right, and slower.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/runtime.h"

namespace pagedkv {

struct PinnedOptions {
  std::size_t chunk_bytes = std::size_t{64} << 20;
  int num_touching = 4;  // threads that touch a chunk side by side
  bool ahead = true;     // lock chunks before they are needed, on a helper thread
};

class PinnedMemory {
 public:
  // Throws DeviceError if the system has not so much memory.
  PinnedMemory(std::shared_ptr<CudaRuntime> runtime, int device, std::size_t bytes,
               const PinnedOptions& options = {});
  ~PinnedMemory();  // no copy may be under way
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return memory_; }
  bool contains(const std::byte* address) const {
    return address >= memory_ && address < memory_ + bytes_;
  }
  // Bytes from here to the end of the chunk: CUDA refuses a copy that reaches further, into memory
  // that another call has locked, or none.
  std::size_t left_in_chunk(const std::byte* address) const {
    return options_.chunk_bytes -
           static_cast<std::size_t>(address - memory_) % options_.chunk_bytes;
  }

  // Locks the chunks of this range that are not locked yet. Waits for nothing on the device.
  void lock(const std::byte* begin, std::size_t bytes);
  void lock_all() { lock(memory_, bytes_); }
  std::size_t num_pageable_bytes() const { return pageable_bytes_; }  // that could not be locked
  // Locked, or known not to be, from the beginning on.
  std::size_t num_ready_bytes() const {
    return std::min(num_ready_ * options_.chunk_bytes, bytes_);
  }

 private:
  enum class State : std::uint8_t { mapped, locked, pageable };

  std::size_t num_chunks() const { return states_.size(); }
  std::size_t chunk_size(std::size_t chunk) const;
  void lock_chunk(std::size_t chunk);
  void touch(std::byte* begin, std::size_t bytes) const;
  void run();

  const std::shared_ptr<CudaRuntime> runtime_;
  const int device_;
  const PinnedOptions options_;
  std::byte* const memory_;
  const std::size_t bytes_;
  std::mutex mutex_;                  // of states_, and held while a chunk is locked
  std::atomic<int> num_waiting_ = 0;  // for the mutex: the helper thread lets them go first
  std::vector<State> states_;
  std::atomic<std::size_t> num_ready_ = 0;  // chunks before this are no longer `mapped`
  std::atomic<std::size_t> pageable_bytes_ = 0;
  std::atomic<bool> stopping_ = false;
  std::thread ahead_;
};

}  // namespace pagedkv
