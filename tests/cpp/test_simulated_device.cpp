// The simulated device finds the races that are there, and no others; and its faults are as asked.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "core/check.h"
#include "host/simulated_device.h"

using namespace pagedkv;

namespace {

constexpr std::size_t kBytes = 256;
constexpr auto kSite = FenceSite::transfer_after_transfer;

// Buffers of a program, each filled with its own number.
struct Buffers {
  explicit Buffers(int count) : memory(static_cast<std::size_t>(count)) {
    for (int i = 0; i < count; ++i) fill(i, i);
  }
  struct alignas(64) Buffer {
    std::byte bytes[kBytes];
  };
  std::byte* operator[](int i) { return memory[static_cast<std::size_t>(i)].bytes; }
  void fill(int i, int value) { std::memset((*this)[i], value, kBytes); }
  bool holds(int i, int value) {
    return std::all_of((*this)[i], (*this)[i] + kBytes,
                       [&](std::byte b) { return b == static_cast<std::byte>(value); });
  }
  CopyRun run(int target, int source) { return {(*this)[target], (*this)[source], kBytes}; }

  std::vector<Buffer> memory;
};

struct Machine {
  explicit Machine(Schedule schedule, std::uint64_t seed = 0, int num_compute_streams = 1)
      : device({.schedule = schedule, .seed = seed, .num_compute_streams = num_compute_streams}) {}

  void copy(Stream stream, int target, int source) {
    const CopyRun run = buffers.run(target, source);
    device.copy(stream, {&run, 1});
  }
  void read(Stream stream, int buffer) {
    const Access access{buffers[buffer], kBytes, false};
    device.run(stream, {&access, 1}, [] {});
  }
  void write(Stream stream, int buffer, int value) {
    const Access access{buffers[buffer], kBytes, true};
    device.run(stream, {&access, 1}, [this, buffer, value] { buffers.fill(buffer, value); });
  }
  // `later` waits for all that is on `earlier`.
  void order(Stream earlier, Stream later) {
    const Event event = device.record(earlier);
    device.fence(later, event, kSite);
    device.recycle(event);
  }
  std::size_t num_violations() const { return device.violations().size(); }

  Buffers buffers{8};
  SimulatedDevice device;
  Stream compute = device.compute_stream();
  Stream out = device.make_stream();
  Stream in = device.make_stream();
};

constexpr Schedule kSchedules[] = {Schedule::eager, Schedule::lazy, Schedule::random};

}  // namespace

TEST_CASE("a conflict that nothing orders is found under every schedule, and only then") {
  // What each of two streams does to buffer 0, and whether that is a conflict.
  struct Case {
    bool first_writes, second_writes, conflict;
  };
  for (const Schedule schedule : kSchedules) {
    for (const Case c : {Case{false, false, false}, Case{false, true, true},
                         Case{true, false, true}, Case{true, true, true}}) {
      for (const bool ordered : {false, true}) {
        Machine m(schedule);
        c.first_writes ? m.copy(m.out, 0, 1) : m.copy(m.out, 1, 0);
        if (ordered) m.order(m.out, m.in);
        c.second_writes ? m.copy(m.in, 0, 2) : m.copy(m.in, 2, 0);
        CHECK(m.num_violations() == (c.conflict && !ordered));
        for (const Violation& v : m.device.violations()) {
          CHECK(v.earlier == 2);
          CHECK(v.later == 3);
          CHECK(v.address == m.buffers[0]);
          CHECK(v.text.find("not ordered after a") != std::string::npos);
        }
      }
    }
  }
}

TEST_CASE("order is transitive and reaches what the host has been told") {
  for (const Schedule schedule : kSchedules) {
    Machine m(schedule);
    m.copy(m.out, 0, 1);
    m.order(m.out, m.compute);
    m.order(m.compute, m.in);
    m.copy(m.in, 0, 2);
    const Event event = m.device.record(m.in);
    CHECK(m.device.wait(event) == Status::done);
    m.device.host_access(m.buffers[0], kBytes, true);
    m.copy(m.out, 0, 1);
    CHECK(m.num_violations() == 0);
    m.device.host_access(m.buffers[1], 1, false);
    CHECK(m.num_violations() == 0);
    m.device.host_access(m.buffers[0], 1, false);
    CHECK(m.num_violations() == 1);
  }
}

TEST_CASE("a poll that says pending orders nothing") {
  Machine m(Schedule::lazy);
  m.copy(m.out, 0, 1);
  CHECK(m.device.poll(m.device.record(m.out)) == Status::pending);
  m.copy(m.in, 0, 2);
  CHECK(m.num_violations() == 1);
}

TEST_CASE("a write must come after every reader, not only the last") {
  for (const Schedule schedule : kSchedules) {
    Machine m(schedule);
    m.read(m.compute, 0);
    m.copy(m.out, 1, 0);
    m.order(m.out, m.in);
    m.copy(m.in, 0, 2);
    REQUIRE(m.num_violations() == 1);
    CHECK(m.device.violations()[0].earlier == 1);
  }
}

TEST_CASE("a fence covers what was enqueued before its record, and nothing later") {
  Machine m(Schedule::lazy);
  m.copy(m.out, 0, 1);
  const Event event = m.device.record(m.out);
  m.copy(m.out, 2, 3);
  m.device.fence(m.in, event, kSite);
  m.copy(m.in, 4, 0);
  CHECK(m.num_violations() == 0);
  m.copy(m.in, 5, 2);
  CHECK(m.num_violations() == 1);
}

TEST_CASE("runs of one copy must not touch each other") {
  Machine m(Schedule::random);
  const CopyRun chain[] = {m.buffers.run(1, 0), m.buffers.run(2, 1)};
  m.device.copy(m.out, chain);
  CHECK(m.num_violations() == 1);
  const CopyRun fan_out[] = {m.buffers.run(4, 3), m.buffers.run(5, 3)};
  m.device.copy(m.out, fan_out);
  CHECK(m.num_violations() == 1);
  const CopyRun twice[] = {m.buffers.run(6, 3), m.buffers.run(6, 3)};
  m.device.copy(m.out, twice);
  CHECK(m.num_violations() == 2);
  const CopyRun onto_itself = {m.buffers[7] + 1, m.buffers[7], 8};
  m.device.copy(m.out, {&onto_itself, 1});
  CHECK(m.num_violations() == 3);
}

TEST_CASE("freeing memory that pending work touches, and using freed memory, is found") {
  Machine m(Schedule::lazy);
  std::byte* const memory = m.device.allocate_host(kBytes);
  std::byte* const other = m.device.allocate_host(kBytes);
  const CopyRun run{m.buffers[0], memory, kBytes};
  m.device.copy(m.in, {&run, 1});
  m.device.free_host(other, kBytes);
  CHECK(m.num_violations() == 0);
  m.device.free_host(memory, kBytes);
  CHECK(m.num_violations() == 1);
  m.device.copy(m.in, {&run, 1});
  CHECK(m.num_violations() == 2);
  CHECK(m.device.host_bytes() == 0);
}

TEST_CASE("a skipped site orders nothing, in the checker and in the run") {
  Machine m(Schedule::lazy);
  m.device.skip(kSite);
  m.write(m.compute, 0, 77);
  m.order(m.compute, m.out);
  m.copy(m.out, 1, 0);
  CHECK(m.num_violations() == 1);
  m.device.synchronize(m.out);
  CHECK(m.buffers.holds(1, 0));  // read before the write that it should have waited for
  m.device.fence(m.in, m.device.record(m.out), FenceSite::step_after_transfer);
  m.copy(m.in, 2, 1);
  CHECK(m.num_violations() == 1);
}

TEST_CASE("lazily, what is forced last runs last, whatever was enqueued first") {
  Machine m(Schedule::lazy);
  m.write(m.compute, 0, 10);
  m.copy(m.out, 1, 0);
  m.copy(m.in, 2, 1);
  CHECK(m.device.num_pending() == 3);
  for (const Stream stream : {m.in, m.out, m.compute}) m.device.synchronize(stream);
  CHECK(m.buffers.holds(2, 1));
  CHECK(m.buffers.holds(1, 0));
  CHECK(m.buffers.holds(0, 10));
  CHECK(m.num_violations() == 2);
}

TEST_CASE("forcing a stream forces what its fences name, and no more") {
  Machine m(Schedule::lazy);
  m.write(m.compute, 0, 10);
  m.order(m.compute, m.out);
  m.write(m.compute, 7, 70);
  m.copy(m.out, 1, 0);
  m.order(m.out, m.in);
  m.copy(m.in, 2, 1);
  m.device.synchronize(m.in);
  CHECK(m.buffers.holds(2, 10));
  CHECK(m.buffers.holds(7, 7));
  CHECK(m.device.num_host_waits() == 0);
  CHECK(m.device.wait(m.device.record(m.compute)) == Status::done);
  CHECK(m.buffers.holds(7, 70));
  CHECK(m.device.num_host_waits() == 1);
}

TEST_CASE("copies tear, and work of other streams runs in between") {
  int torn = 0, interleaved = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Machine m(Schedule::random, seed);
    m.copy(m.out, 1, 0);
    m.copy(m.in, 1, 2);
    for (int i = 0; i < 20 && m.device.num_pending() > 0; ++i) {
      m.device.compute_stream();
      const auto old = std::count(m.buffers[1], m.buffers[1] + kBytes, std::byte{1});
      torn += old > 0 && old < static_cast<std::ptrdiff_t>(kBytes);
    }
    m.device.close();
    interleaved += !m.buffers.holds(1, 0) && !m.buffers.holds(1, 2);
    CHECK(m.num_violations() == 1);
  }
  CHECK(torn > 50);
  CHECK(interleaved > 20);
}

TEST_CASE("the same seed gives the same run; another seed another") {
  const auto trace = [](std::uint64_t seed) {
    Machine m(Schedule::random, seed);
    std::string states;
    for (int i = 0; i < 12; ++i) {
      m.copy(i % 2 == 0 ? m.out : m.in, i % 4, 4 + i % 3);
      for (int b = 0; b < 4; ++b) {
        states.append(reinterpret_cast<const char*>(m.buffers[b]), kBytes);
      }
    }
    return states;
  };
  CHECK(trace(1) == trace(1));
  CHECK(trace(1) != trace(2));
}

TEST_CASE("held work waits until it is forced, also under an eager schedule") {
  for (const Schedule schedule : kSchedules) {
    Machine m(schedule);
    m.device.hold_next();
    m.copy(m.out, 1, 0);
    m.device.hold(m.in);
    m.copy(m.in, 2, 3);
    m.order(m.out, m.compute);
    const Event last = m.device.record(m.compute);
    for (int i = 0; i < 50; ++i) CHECK(m.device.poll(last) == Status::pending);
    CHECK(m.buffers.holds(1, 1));
    CHECK(m.device.wait(last) == Status::done);
    CHECK(m.buffers.holds(1, 0));
    CHECK(m.buffers.holds(2, 2));
    m.device.hold(m.in, false);
    CHECK((schedule != Schedule::eager || m.buffers.holds(2, 3)));
    m.device.close();
    CHECK(m.buffers.holds(2, 3));
  }
}

TEST_CASE("a loop around poll ends under every schedule") {
  for (const Schedule schedule : kSchedules) {
    Machine m(schedule);
    m.device.hold(m.out);
    m.copy(m.out, 1, 0);
    const Event event = m.device.record(m.out);
    int polls = 1;
    while (m.device.poll(event) == Status::pending) ++polls;
    CHECK(polls == 65);
    CHECK(m.device.num_host_waits() == 0);
  }
}

TEST_CASE("handles are reused, and an old one is unknown") {
  Machine m(Schedule::lazy);
  SimulatedDevice small({.schedule = Schedule::lazy, .max_events = 2});
  const Event first = small.record(small.compute_stream());
  const Event second = small.record(small.compute_stream());
  CHECK_THROWS_AS(small.record(small.compute_stream()), DeviceError);
  CHECK(small.wait(second) == Status::done);
  small.recycle(first);
  CHECK_THROWS_AS(small.poll(first), BrokenInvariant);
  CHECK_THROWS_AS(small.recycle(first), BrokenInvariant);
  const Event third = small.record(small.compute_stream());
  CHECK(third != first);
  CHECK(small.num_events() == 2);
  CHECK_THROWS_AS(small.wait(first), BrokenInvariant);
  CHECK_THROWS_AS(m.device.wait(third), BrokenInvariant);
  CHECK_THROWS_AS(m.device.record(small.compute_stream()), BrokenInvariant);
  CHECK_THROWS_AS(small.poll(Event::none), BrokenInvariant);
}

TEST_CASE("a fence on a recycled event stays in force, though its place is wanted") {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Machine m(seed == 0 ? Schedule::lazy : Schedule::random, seed);
    m.write(m.compute, 0, 10);
    m.order(m.compute, m.out);
    for (int i = 0; i < 3; ++i) m.device.recycle(m.device.record(m.in));
    m.copy(m.out, 1, 0);
    m.device.synchronize(m.out);
    CHECK(m.buffers.holds(1, 10));
    CHECK(m.device.num_events() == 0);
  }
}

TEST_CASE("a copy that fails is torn, and its own record alone says so") {
  for (const Schedule schedule : kSchedules) {
    Machine m(schedule);
    m.device.fail_copy(2);
    m.copy(m.out, 1, 0);
    const Event before = m.device.record(m.out);
    m.copy(m.out, 2, 0);
    const Event of_copy = m.device.record(m.out);
    m.copy(m.out, 3, 0);
    const Event after = m.device.record(m.out);
    CHECK(m.device.wait(after) == Status::done);
    CHECK(m.device.wait(of_copy) == Status::failed);
    CHECK(m.device.failure(of_copy).find("failed") != std::string::npos);
    CHECK(m.device.wait(before) == Status::done);
    CHECK(m.buffers.holds(1, 0));
    CHECK((schedule == Schedule::random || !m.buffers.holds(2, 0)));
    CHECK(m.buffers.holds(3, 0));
    CHECK(m.buffers.holds(0, 0));
  }
}

TEST_CASE("host memory that cannot be had") {
  SimulatedDevice device;
  device.fail_allocate(2);
  std::byte* const memory = device.allocate_host(10);
  CHECK_THROWS_AS(device.allocate_host(10), DeviceError);
  std::byte* const other = device.allocate_host(10);
  CHECK(device.host_bytes() == 20);
  CHECK_THROWS_AS(device.free_host(other, 11), BrokenInvariant);
  device.free_host(memory, 10);
  device.free_host(other, 10);
  CHECK_THROWS_AS(device.free_host(other, 10), BrokenInvariant);
}

TEST_CASE("a lost device ends what was pending as failed, and does nothing more") {
  Machine m(Schedule::lazy);
  m.copy(m.out, 1, 0);
  const Event ended = m.device.record(m.out);
  CHECK(m.device.wait(ended) == Status::done);
  m.copy(m.out, 2, 0);
  m.order(m.out, m.in);
  const Event pending = m.device.record(m.in);
  m.device.lose();
  CHECK(m.device.poll(ended) == Status::done);
  CHECK(m.device.poll(pending) == Status::failed);
  CHECK(m.device.wait(pending) == Status::failed);
  CHECK(m.device.failure(pending).find("lost") != std::string::npos);
  CHECK_THROWS_AS(m.copy(m.out, 3, 0), DeviceError);
  CHECK_THROWS_AS(m.device.record(m.out), DeviceError);
  CHECK_THROWS_AS(m.device.make_stream(), DeviceError);
  CHECK_THROWS_AS(m.device.allocate_host(1), DeviceError);
  m.device.recycle(ended);
  m.device.recycle(pending);
  m.device.close();
  CHECK(m.buffers.holds(1, 0));
  CHECK(m.buffers.holds(2, 2));
}

TEST_CASE("a caller may have several compute streams, which nothing orders") {
  Machine m(Schedule::lazy, 0, 2);
  m.write(m.compute, 0, 10);
  m.device.use_compute_stream(1);
  CHECK(m.device.compute_stream() != m.compute);
  m.read(m.device.compute_stream(), 0);
  CHECK(m.num_violations() == 1);
  m.device.use_compute_stream(0);
  CHECK(m.device.compute_stream() == m.compute);
}

TEST_CASE("impossible options are refused") {
  CHECK_THROWS_AS(SimulatedDevice({.num_compute_streams = 0}), InvalidSpec);
  CHECK_THROWS_AS(SimulatedDevice({.num_compute_streams = 16}), InvalidSpec);
  CHECK_THROWS_AS(SimulatedDevice({.granule_bytes = 48}), InvalidSpec);
}
