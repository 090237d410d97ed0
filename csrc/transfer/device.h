// What a machine must supply so that blocks can move between tiers: streams, copies, events.
//
// A *stream* is a queue: what is enqueued on it runs in that order. Streams run side by side, and
// nothing orders two of them but a fence. An *event* is a point in a stream. The host enqueues and
// goes on; it learns that something has ended from poll() or wait() alone.
//
// The order that every machine keeps:
//   1. copy(s, runs) reads its sources and writes its targets after all that was enqueued on s
//      before it has ended, and before anything enqueued on s later begins. The runs of one call
//      have no order among themselves.
//   2. record(s) is an event that ends when all that was enqueued on s before it has ended. It has
//      failed if a copy on s since the record before it failed, so that whoever ends each piece of
//      its work with a record learns of its own failures, and of nobody else's.
//   3. fence(s, e): what is enqueued on s from now on begins after e has ended, done or failed. The
//      host does not wait, except on a machine whose compute stream is the calling thread.
//   4. Once poll(e) or wait(e) says that e has ended, the host sees all that was written before e,
//      and what the host enqueues afterwards comes after it.
//   5. Nothing else is ordered. A copy may run at once or much later, in pieces, and beside
//      everything that no fence keeps from it.
//
// Memory must stay where it is until an event after its last use has ended. A call that throws has
// enqueued nothing, and says nothing of what was enqueued before, which runs as long as the device
// is_open(). Calls come from one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/error.h"

namespace pagedkv {

enum class Stream : std::uint64_t {};
enum class Event : std::uint64_t { none = 0 };
enum class Status : std::uint8_t { pending, done, failed };

// The machine cannot do what it was asked: no memory, lost, closed, or another process's.
class DeviceError : public Error {
 public:
  using Error::Error;
};

struct CopyRun {
  std::byte* target;
  const std::byte* source;
  std::size_t bytes;
};

// Where the engine asks for a fence. Tests leave one of them out at a time, and must notice.
enum class FenceSite : std::uint8_t {
  transfer_after_compute,   // a transfer begins after the work that was queued when it was made
  transfer_after_transfer,  // and after those in its plan's wait_for
  step_after_transfer,      // a step begins after the transfers in its plan's wait_for
  stream_after_stream,      // a compute stream continues what another one began
};
inline constexpr int kNumFenceSites = 4;

class Device {
 public:
  virtual ~Device() = default;

  // The stream that the caller's own work is queued on now: ask at every call.
  virtual Stream compute_stream() = 0;
  // Whether it is known to be this one, without a question to the machine.
  virtual bool is_on(Stream) const { return false; }
  // A stream for copies, the device's own, until close().
  virtual Stream make_stream() = 0;

  // Makes memory of the host tier ready for these copies, where it is not. copy() does it, too; so
  // the time that it takes can be told from theirs.
  virtual void prepare_memory(std::span<const CopyRun>) {}
  virtual void copy(Stream stream, std::span<const CopyRun> runs) = 0;
  virtual Event record(Stream stream) = 0;
  virtual void fence(Stream stream, Event event, FenceSite site) = 0;

  virtual Status poll(Event event) = 0;          // never blocks
  virtual Status wait(Event event) = 0;          // blocks the host; never says pending
  virtual std::string failure(Event event) = 0;  // why it failed
  virtual void recycle(Event event) = 0;         // fences that name it stay in force
  // From the end of one event to that of a later one of its stream, both ended and not failed.
  // 0: this machine has no clock.
  virtual double seconds_between(Event first, Event second) = 0;

  // Memory of the host tier, zeroed, aligned for any copy. Throws DeviceError if there is none.
  virtual std::byte* allocate_host(std::size_t bytes) = 0;
  virtual void free_host(std::byte* memory, std::size_t bytes) = 0;

  // Waits until all that was enqueued has ended. Afterwards every call throws but this one,
  // free_host(), is_open() and num_host_waits(). If it cannot wait it throws, and stays open.
  virtual void close() = 0;
  // False once it is closed or lost, and in a forked child: then nothing that was enqueued touches
  // this process's memory any more. Whatever else a call throws, it may.
  virtual bool is_open() const = 0;

  // How often a call has blocked the host: wait(), or, where the compute stream is the calling
  // thread, fence().
  virtual std::int64_t num_host_waits() const = 0;
};

}  // namespace pagedkv
