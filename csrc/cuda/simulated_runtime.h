// CUDA's runtime on a machine without a GPU: the same calls, carried out by a simulated device
// (host/simulated_device.h), so as late, torn and out of order as what was declared allows.
//
// "Device memory" is host memory. Kernels move their words when their turn comes. Streams of the
// caller are the legacy default stream (nullptr or 1), the per-thread one (2), and what
// create_stream() gives. After a copy that failed (fail_copy() of the machine), or any call that
// was made to return such an error, every call returns it: as CUDA does.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "cuda/runtime.h"
#include "host/simulated_device.h"

namespace pagedkv {

class SimulatedRuntime final : public CudaRuntime {
 public:
  explicit SimulatedRuntime(const SimulatedOptions& options = {}, int num_devices = 1,
                            bool has_batch = true);
  ~SimulatedRuntime() override;

  SimulatedDevice& machine() { return machine_; }
  // The k-th call of this function from now on returns `code`: 1 is the next.
  void fail(const std::string& function, int code, int k = 1);
  // Bytes of host memory that may be pinned.
  void limit_registered(std::size_t bytes) { most_registered_ = bytes; }
  void hide_host() { reaches_host_ = false; }  // pinned memory has other addresses on the device
  // From now on this stream is, or is not, being captured into a graph: to ask for events, to wait
  // and to copy is an error then, although CUDA would make some of it a part of the graph. Kernels
  // run as ever.
  void capture(CudaStream stream, bool capturing);

  Stream lane_of(CudaStream stream) const { return lanes_.at(stream); }  // on the machine
  std::size_t num_streams() const { return streams_.size(); }
  std::size_t num_events() const { return events_.size(); }
  std::size_t num_allocations() const { return allocations_.size(); }
  std::size_t num_registered_bytes() const;
  std::int64_t num_calls(const std::string& function) const;
  // Of calls while this was the current device, but those that ask for it or choose it.
  std::int64_t num_calls_on(int device) const;

  std::string error_text(int code) override;
  void clear_error() override {}
  int get_device(int* device) override;
  int set_device(int device) override;
  int load_kernels() override;
  int create_stream(CudaStream* stream) override;
  int destroy_stream(CudaStream stream) override;
  int synchronize(CudaStream stream) override;
  int device_of(CudaStream stream, int* device) override;
  int is_capturing(CudaStream stream, bool* capturing) override;
  int create_event(CudaEvent* event) override;
  int destroy_event(CudaEvent event) override;
  int record(CudaEvent event, CudaStream stream) override;
  int wait(CudaStream stream, CudaEvent event) override;
  int query(CudaEvent event) override;
  int synchronize(CudaEvent event) override;
  int elapsed(CudaEvent first, CudaEvent second, float* milliseconds) override;
  int copy(void* target, const void* source, std::size_t bytes, CudaStream stream) override;
  bool has_copy_batch() override { return has_batch_; }
  int copy_batch(void** targets, const void** sources, std::size_t* bytes, std::size_t count,
                 CudaStream stream) override;
  int allocate(void** memory, std::size_t bytes) override;
  int free(void* memory) override;
  bool reaches_host() override { return reaches_host_; }
  int register_host(void* memory, std::size_t bytes) override;
  int unregister_host(void* memory) override;
  int launch(const CopyBlocks& kernel, CudaStream stream) override;
  int launch(const ScatterKv& kernel, CudaStream stream) override;
  int launch(const ScatterFp8& kernel, CudaStream stream) override;
  int launch(const GatherKv& kernel, CudaStream stream) override;
  int launch(const TransferBlocks& kernel, CudaStream stream) override;
  int launch(const UpdateTables& kernel, CudaStream stream) override;

 private:
  struct EventState {
    Event recorded = Event::none;
    int device = 0;
  };

  int enter(const char* function);  // 0, or the error that this call is to return
  int enter(const char* function, CudaStream stream);  // which is not being captured
  int observe(Status status);
  bool known(CudaStream stream) const;
  bool can_copy(const void* begin, std::size_t bytes) const;
  template <class Kernel>
  int run(const char* function, const Kernel& kernel, CudaStream stream);
  template <class Work>
  int queue(const char* function, CudaStream stream, Work work);

  mutable std::mutex mutex_;  // of what helper threads reach: failures, counts, registrations
  SimulatedDevice machine_;
  const int num_devices_;
  const bool has_batch_;
  std::map<CudaStream, Stream> lanes_;
  std::map<CudaStream, int> streams_;  // made here, and whose device they are
  std::map<CudaEvent, EventState> events_;
  std::map<void*, std::unique_ptr<std::byte[]>> allocations_;
  std::map<void*, std::size_t> registered_;
  bool reaches_host_ = true;
  std::size_t most_registered_ = ~std::size_t{0};
  std::map<std::string, std::pair<int, int>> failures_;  // function -> calls to go, code
  std::map<std::string, std::int64_t> num_calls_;
  std::map<int, std::int64_t> num_calls_on_;
  std::set<CudaStream> captured_;
  std::uintptr_t next_handle_ = 0x1000;
  int sticky_ = 0;
};

}  // namespace pagedkv
