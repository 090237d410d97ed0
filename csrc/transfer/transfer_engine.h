// Carries out TransferPlans on a Device, and makes everybody wait who has to. Decides nothing.
//
// Life of a transfer:
//   1. submit()   queued, behind all that the caller's stream was given until then
//   2. issued     its copies are on a stream, behind the transfers that its plan waits for; in the
//                 order of submission, and at most max_in_flight at a time, except that one that a
//                 step, or a caller, waits for is issued at once, with all before it
//   3. ended      done, failed or cancelled, and so are all that it waits for: poll() tells it once
//
// Nobody calls back: the owner polls, and tells the manager of each end. Until poll() has told an
// end, step() makes the caller's stream wait for it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "core/mutant.h"
#include "core/plan.h"
#include "transfer/device.h"

namespace pagedkv {

// A contiguous part of every block of the device tier, `block_bytes` at base + block *
// block_stride. The host tier has the same runs, one behind the other in every block.
struct BlockRun {
  std::byte* base;
  std::int64_t block_stride;
  std::int64_t block_bytes;
};

struct EngineOptions {
  std::int32_t num_device_blocks = 0;
  std::int32_t num_host_blocks = 0;
  int max_in_flight = 8;
};

class TransferEngine {
 public:
  struct Ended {
    TransferId id;
    bool failed;         // or cancelled
    std::string why;     // if so
    double seconds = 0;  // that its copies took; 0 where nobody measured
  };

  // Allocates the host tier. Throws DeviceError if its memory cannot be had.
  TransferEngine(std::shared_ptr<Device> device, std::vector<BlockRun> block_runs,
                 const EngineOptions& options);
  // close(). If that is refused, the host tier's memory is left to the device.
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  // A device that refuses makes the transfer fail, which poll() tells like any other failure.
  void submit(const TransferPlan& plan);
  // Before a step's first work is queued: the caller's stream waits for these transfers, and for
  // the stream that it used before. A DeviceError means that it does not, so do not queue the step.
  void step(std::span<const TransferId> wait_for);
  // Within a step, before more of its work is queued: on another stream than before, it continues
  // what was queued there. Each layer asks for it, so has_moved() says, at no cost, whether the
  // stream may be another one.
  void follow();
  bool has_moved() const { return !has_compute_ || !device_->is_on(compute_); }
  std::vector<Ended> poll();
  void wait(TransferId id);    // until it has ended, which poll() tells
  bool cancel(TransferId id);  // false: its copies have begun, or ended
  // Cancels what has not begun, waits for the rest, and gives the host tier back. Throws
  // DeviceError if the device refuses to wait: then the tier stays, and close() may be called
  // again.
  void close();

  bool in_flight(TransferId id) const { return find(id) != nullptr; }
  std::size_t num_in_flight() const { return transfers_.size(); }
  std::size_t num_issued() const;
  std::int64_t host_bytes() const { return static_cast<std::int64_t>(host_bytes_); }
  std::int64_t num_runs() const { return num_runs_; }  // contiguous pieces copied, in all

 private:
  enum class State : std::uint8_t { queued, copying, issued, void_ };
  struct Transfer {
    TransferId id;
    Tier target;
    State state;
    std::vector<TransferId> wait_for;
    std::vector<CopyRun> runs;
    Event behind;  // of the caller's stream at submission; none once issued
    Event begin;   // of its copies; none where the device has no event to spare
    Event end;     // once issued
    std::string why;
  };

  Transfer* find(TransferId id);
  const Transfer* find(TransferId id) const;
  Stream compute_stream();
  Stream stream(Tier target) const { return target == Tier::host ? out_ : in_; }
  std::vector<CopyRun> runs_of(const TransferPlan& plan) const;
  void issue_queued();
  void issue_up_to(TransferId id);
  void issue(Transfer& transfer);
  Event record_if_possible(Stream stream);
  Status await(Event event KV_SITE);
  void fence_behind(Stream stream, std::span<const TransferId> ids, FenceSite site);
  std::vector<const Transfer*> with_what_they_wait_for(std::span<const TransferId> ids) const;
  void make_void(Transfer& transfer, const std::string& why);
  void recycle(Event& event);
  bool has_ended(Transfer& transfer, Ended& ended);
  double seconds_of(const Transfer& transfer);
  void check_open() const;

  std::shared_ptr<Device> device_;
  std::vector<BlockRun> device_runs_;
  std::vector<BlockRun> host_runs_;
  EngineOptions options_;
  std::byte* host_ = nullptr;
  std::size_t host_bytes_ = 0;
  Stream out_{};
  Stream in_{};
  Stream compute_{};
  bool has_compute_ = false;
  std::deque<Transfer> transfers_;  // in flight, by ascending id
  std::int64_t num_runs_ = 0;
  bool closed_ = false;
};

}  // namespace pagedkv
