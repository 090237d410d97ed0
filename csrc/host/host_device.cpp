#include "host/host_device.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/check.h"
#include "host/host_memory.h"

namespace pagedkv {

namespace {

using Clock = std::chrono::steady_clock;

constexpr Stream kCompute{0};

struct EventState {
  Status status = Status::pending;
  Clock::time_point ended = {};
  std::string failure = {};

  void end(std::string why) {
    status = why.empty() ? Status::done : Status::failed;
    failure = std::move(why);
    ended = Clock::now();
  }
};

enum class Kind { copy, fence, record };

// One entry of a stream. Of a copy, chunks are claimed from the front of its runs on; `runs` itself
// stays as it is while workers read it.
struct Work {
  Kind kind;
  std::shared_ptr<EventState> event = nullptr;  // fence, record
  std::vector<CopyRun> runs = {};
  std::size_t next_run = 0;  // the first byte that is not claimed
  std::size_t next_byte = 0;
  std::size_t unclaimed_bytes = 0;
  std::size_t unfinished_bytes = 0;
};

struct Queue {
  std::deque<Work> pending;  // its entries do not move while others come and go
  std::string failure;       // of a copy since the last record

  bool claimable() const {
    return !pending.empty() && pending.front().kind == Kind::copy &&
           pending.front().unclaimed_bytes > 0;
  }
};

struct Chunk {
  const Work* copy;
  std::size_t run;
  std::size_t byte;
  std::size_t bytes;
};

Chunk claim(Work& copy, std::size_t bytes) {
  bytes = std::min(bytes, copy.unclaimed_bytes);
  const Chunk chunk{&copy, copy.next_run, copy.next_byte, bytes};
  copy.unclaimed_bytes -= bytes;
  for (copy.next_byte += bytes; copy.next_run < copy.runs.size(); ++copy.next_run) {
    const std::size_t run_bytes = copy.runs[copy.next_run].bytes;
    if (copy.next_byte < run_bytes) break;
    copy.next_byte -= run_bytes;
  }
  return chunk;
}

}  // namespace

// Everything that workers touch, under one lock; `events_` and the compute stream are the caller's.
class HostDevice::Workers {
 public:
  explicit Workers(HostOptions options);
  void close();

  Stream make_stream();
  void copy(Stream stream, std::span<const CopyRun> runs);
  Event record(Stream stream);
  void fence(Stream stream, Event event);
  Status poll(Event event);
  Status wait(const std::shared_ptr<EventState>& event);
  const std::shared_ptr<EventState>& find(Event event) const;
  void recycle(Event event) { KV_CHECK(events_.erase(event) == 1); }
  std::string failure(Event event);
  double seconds_between(Event first, Event second);

  bool closed() const { return closed_; }
  std::int64_t num_host_waits() const { return num_host_waits_; }

 private:
  void enqueue(Stream stream, Work work);
  void advance();
  Queue* claimable();
  void run();
  void stop();
  std::string carry_out(Chunk chunk) const;

  const HostOptions options_;
  std::unordered_map<Event, std::shared_ptr<EventState>> events_;
  std::uint64_t num_events_ = 0;
  std::string compute_failure_;
  bool closed_ = false;
  std::atomic<std::int64_t> num_host_waits_ = 0;

  std::mutex mutex_;
  std::condition_variable work_came_;   // or workers shall end
  std::condition_variable work_ended_;  // for the host
  std::deque<Queue> queues_;            // stream i is queue i - 1; none moves
  std::size_t turn_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

HostDevice::Workers::Workers(HostOptions options) : options_(std::move(options)) {
  if (options_.num_workers < 1 || options_.chunk_bytes < 1) {
    throw InvalidSpec("num_workers, chunk_bytes: expected positive numbers");
  }
  const int most = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  try {
    for (int i = 0; i < std::min(options_.num_workers, most); ++i) {
      threads_.emplace_back([this] { run(); });
    }
  } catch (const std::system_error& error) {
    stop();
    throw DeviceError(std::string("no worker thread: ") + error.what());
  }
}

void HostDevice::Workers::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_came_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void HostDevice::Workers::close() {
  if (std::exchange(closed_, true)) return;
  {
    std::unique_lock lock(mutex_);
    work_ended_.wait(lock, [this] {
      return std::ranges::all_of(queues_, [](const Queue& q) { return q.pending.empty(); });
    });
  }
  stop();
}

// --- Workers

Queue* HostDevice::Workers::claimable() {
  for (std::size_t i = 0; i < queues_.size(); ++i) {
    Queue& queue = queues_[(turn_ + i) % queues_.size()];
    if (queue.claimable()) {
      turn_ = (turn_ + i + 1) % queues_.size();
      return &queue;
    }
  }
  return nullptr;
}

void HostDevice::Workers::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    Queue* queue = nullptr;
    work_came_.wait(lock, [&] { return (queue = claimable()) != nullptr || stopping_; });
    if (queue == nullptr) return;
    Work& copy = queue->pending.front();
    const Chunk chunk = claim(copy, options_.chunk_bytes);
    const bool more = std::ranges::any_of(queues_, &Queue::claimable);
    lock.unlock();
    if (more) work_came_.notify_one();
    std::string failure = carry_out(chunk);
    lock.lock();
    if (!failure.empty()) queue->failure = std::move(failure);
    copy.unfinished_bytes -= chunk.bytes;
    if (copy.unfinished_bytes == 0) advance();
  }
}

std::string HostDevice::Workers::carry_out(Chunk chunk) const try {
  for (std::size_t left = chunk.bytes; left > 0; ++chunk.run, chunk.byte = 0) {
    const CopyRun& run = chunk.copy->runs[chunk.run];
    const std::size_t bytes = std::min(left, run.bytes - chunk.byte);
    if (options_.copy) {
      options_.copy(run.target + chunk.byte, run.source + chunk.byte, bytes);
    } else {
      std::memcpy(run.target + chunk.byte, run.source + chunk.byte, bytes);
    }
    left -= bytes;
  }
  return {};
} catch (const std::exception& error) {
  return std::string("a copy failed: ") + error.what();
}

// Takes off what has ended, until only copies and fences that must wait are in front.
void HostDevice::Workers::advance() {
  bool any = false;
  for (bool changed = true; std::exchange(changed, false);) {
    for (Queue& queue : queues_) {
      for (; !queue.pending.empty(); queue.pending.pop_front(), changed = any = true) {
        Work& work = queue.pending.front();
        if (work.kind == Kind::copy && work.unfinished_bytes > 0) break;
        if (work.kind == Kind::fence && work.event->status == Status::pending) break;
        if (work.kind == Kind::record) work.event->end(std::exchange(queue.failure, {}));
      }
    }
  }
  if (std::ranges::any_of(queues_, &Queue::claimable)) work_came_.notify_one();
  if (any) work_ended_.notify_all();
}

// --- The caller's side

Stream HostDevice::Workers::make_stream() {
  const std::lock_guard lock(mutex_);
  queues_.emplace_back();
  return Stream{queues_.size()};
}

void HostDevice::Workers::enqueue(Stream stream, Work work) {
  const std::lock_guard lock(mutex_);
  const auto number = static_cast<std::uint64_t>(stream);
  KV_CHECK(number >= 1 && number <= queues_.size());
  std::deque<Work>& pending = queues_[number - 1].pending;
  pending.push_back(std::move(work));
  if (pending.size() == 1) advance();
}

void HostDevice::Workers::copy(Stream stream, std::span<const CopyRun> runs) {
  Work work{.kind = Kind::copy, .runs = {runs.begin(), runs.end()}};
  for (const CopyRun& run : runs) work.unclaimed_bytes += run.bytes;
  work.unfinished_bytes = work.unclaimed_bytes;
  if (stream == kCompute) {
    std::string failure = carry_out(claim(work, work.unclaimed_bytes));
    if (!failure.empty()) compute_failure_ = std::move(failure);
  } else {
    enqueue(stream, std::move(work));
  }
}

Event HostDevice::Workers::record(Stream stream) {
  const auto event = std::make_shared<EventState>();
  const Event handle{num_events_ + 1};
  const auto place = events_.emplace(handle, event).first;
  try {
    if (stream == kCompute) {
      event->end(std::exchange(compute_failure_, {}));
    } else {
      enqueue(stream, {.kind = Kind::record, .event = event});
    }
  } catch (...) {
    events_.erase(place);
    throw;
  }
  ++num_events_;
  return handle;
}

const std::shared_ptr<EventState>& HostDevice::Workers::find(Event event) const {
  const auto found = events_.find(event);
  KV_CHECK(found != events_.end());
  return found->second;
}

void HostDevice::Workers::fence(Stream stream, Event event) {
  const std::shared_ptr<EventState>& state = find(event);
  if (stream == kCompute) {
    wait(state);
  } else {
    enqueue(stream, {.kind = Kind::fence, .event = state});
  }
}

Status HostDevice::Workers::poll(Event event) {
  const EventState& state = *find(event);
  const std::lock_guard lock(mutex_);
  return state.status;
}

Status HostDevice::Workers::wait(const std::shared_ptr<EventState>& event) {
  std::unique_lock lock(mutex_);
  if (event->status == Status::pending) {
    ++num_host_waits_;
    work_ended_.wait(lock, [&] { return event->status != Status::pending; });
  }
  return event->status;
}

std::string HostDevice::Workers::failure(Event event) {
  const EventState& state = *find(event);
  const std::lock_guard lock(mutex_);
  return state.failure;
}

double HostDevice::Workers::seconds_between(Event first, Event second) {
  const EventState& from = *find(first);
  const EventState& to = *find(second);
  const std::lock_guard lock(mutex_);
  return std::chrono::duration<double>(to.ended - from.ended).count();
}

// --- The device

HostDevice::HostDevice(HostOptions options)
    : process_(::getpid()), workers_(std::make_unique<Workers>(std::move(options))) {}

// A child cannot join threads that it does not have, nor destroy what they may hold.
HostDevice::~HostDevice() {
  if (process_ == ::getpid()) {
    workers_->close();
  } else {
    static_cast<void>(workers_.release());
  }
}

void HostDevice::check_process() const {
  if (process_ != ::getpid()) {
    throw DeviceError("a host device does not survive fork(): its workers are the parent's");
  }
}

HostDevice::Workers& HostDevice::open() const {
  check_process();
  if (workers_->closed()) throw DeviceError("the host device is closed");
  return *workers_;
}

Stream HostDevice::compute_stream() {
  open();
  return kCompute;
}

Stream HostDevice::make_stream() { return open().make_stream(); }

void HostDevice::copy(Stream stream, std::span<const CopyRun> runs) { open().copy(stream, runs); }

Event HostDevice::record(Stream stream) { return open().record(stream); }

void HostDevice::fence(Stream stream, Event event, FenceSite) { open().fence(stream, event); }

Status HostDevice::poll(Event event) { return open().poll(event); }

Status HostDevice::wait(Event event) {
  Workers& workers = open();
  return workers.wait(workers.find(event));
}

std::string HostDevice::failure(Event event) { return open().failure(event); }

void HostDevice::recycle(Event event) { open().recycle(event); }

double HostDevice::seconds_between(Event first, Event second) {
  return open().seconds_between(first, second);
}

std::byte* HostDevice::allocate_host(std::size_t bytes) {
  open();
  return map_host_memory(bytes);
}

void HostDevice::free_host(std::byte* memory, std::size_t bytes) {
  check_process();
  unmap_host_memory(memory, bytes);
}

void HostDevice::close() {
  check_process();
  workers_->close();
}

bool HostDevice::is_open() const { return process_ == ::getpid() && !workers_->closed(); }

std::int64_t HostDevice::num_host_waits() const {
  check_process();
  return workers_->num_host_waits();
}

}  // namespace pagedkv
