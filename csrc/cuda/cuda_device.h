// An NVIDIA GPU as a machine (transfer/device.h): copies on streams of its own, which the legacy
// stream does not wait for, and fences by events.
//
// The caller says which stream his work is queued on, at every call, since CUDA has no word for it:
// torch's current stream, say. Streams here are CUDA's handles themselves. Every call leaves the
// current device of the calling thread as it was. A stream that was the caller's has to live until
// the device is closed: what comes after continues it. While the caller's stream is being captured
// into a graph, no event ends, and compute_stream(), wait() and uploads throw.
//
// An error after which CUDA refuses everything (an illegal address, for one) makes the device lost:
// what was under way counts as failed, every call throws DeviceError, close() works. Any other
// error is of the call alone. A copy of which CUDA refuses a part has failed, once what was queued
// of it has ended. What cannot be waited for at the end is never given back.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cuda/copy_method.h"
#include "cuda/pinned_memory.h"
#include "cuda/runtime.h"
#include "cuda/upload_ring.h"
#include "transfer/device.h"

namespace pagedkv {

// A stream here is CUDA's handle of it.
inline CudaStream cuda(Stream stream) {
  return reinterpret_cast<CudaStream>(static_cast<std::uintptr_t>(stream));
}
inline Stream ours(CudaStream stream) { return Stream{reinterpret_cast<std::uintptr_t>(stream)}; }

struct CudaOptions {
  int index = 0;
  PinnedOptions pinned = {};
  std::size_t ring_bytes = std::size_t{4} << 20;
  std::size_t calibration_bytes = std::size_t{32} << 20;  // on the device; half of it is copied
  std::size_t staging_bytes = std::size_t{16} << 20;      // for each stream that copies through it
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(std::shared_ptr<CudaRuntime> runtime, const CudaOptions& options = {});
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // The stream of the caller's work from now on; nullptr is the legacy default stream. Throws
  // DeviceError if it is another device's.
  void use_stream(CudaStream stream);

  bool is_capturing(CudaStream stream);  // of the caller's, into a graph
  Stream compute_stream() override;
  bool is_on(Stream stream) const override { return is_open() && cuda(stream) == stream_; }
  Stream make_stream() override;
  void prepare_memory(std::span<const CopyRun> runs) override;
  void copy(Stream stream, std::span<const CopyRun> runs) override;
  Event record(Stream stream) override;
  void fence(Stream stream, Event event, FenceSite site) override;
  Status poll(Event event) override;
  Status wait(Event event) override;
  std::string failure(Event event) override;
  void recycle(Event event) override;
  double seconds_between(Event first, Event second) override;
  std::byte* allocate_host(std::size_t bytes) override;
  void free_host(std::byte* memory, std::size_t bytes) override;
  void close() override;
  std::int64_t num_host_waits() const override { return num_host_waits_; }

  // How copies are carried out; see copy_method.h.
  CopyMethods& methods() { return methods_; }
  void calibrate();

  int index() const { return options_.index; }
  std::size_t num_pageable_bytes() const;
  std::size_t num_ready_bytes() const;  // of host memory, no longer to be pinned
  std::size_t num_live_events() const { return events_.size() - free_events_.size(); }

  // For others that queue work on this device's streams. A Guard makes the device current as long
  // as it lives.
  class Guard {
   public:
    explicit Guard(CudaDevice& device);
    Guard(CudaDevice& device, std::nothrow_t);  // to give memory back, on a lost device, too
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    CudaRuntime& runtime_;
    int before_ = 0;
    bool changed_ = false;
  };
  CudaRuntime& runtime() { return *runtime_; }
  UploadRing& ring() { return *ring_; }
  CudaStream stream() const { return stream_; }
  void check(int code, const char* call);  // throws DeviceError; remembers a device that is lost
  void check_open() const;
  void check_not_capturing();
  bool is_parents() const;  // in a forked child, which must not touch CUDA
  bool is_open() const override { return !is_parents() && !closed_ && lost_.empty(); }
  void synchronize(CudaStream stream);
  void synchronize_callers();          // all streams that the caller was on
  bool is_at_rest(CudaStream stream);  // waits; false if CUDA refuses to, so that nobody knows

 private:
  struct EventState {
    CudaEvent event = nullptr;
    std::uint32_t generation = 0;
    bool live = false;
    Status status = Status::pending;
    std::string failure = {};  // of a copy before it
  };

  struct Prepared {
    std::vector<CopyRun> runs;
    Direction direction = Direction::in;
    bool is_pinned = true;  // each of them between the device and pinned host memory
  };

  EventState& find(Event event);
  PinnedMemory* find_host(const std::byte* address) const;
  Prepared prepare(std::span<const CopyRun> runs);
  CopyMethods available_methods();
  bool can_batch(CudaStream stream) const;
  void copy_by(CopyMethod method, CudaStream stream, Direction direction,
               std::span<const CopyRun> sorted);
  void copy_by_batch(CudaStream stream, std::span<const CopyRun> runs);
  void copy_by_kernel(CudaStream stream, std::span<const CopyRun> runs, bool across_bus);
  void copy_by_staging(CudaStream stream, Direction direction, std::span<const CopyRun> sorted);
  std::byte* staging(CudaStream stream);
  void free_staging(CudaStream stream);
  double measure(CudaStream stream, std::byte* device, std::byte* host, CopyMethod method,
                 Direction direction, std::size_t piece, std::size_t num_pieces);
  void note_if_lost(int code, const char* call);  // of a call whose failure is not told
  Status settle(EventState& state, int code, const char* call);

  const std::shared_ptr<CudaRuntime> runtime_;
  const CudaOptions options_;
  const std::int64_t process_;
  CudaStream stream_ = nullptr;
  std::vector<CudaStream> callers_{nullptr};  // that the caller was on since all were waited for
  std::vector<CudaStream> streams_;           // our own
  std::vector<std::pair<CudaStream, void*>> staging_;
  std::map<CudaStream, std::string> broken_;  // a copy on it, which its next record tells
  std::vector<EventState> events_;
  std::vector<std::size_t> free_events_;
  std::vector<std::unique_ptr<PinnedMemory>> host_;
  std::unique_ptr<UploadRing> ring_;           // of steps
  std::unique_ptr<UploadRing> transfer_ring_;  // of transfers, which no step has to wait for
  std::string lost_;                           // why, once it is
  bool closed_ = false;
  std::atomic<std::int64_t> num_host_waits_ = 0;
  CopyMethods methods_;
};

}  // namespace pagedkv
