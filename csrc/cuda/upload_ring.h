// Small arrays on their way to the GPU (descriptors, tables, slots): a ring of pinned memory, and
// one of device memory beside it, byte for byte.
//
// A slice belongs to its user until the work that was queued with it has ended: an event says when
// that is, or, if there is none, the end of all that is on its stream. Then its bytes go to the
// next slice. If the ring is full, the host waits for the oldest slice, and counts that; a slice
// larger than the ring makes it grow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>

#include "cuda/pinned_memory.h"
#include "transfer/device.h"

namespace pagedkv {

class CudaDevice;

// Where what goes up begins, in the ring and on the device: at multiples of 64 bytes.
constexpr std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

class UploadRing {
 public:
  UploadRing(CudaDevice& device, std::shared_ptr<CudaRuntime> runtime, std::size_t bytes);
  ~UploadRing();
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  struct Slice {
    std::byte* host;
    std::byte* device;
    std::size_t bytes;
  };

  // fill(host memory) writes `bytes` bytes, which are copied on `stream`; then use(device memory)
  // queues what reads them, on the same stream. If use() throws, the slice is kept until what was
  // queued has ended all the same.
  template <class Fill, class Use>
  void upload(CudaStream stream, std::size_t bytes, Fill&& fill, Use&& use) {
    const Slice slice = reserve(bytes);
    fill(slice.host);
    copy(slice, stream);
    try {
      use(slice.device);
    } catch (...) {
      release(slice, stream);
      throw;
    }
    release(slice, stream);
  }

  // The same, but to device memory of the caller's, which is his to keep.
  template <class Fill>
  void send(CudaStream stream, std::byte* target, std::size_t bytes, Fill&& fill) {
    const Slice slice = reserve(bytes);
    fill(slice.host);
    copy({slice.host, target, bytes}, stream);
    release(slice, stream);
  }

  // Makes the ring so large, so that no upload has to.
  void fit(std::size_t bytes);
  std::size_t capacity() const { return bytes_; }
  std::int64_t num_waits() const { return num_waits_; }

 private:
  struct InUse {
    std::size_t begin;
    std::size_t end;
    Event until;  // none: until the stream has ended
    CudaStream stream;
  };

  Slice reserve(std::size_t bytes);
  void copy(const Slice& slice, CudaStream stream);
  void release(const Slice& slice, CudaStream stream);
  bool overlaps(std::size_t begin, std::size_t end) const;
  void retire(bool wait);  // the oldest, if it has ended
  void allocate(std::size_t bytes);
  void free();

  CudaDevice& device_;
  const std::shared_ptr<CudaRuntime> runtime_;
  std::unique_ptr<PinnedMemory> host_;
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t next_ = 0;
  std::deque<InUse> in_use_;  // the oldest first
  std::int64_t num_waits_ = 0;
};

}  // namespace pagedkv
