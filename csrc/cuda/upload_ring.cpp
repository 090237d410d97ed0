#include "cuda/upload_ring.h"

#include <algorithm>

#include "cuda/cuda_device.h"

namespace pagedkv {

UploadRing::UploadRing(CudaDevice& device, std::shared_ptr<CudaRuntime> runtime, std::size_t bytes)
    : device_(device), runtime_(std::move(runtime)) {
  allocate(round_up(bytes));
}

UploadRing::~UploadRing() { free(); }

// Replaces the ring, of which no slice is in use any more.
void UploadRing::allocate(std::size_t bytes) {
  auto host = std::make_unique<PinnedMemory>(
      runtime_, device_.index(), bytes,
      PinnedOptions{.chunk_bytes = bytes, .num_touching = 1, .ahead = false});
  host->lock_all();
  void* memory = nullptr;
  device_.check(runtime_->allocate(&memory, bytes), "cudaMalloc");
  free();
  host_ = std::move(host);
  memory_ = memory;
  bytes_ = bytes;
  next_ = 0;
}

void UploadRing::free() {
  if (memory_ != nullptr && runtime_->free(memory_) != 0) runtime_->clear_error();
  memory_ = nullptr;
  bytes_ = 0;
  host_.reset();
}

bool UploadRing::overlaps(std::size_t begin, std::size_t end) const {
  return std::ranges::any_of(in_use_,
                             [&](const InUse& u) { return begin < u.end && u.begin < end; });
}

void UploadRing::retire(bool wait) {
  const InUse& oldest = in_use_.front();
  const bool known = oldest.until != Event::none;
  if (!known || device_.poll(oldest.until) == Status::pending) {
    if (!wait) return;
    ++num_waits_;
    if (known) {
      device_.wait(oldest.until);
    } else {
      device_.synchronize(oldest.stream);
    }
  }
  if (known) device_.recycle(oldest.until);
  in_use_.pop_front();
}

void UploadRing::fit(std::size_t bytes) {
  if (bytes <= bytes_) return;
  while (!in_use_.empty()) retire(true);
  allocate(std::max(round_up(bytes), 2 * bytes_));
}

UploadRing::Slice UploadRing::reserve(std::size_t bytes) {
  device_.check_open();
  device_.check_not_capturing();
  bytes = round_up(bytes);
  fit(bytes);
  if (next_ + bytes > bytes_) next_ = 0;
  while (overlaps(next_, next_ + bytes)) retire(true);
  const Slice slice{host_->data() + next_, static_cast<std::byte*>(memory_) + next_, bytes};
  next_ += bytes;
  return slice;
}

void UploadRing::copy(const Slice& slice, CudaStream stream) {
  device_.check(runtime_->copy(slice.device, slice.host, slice.bytes, stream), "cudaMemcpyAsync");
}

void UploadRing::release(const Slice& slice, CudaStream stream) {
  const auto begin = static_cast<std::size_t>(slice.host - host_->data());
  InUse& use = in_use_.emplace_back(begin, begin + slice.bytes, Event::none, stream);
  use.until = device_.record(ours(stream));
  // Up to two slices retire for each that is added, so that they do not pile up.
  for (int i = 0; i < 2 && in_use_.size() > 1; ++i) {
    const std::size_t before = in_use_.size();
    retire(false);
    if (in_use_.size() == before) break;
  }
}

}  // namespace pagedkv
