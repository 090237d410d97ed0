#include "cuda/pinned_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <system_error>

#include "host/host_memory.h"

namespace pagedkv {

namespace {
constexpr std::size_t kOsPage = 4096;

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not have

// No OS page is in two registrations.
PinnedOptions in_os_pages(PinnedOptions options) {
  options.chunk_bytes = (std::max(options.chunk_bytes, kOsPage) + kOsPage - 1) / kOsPage * kOsPage;
  return options;
}

}  // namespace

PinnedMemory::PinnedMemory(std::shared_ptr<CudaRuntime> runtime, int device, std::size_t bytes,
                           const PinnedOptions& options)
    : runtime_(std::move(runtime)),
      device_(device),
      options_(in_os_pages(options)),
      memory_(map_host_memory(bytes)),
      bytes_(bytes),
      states_((bytes + options_.chunk_bytes - 1) / options_.chunk_bytes, State::mapped) {
  // A child that is forked takes no copy, which would move what the GPU reads to another place.
  if (bytes_ > 0) static_cast<void>(::madvise(memory_, bytes_, MADV_DONTFORK));
  if (!options_.ahead || states_.empty()) return;
  try {
    ahead_ = std::thread([this] { run(); });
  } catch (const std::system_error&) {  // no thread to be had: chunks are locked when needed
  }
}

PinnedMemory::~PinnedMemory() {
  stopping_ = true;
  if (ahead_.joinable()) ahead_.join();
  for (std::size_t chunk = 0; chunk < num_chunks(); ++chunk) {
    if (states_[chunk] != State::locked) continue;
    if (runtime_->unregister_host(memory_ + chunk * options_.chunk_bytes) != 0) {
      runtime_->clear_error();
    }
  }
  unmap_host_memory(memory_, bytes_);
}

std::size_t PinnedMemory::chunk_size(std::size_t chunk) const {
  return std::min(options_.chunk_bytes, bytes_ - chunk * options_.chunk_bytes);
}

void PinnedMemory::run() {
  if (runtime_->set_device(device_) != CudaRuntime::kSuccess) {  // this thread's is the first one
    return runtime_->clear_error();
  }
  for (std::size_t chunk = 0; chunk < num_chunks() && !stopping_; ++chunk) {
    while (num_waiting_ > 0) std::this_thread::yield();
    const std::lock_guard guard(mutex_);
    lock_chunk(chunk);
  }
}

void PinnedMemory::lock(const std::byte* begin, std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t first = static_cast<std::size_t>(begin - memory_) / options_.chunk_bytes;
  const std::size_t last =
      (static_cast<std::size_t>(begin - memory_) + bytes - 1) / options_.chunk_bytes;
  if (last < num_ready_.load(std::memory_order_acquire)) return;
  ++num_waiting_;
  const std::lock_guard guard(mutex_);
  --num_waiting_;
  for (std::size_t chunk = first; chunk <= last; ++chunk) lock_chunk(chunk);
}

void PinnedMemory::lock_chunk(std::size_t chunk) {
  if (states_[chunk] == State::mapped) {
    std::byte* const begin = memory_ + chunk * options_.chunk_bytes;
    touch(begin, chunk_size(chunk));
    if (runtime_->register_host(begin, chunk_size(chunk)) == CudaRuntime::kSuccess) {
      states_[chunk] = State::locked;
    } else {
      runtime_->clear_error();
      states_[chunk] = State::pageable;
      pageable_bytes_ += chunk_size(chunk);
    }
  }
  std::size_t ready = num_ready_.load(std::memory_order_relaxed);
  while (ready < num_chunks() && states_[ready] != State::mapped) ++ready;
  num_ready_.store(ready, std::memory_order_release);
}

// The first write to an OS page makes the system find memory for it, which is what takes the time.
// It must change nothing, and be atomic, since others may have written there before.
void PinnedMemory::touch(std::byte* begin, std::size_t bytes) const {
  const auto touch_part = [](std::byte* at, const std::byte* end) {
    const auto size = static_cast<std::size_t>(end - at);
    if (::madvise(at, size, kPopulateWrite) == 0) return;  // since Linux 5.14
    for (; at < end; at += kOsPage) {
      std::atomic_ref(reinterpret_cast<unsigned char&>(*at)).fetch_or(0, std::memory_order_relaxed);
    }
  };
  const std::size_t parts = static_cast<std::size_t>(std::max(options_.num_touching, 1));
  const std::size_t part = (bytes / parts + kOsPage) / kOsPage * kOsPage;
  std::vector<std::jthread> threads;
  std::size_t at = part;
  try {
    for (; at < bytes; at += part) {
      threads.emplace_back(touch_part, begin + at, begin + std::min(at + part, bytes));
    }
  } catch (const std::system_error&) {  // no more threads to be had
    touch_part(begin + at, begin + bytes);
  }
  touch_part(begin, begin + std::min(part, bytes));
}

}  // namespace pagedkv
