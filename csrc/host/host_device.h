// The machine that is this process: memory is host memory, and copies are memcpy on worker threads.
//
// Streams are queues. A copy is handed out in chunks, so that several workers carry out one big
// copy side by side, and takes turns with the copies of other streams. Workers without work sleep.
// The compute stream is the calling thread itself: its copies are done when copy() returns, its
// records have ended at once, and fence() on it blocks until the event has ended.
//
// In a forked child the workers do not exist: every call throws DeviceError, and the destructor
// leaves everything as it is.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "transfer/device.h"

namespace pagedkv {

struct HostOptions {
  int num_workers = 2;  // at most the hardware's threads are started
  std::size_t chunk_bytes = std::size_t{1} << 20;
  // Carries out a copy instead of memcpy; what it throws is why the copy failed.
  std::function<void(std::byte*, const std::byte*, std::size_t)> copy = {};
};

class HostDevice final : public Device {
 public:
  explicit HostDevice(HostOptions options = {});
  ~HostDevice() override;
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;

  Stream compute_stream() override;
  Stream make_stream() override;
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
  bool is_open() const override;
  std::int64_t num_host_waits() const override;

 private:
  class Workers;
  Workers& open() const;
  void check_process() const;

  const std::int64_t process_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace pagedkv
