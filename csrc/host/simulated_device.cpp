#include "host/simulated_device.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "host/host_memory.h"

namespace pagedkv {

namespace {

// Handles: the device's number in the upper 16 bits; below it a stream's lane, or an event's
// generation (24 bits) and place + 1 (24 bits).
constexpr int kNumberShift = 48;
constexpr int kGenerationShift = 24;
constexpr std::uint64_t kField = (std::uint64_t{1} << 24) - 1;

std::uint64_t next_number() {
  static std::atomic<std::uint64_t> count{0};
  return ++count & 0xffff;
}

const char* const kLost = "the simulated device was lost";

}  // namespace

SimulatedDevice::SimulatedDevice(const SimulatedOptions& options)
    : options_(options),
      number_(next_number()),
      random_state_(options.seed),
      checker_(options.granule_bytes) {
  if (options.num_compute_streams < 1 || options.num_compute_streams >= AccessChecker::kMaxLanes) {
    throw InvalidSpec("num_compute_streams: expected 1 to 15");
  }
  pace_ = std::uint64_t{2} << random(4);
  queues_.reserve(AccessChecker::kMaxLanes);
  for (int i = 0; i < options.num_compute_streams; ++i) add_queue();
}

SimulatedDevice::~SimulatedDevice() {
  for (const HostBlock& block : host_) unmap_host_memory(block.memory, block.bytes);
}

// --- Streams and events

Stream SimulatedDevice::compute_stream() {
  check_usable();
  progress();
  return stream_of(compute_lane_);
}

void SimulatedDevice::use_compute_stream(int index) {
  if (index < 0 || index >= options_.num_compute_streams) {
    throw InvalidSpec("compute stream: no such stream");
  }
  compute_lane_ = index + 1;
}

Stream SimulatedDevice::make_stream() {
  check_usable();
  if (queues_.size() + 1 == AccessChecker::kMaxLanes) throw DeviceError("no stream is left");
  return stream_of(add_queue());
}

int SimulatedDevice::add_queue() {
  queues_.emplace_back().slowness = std::uint64_t{1} << 2 * random(3);
  return static_cast<int>(queues_.size());
}

Stream SimulatedDevice::stream_of(int lane) const {
  return Stream{number_ << kNumberShift | static_cast<std::uint64_t>(lane)};
}

int SimulatedDevice::lane_of(Stream stream) const {
  const auto value = static_cast<std::uint64_t>(stream);
  const std::uint64_t lane = value & kField;
  KV_CHECK(value >> kNumberShift == number_ && lane >= 1 && lane <= queues_.size());
  return static_cast<int>(lane);
}

std::size_t SimulatedDevice::find(Event event) const {
  const auto value = static_cast<std::uint64_t>(event);
  const std::uint64_t place = (value & kField) - 1;
  KV_CHECK(value >> kNumberShift == number_ && place < events_.size());  // of this device
  const EventState& found = events_[place];
  KV_CHECK(found.live && (value >> kGenerationShift & kField) == found.generation);  // not recycled
  return place;
}

void SimulatedDevice::drop(std::size_t event) {
  if (--events_[event].num_users == 0) free_events_.push_back(event);
}

void SimulatedDevice::enqueue(int lane, Work work) {
  if (work.kind == Kind::copy || work.kind == Kind::compute) {
    work.held = std::exchange(hold_next_, false);
  }
  queue(lane).pending.push_back(std::move(work));
  progress();
}

void SimulatedDevice::copy(Stream stream, std::span<const CopyRun> runs) {
  check_usable();
  const int lane = lane_of(stream);
  checker_.submit(lane);
  checker_.copy(lane, runs);
  Work work{.kind = Kind::copy, .fails = copies_to_failure_ > 0 && --copies_to_failure_ == 0};
  std::size_t bytes = 0;
  for (const CopyRun& run : runs) bytes += run.bytes;
  if (work.fails) bytes = options_.schedule == Schedule::random ? random(bytes + 1) : bytes / 2;
  for (const CopyRun& run : runs) {
    const std::size_t part = std::min(run.bytes, bytes);
    if (part > 0) work.runs.push_back({run.target, run.source, part});
    bytes -= part;
  }
  enqueue(lane, std::move(work));
}

void SimulatedDevice::run(Stream stream, std::span<const Access> accesses,
                          std::function<void()> work) {
  check_usable();
  const int lane = lane_of(stream);
  checker_.submit(lane);
  for (const Access& access : accesses) {
    checker_.access(lane, access, access.write ? "compute's write" : "compute's read");
  }
  enqueue(lane, {.kind = Kind::compute, .operation = std::move(work)});
}

Event SimulatedDevice::record(Stream stream) {
  check_usable();
  const int lane = lane_of(stream);
  if (num_events_ == options_.max_events) throw DeviceError("no event is left");
  if (free_events_.empty()) {
    free_events_.push_back(events_.size());
    events_.emplace_back();
  }
  const std::size_t place = free_events_.back();
  free_events_.pop_back();
  checker_.submit(lane);
  EventState& event = events_[place];
  const std::uint64_t generation = event.generation;
  const Queue& of = queue(lane);
  event = {.live = true,
           .generation = generation,
           .num_users = 2,
           .lane = lane,
           .position = of.num_done + of.pending.size() + 1,
           .clock = checker_.clock(lane)};
  ++num_events_;
  enqueue(lane, {.kind = Kind::record, .event = place});
  return Event{number_ << kNumberShift | generation << kGenerationShift | (place + 1)};
}

void SimulatedDevice::fence(Stream stream, Event event, FenceSite site) {
  check_usable();
  const int lane = lane_of(stream);
  const std::size_t place = find(event);
  if (skipped_[static_cast<std::size_t>(site)]) return;
  checker_.submit(lane);
  checker_.join(lane, events_[place].clock);
  ++events_[place].num_users;
  enqueue(lane, {.kind = Kind::fence, .event = place});
}

Status SimulatedDevice::observe(const EventState& event) {
  if (event.status != Status::pending) checker_.join(AccessChecker::kHost, event.clock);
  return event.status;
}

Status SimulatedDevice::poll(Event handle) {
  check_open();
  EventState& event = events_[find(handle)];
  progress();
  if (event.status == Status::pending && ++event.num_polls > options_.max_polls) {
    force(event.lane, event.position);
  }
  return observe(event);
}

Status SimulatedDevice::wait(Event handle) {
  check_open();
  EventState& event = events_[find(handle)];
  progress();
  if (event.status == Status::pending) {
    ++num_host_waits_;
    force(event.lane, event.position);
  }
  return observe(event);
}

std::string SimulatedDevice::failure(Event event) {
  check_open();
  return events_[find(event)].failure;
}

void SimulatedDevice::recycle(Event event) {
  check_open();
  const std::size_t place = find(event);
  EventState& state = events_[place];
  state.live = false;
  state.generation = (state.generation + 1) & kField;
  --num_events_;
  drop(place);
}

// --- The schedule

std::uint64_t SimulatedDevice::random(std::uint64_t below) {  // splitmix64
  std::uint64_t z = random_state_ += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) % below;
}

bool SimulatedDevice::can_run(const Queue& queue) const {
  if (queue.held || queue.pending.empty()) return false;
  const Work& next = queue.pending.front();
  return !next.held && (next.kind != Kind::fence || events_[next.event].status != Status::pending);
}

// A whole copy goes from its last run to its first. A piece comes off either end of any run.
bool SimulatedDevice::copy_piece(Work& work, bool whole) {
  while (!work.runs.empty()) {
    CopyRun& run = whole ? work.runs.back() : work.runs[random(work.runs.size())];
    const std::size_t bytes = whole ? run.bytes : 1 + random(run.bytes);
    run.bytes -= bytes;
    if (whole || random(2) == 0) {
      std::memmove(run.target, run.source, bytes);
      run.target += bytes;
      run.source += bytes;
    } else {
      std::memmove(run.target + run.bytes, run.source + run.bytes, bytes);
    }
    if (run.bytes == 0) {
      run = work.runs.back();
      work.runs.pop_back();
    }
    if (!whole) break;
  }
  return work.runs.empty();
}

void SimulatedDevice::step(Queue& queue, bool whole) {
  if (queue.pending.front().kind == Kind::copy && !copy_piece(queue.pending.front(), whole)) return;
  const Work work = std::move(queue.pending.front());
  queue.pending.pop_front();
  ++queue.num_done;
  switch (work.kind) {
    case Kind::copy:
      if (work.fails) queue.failure = "a copy failed half-way, as it was told to";
      break;
    case Kind::compute: work.operation(); break;
    case Kind::fence: drop(work.event); break;
    case Kind::record: {
      EventState& event = events_[work.event];
      event.status = queue.failure.empty() ? Status::done : Status::failed;
      event.failure = std::exchange(queue.failure, {});
      drop(work.event);
      break;
    }
  }
}

void SimulatedDevice::random_step() {
  Queue& queue = queues_[random(queues_.size())];
  if (can_run(queue) && random(queue.slowness) == 0) step(queue, random(4) == 0);
}

void SimulatedDevice::progress() {
  if (options_.schedule == Schedule::random) {
    for (std::uint64_t n = random(pace_); n > 0; --n) random_step();
  } else if (options_.schedule == Schedule::eager) {
    for (bool ran = true; std::exchange(ran, false);) {
      for (Queue& queue : queues_) {
        for (; can_run(queue); ran = true) step(queue, true);
      }
    }
  }
}

// A fence names an event that was recorded before it, so nothing waits for itself.
void SimulatedDevice::force(int lane, std::uint64_t position) {
  std::vector<std::pair<int, std::uint64_t>> wanted{{lane, position}};
  while (!wanted.empty()) {
    Queue& first = queue(wanted.back().first);
    if (first.num_done >= wanted.back().second) {
      wanted.pop_back();
      continue;
    }
    const Work& next = first.pending.front();
    if (next.kind == Kind::fence && events_[next.event].status == Status::pending) {
      wanted.emplace_back(events_[next.event].lane, events_[next.event].position);
    } else if (options_.schedule == Schedule::random) {
      step(first, random(2) == 0);
      random_step();
    } else {
      step(first, true);
    }
  }
  progress();
}

void SimulatedDevice::synchronize(Stream stream) {
  check_open();
  const int lane = lane_of(stream);
  force(lane, queue(lane).num_done + queue(lane).pending.size());
  checker_.join(AccessChecker::kHost, checker_.clock(lane));
}

void SimulatedDevice::close() {
  if (closed_) return;
  for (int lane = 1; lane <= static_cast<int>(queues_.size()); ++lane) {
    synchronize(stream_of(lane));
  }
  closed_ = true;
}

// --- Memory

std::byte* SimulatedDevice::allocate_host(std::size_t bytes) {
  check_usable();
  if (allocations_to_failure_ > 0 && --allocations_to_failure_ == 0) {
    throw DeviceError("no host memory, as it was told to");
  }
  host_.push_back({map_host_memory(bytes), bytes});
  return host_.back().memory;
}

// What is freed stays mapped, so that a late use of it does no harm but to be reported.
void SimulatedDevice::free_host(std::byte* memory, std::size_t bytes) {
  const auto block = std::find_if(host_.begin(), host_.end(), [&](const HostBlock& b) {
    return b.memory == memory && b.bytes == bytes && !b.freed;
  });
  KV_CHECK(block != host_.end());
  block->freed = true;
  checker_.free({memory, bytes, true});
}

void SimulatedDevice::host_access(const std::byte* begin, std::size_t bytes, bool write) {
  progress();
  checker_.access(AccessChecker::kHost, {begin, bytes, write},
                  write ? "the host's write" : "the host's read");
}

std::size_t SimulatedDevice::host_bytes() const {
  std::size_t sum = 0;
  for (const HostBlock& block : host_) sum += block.freed ? 0 : block.bytes;
  return sum;
}

// --- Faults

void SimulatedDevice::check_open() const {
  if (closed_) throw DeviceError("the simulated device is closed");
}

void SimulatedDevice::check_usable() const {
  check_open();
  if (lost_) throw DeviceError(kLost);
}

void SimulatedDevice::hold(Stream stream, bool held) {
  queue(lane_of(stream)).held = held;
  progress();
}

void SimulatedDevice::hold_next() { hold_next_ = true; }

void SimulatedDevice::fail_copy(int k) { copies_to_failure_ = k; }

void SimulatedDevice::fail_allocate(int k) { allocations_to_failure_ = k; }

void SimulatedDevice::lose() {
  check_open();
  lost_ = true;
  for (Queue& queue : queues_) {
    for (const Work& work : queue.pending) {
      if (work.kind == Kind::record) {
        events_[work.event].status = Status::failed;
        events_[work.event].failure = kLost;
      }
      if (work.kind == Kind::record || work.kind == Kind::fence) drop(work.event);
    }
    queue.num_done += queue.pending.size();
    queue.pending.clear();
  }
}

std::size_t SimulatedDevice::num_pending() const {
  std::size_t sum = 0;
  for (const Queue& queue : queues_) sum += queue.pending.size();
  return sum;
}

}  // namespace pagedkv
