// A machine in one thread that keeps the contract of transfer/device.h to the letter and no more.
//
// Fault model. Within the contract:
//   - Work starts as late, runs in as odd an order, and copies land in as small pieces from both
//     ends, as the declared order allows. A seed decides; the same calls give the same run.
//   - Any stream, or the next piece of work, can be held back until somebody forces it: wait(),
//     synchronize(), close(), or the work of a forced stream that a fence puts behind it.
//   - An event's handle is reused at once; the old handle is unknown from then on.
// Asked for by a test:
//   - A copy fails and leaves a part of its bytes. Host memory cannot be had. Events run out.
//   - The machine is lost: what was pending never runs and its events fail, new work is refused.
//   - The fences of a site are left out, as if nobody had asked for them.
// It does not: end an event early, write outside a copy's targets, or lose what has ended.
//
// A checker (access_checker.h) judges every access by the declared order alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "host/access_checker.h"
#include "transfer/device.h"

namespace pagedkv {

enum class Schedule : std::uint8_t {
  eager,   // what may run, runs at once
  lazy,    // nothing runs that nobody forces
  random,  // any call of the device may run any work that may run
};

struct SimulatedOptions {
  Schedule schedule = Schedule::random;
  std::uint64_t seed = 0;
  int num_compute_streams = 1;
  std::size_t granule_bytes = 64;  // of the checker: a power of two
  std::size_t max_events = 1 << 20;
  // So often an event may be polled and still be pending; the next poll forces it, so that loops
  // around poll() end under every schedule.
  int max_polls = 64;
};

class SimulatedDevice final : public Device {
 public:
  explicit SimulatedDevice(const SimulatedOptions& options = {});
  ~SimulatedDevice() override;
  SimulatedDevice(const SimulatedDevice&) = delete;
  SimulatedDevice& operator=(const SimulatedDevice&) = delete;

  Stream compute_stream() override;
  Stream make_stream() override;
  void copy(Stream stream, std::span<const CopyRun> runs) override;
  Event record(Stream stream) override;
  void fence(Stream stream, Event event, FenceSite site) override;
  Status poll(Event event) override;
  Status wait(Event event) override;
  std::string failure(Event event) override;
  void recycle(Event event) override;
  double seconds_between(Event, Event) override { return 0; }
  std::byte* allocate_host(std::size_t bytes) override;
  void free_host(std::byte* memory, std::size_t bytes) override;
  void close() override;
  bool is_open() const override { return !closed_ && !lost_; }
  std::int64_t num_host_waits() const override { return num_host_waits_; }

  // The caller's own work: `work` runs when the schedule says, and may touch what `accesses` lists.
  // It must neither throw nor call the device.
  void use_compute_stream(int index);
  void run(Stream stream, std::span<const Access> accesses, std::function<void()> work);
  void synchronize(Stream stream);  // the host waits for this stream; no num_host_waits()
  // The host itself is about to touch memory.
  void host_access(const std::byte* begin, std::size_t bytes, bool write);

  // Faults. `k` counts from now: 1 is the next.
  void hold(Stream stream, bool held = true);  // its work runs only if forced
  void hold_next();                            // so does the next copy or run()
  void fail_copy(int k = 1);
  void fail_allocate(int k = 1);
  void lose();
  void skip(FenceSite site) { skipped_[static_cast<std::size_t>(site)] = true; }

  const std::vector<Violation>& violations() const { return checker_.violations(); }
  std::size_t num_events() const { return num_events_; }  // recorded and not recycled
  std::size_t host_bytes() const;                         // allocated and not freed
  std::size_t num_pending() const;                        // pieces of work that have not ended

 private:
  enum class Kind : std::uint8_t { copy, compute, fence, record };
  struct Work {
    Kind kind;
    bool held = false;
    bool fails = false;
    std::size_t event = 0;                 // fence, record: its place in events_
    std::vector<CopyRun> runs = {};        // copy: what is left of it
    std::function<void()> operation = {};  // compute
  };
  struct Queue {
    std::deque<Work> pending;
    std::uint64_t num_done = 0;
    bool held = false;
    std::uint64_t slowness = 1;  // its work runs in one of so many chances
    std::string failure;         // of a copy since the last record
  };
  // Lives on after recycle() until no work names it.
  struct EventState {
    Status status = Status::pending;
    bool live = false;  // has a handle
    std::uint64_t generation = 0;
    int num_users = 0;  // the handle, its record while pending, fences
    int lane = 0;
    std::uint64_t position = 0;  // ends when the queue has done so much
    int num_polls = 0;
    AccessChecker::Clock clock{};
    std::string failure = {};
  };
  struct HostBlock {
    std::byte* memory;
    std::size_t bytes;
    bool freed = false;
  };

  void check_open() const;
  void check_usable() const;  // open and not lost
  int lane_of(Stream stream) const;
  Stream stream_of(int lane) const;
  Queue& queue(int lane) { return queues_[static_cast<std::size_t>(lane - 1)]; }
  int add_queue();
  std::size_t find(Event event) const;
  Status observe(const EventState& event);
  void drop(std::size_t event);

  void enqueue(int lane, Work work);
  bool can_run(const Queue& queue) const;
  void step(Queue& queue, bool whole);  // runs the first piece of work, or a part of it
  bool copy_piece(Work& work, bool whole);
  void progress();
  void random_step();
  void force(int lane, std::uint64_t position);  // until the queue has done so much
  std::uint64_t random(std::uint64_t below);

  const SimulatedOptions options_;
  const std::uint64_t number_;  // no handle of another device is one of ours
  std::uint64_t random_state_;
  std::uint64_t pace_ = 1;
  AccessChecker checker_;
  std::vector<Queue> queues_;  // compute streams first
  int compute_lane_ = 1;
  std::vector<EventState> events_;
  std::vector<std::size_t> free_events_;
  std::size_t num_events_ = 0;
  std::vector<HostBlock> host_;
  bool skipped_[kNumFenceSites] = {};
  bool hold_next_ = false;
  int copies_to_failure_ = 0;
  int allocations_to_failure_ = 0;
  bool closed_ = false;
  bool lost_ = false;
  std::int64_t num_host_waits_ = 0;
};

}  // namespace pagedkv
