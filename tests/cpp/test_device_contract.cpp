// What transfer/device.h promises, for every machine (machines.h).
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "machines.h"
#include "watchdog.h"

using namespace pagedkv;

namespace {

constexpr std::size_t kBytes = 4096;
constexpr auto kSite = FenceSite::transfer_after_transfer;

// A buffer of host memory that the test can look into, and of the device's that it cannot.
template <class Fixture>
struct Bench : Fixture {
  explicit Bench(std::uint64_t number) : Fixture(number), seed(number) {}
  ~Bench() {
    for (std::byte* memory : hosts) this->device().free_host(memory, kBytes);
    if constexpr (requires { this->check_nothing_else(); }) this->check_nothing_else();
  }
  std::byte* host(int value) {
    hosts.push_back(this->device().allocate_host(kBytes));
    std::memset(hosts.back(), value, kBytes);
    return hosts.back();
  }
  std::byte* memory() { return this->device_memory(kBytes); }
  void copy(Stream stream, std::byte* target, const std::byte* source) {
    const CopyRun run{target, source, kBytes};
    this->device().copy(stream, {&run, 1});
  }
  void order(Stream earlier, Stream later) {
    const Event event = this->device().record(earlier);
    this->device().fence(later, event, kSite);
    this->device().recycle(event);
  }
  Status wait(Stream stream) {
    const Event event = this->device().record(stream);
    const Status status = this->device().wait(event);
    this->device().recycle(event);
    return status;
  }
  static bool holds(const std::byte* memory, int value) {
    return std::all_of(memory, memory + kBytes,
                       [&](std::byte b) { return b == static_cast<std::byte>(value); });
  }
  const std::uint64_t seed;
  std::vector<std::byte*> hosts;
};

template <class Fixture, class Test>
void for_each_seed(const Test& test) {
  const Watchdog watchdog(120);
  for (std::uint64_t seed = 0; seed < Fixture::kSeeds; ++seed) {
    CAPTURE(seed);
    Bench<Fixture> bench(seed);
    test(bench, bench.device());
  }
}

}  // namespace

TEST_CASE_TEMPLATE("host memory is zeroed, and refused if there is none", F, KV_MACHINES) {
  for_each_seed<F>([](auto&, Device& device) {
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{100'000}}) {
      std::byte* const memory = device.allocate_host(bytes);
      CHECK(reinterpret_cast<std::uintptr_t>(memory) % 64 == 0);
      CHECK(std::all_of(memory, memory + bytes, [](std::byte b) { return b == std::byte{0}; }));
      std::memset(memory, 1, bytes);
      device.free_host(memory, bytes);
    }
    CHECK_THROWS_AS(device.allocate_host(~std::size_t{0} / 4), DeviceError);
  });
}

TEST_CASE_TEMPLATE("bytes go there and back, in one stream's order", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream stream = device.make_stream();
    std::byte *const a = bench.host(1), *const b = bench.host(2), *const there = bench.memory();
    bench.copy(stream, there, a);
    bench.copy(stream, a, b);
    bench.copy(stream, b, there);
    CHECK(bench.wait(stream) == Status::done);
    CHECK(bench.holds(a, 2));
    CHECK(bench.holds(b, 1));
  });
}

TEST_CASE_TEMPLATE("one call has many runs, of any size, also none", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream stream = device.make_stream();
    std::byte *const from = bench.host(0), *const to = bench.host(0), *const there = bench.memory();
    for (std::size_t i = 0; i < kBytes; ++i) from[i] = static_cast<std::byte>(i * 7 + i / 256);
    std::vector<CopyRun> out, in;
    for (std::size_t at = 0, bytes = 0; at < kBytes; at += bytes, bytes = bytes * 2 + 64) {
      bytes = std::min(bytes, kBytes - at);
      out.push_back({there + at, from + at, bytes});
      in.insert(in.begin(), {to + at, there + at, bytes});
    }
    device.copy(stream, {});
    device.copy(stream, out);
    device.copy(stream, in);
    CHECK(bench.wait(stream) == Status::done);
    CHECK(std::equal(from, from + kBytes, to));
  });
}

TEST_CASE_TEMPLATE("a fence orders two streams, also when its event is recycled", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream one = device.make_stream(), two = device.make_stream();
    std::byte* const there = bench.memory();
    std::vector<std::byte*> from, to;
    for (int i = 0; i < 8; ++i) {
      from.push_back(bench.host(10 + i));
      to.push_back(bench.host(0));
      bench.copy(one, there, from.back());
      bench.order(one, two);
      bench.copy(two, to.back(), there);
      bench.order(two, one);
    }
    CHECK(bench.wait(one) == Status::done);
    for (int i = 0; i < 8; ++i) CHECK(bench.holds(to[static_cast<std::size_t>(i)], 10 + i));
  });
}

TEST_CASE_TEMPLATE("the compute stream takes part like any other", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream out = device.make_stream(), in = device.make_stream();
    std::byte *const a = bench.host(1), *const b = bench.host(2), *const c = bench.host(3);
    std::byte *const x = bench.memory(), *const y = bench.memory();
    bench.copy(device.compute_stream(), x, a);
    bench.order(device.compute_stream(), out);
    bench.copy(out, y, x);
    bench.order(out, device.compute_stream());
    bench.copy(device.compute_stream(), x, b);
    bench.order(device.compute_stream(), in);
    bench.copy(in, c, y);
    CHECK(bench.wait(in) == Status::done);
    CHECK(bench.holds(c, 1));
    bench.copy(in, c, x);
    CHECK(bench.wait(in) == Status::done);
    CHECK(bench.holds(c, 2));
  });
}

TEST_CASE_TEMPLATE("many readers of one source run beside each other", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    std::byte* const source = bench.memory();
    const Stream writer = device.make_stream();
    bench.copy(writer, source, bench.host(1));
    CHECK(bench.wait(writer) == Status::done);
    std::vector<std::byte*> targets;
    std::vector<Event> events;
    for (int i = 0; i < 4; ++i) {
      const Stream reader = device.make_stream();
      targets.push_back(bench.host(0));
      bench.copy(reader, targets.back(), source);
      events.push_back(device.record(reader));
      device.fence(writer, events.back(), kSite);
    }
    bench.copy(writer, source, bench.host(9));
    std::byte* const written = bench.host(0);
    bench.copy(writer, written, source);
    CHECK(bench.wait(writer) == Status::done);
    CHECK(bench.holds(written, 9));
    for (const std::byte* target : targets) CHECK(bench.holds(target, 1));
    for (const Event event : events) {
      CHECK(device.poll(event) == Status::done);
      CHECK(device.failure(event).empty());
      device.recycle(event);
    }
  });
}

TEST_CASE_TEMPLATE("polling ends, waiting for what has ended does not block", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream stream = device.make_stream();
    std::byte *const a = bench.host(1), *const b = bench.host(0);
    bench.copy(stream, b, a);
    const Event event = device.record(stream);
    const Event empty = device.record(device.make_stream());
    while (device.poll(event) == Status::pending) {
    }
    CHECK(bench.holds(b, 1));
    while (device.poll(empty) == Status::pending) {
    }
    CHECK(device.num_host_waits() == 0);
    CHECK(device.wait(event) == Status::done);
    CHECK(device.wait(empty) == Status::done);
    CHECK(device.num_host_waits() == 0);
    device.recycle(event);
    device.recycle(empty);
  });
}

TEST_CASE_TEMPLATE("a clock, if there is one, runs forward along a stream", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream stream = device.make_stream();
    const Event first = device.record(stream);
    bench.copy(stream, bench.host(0), bench.host(1));
    const Event second = device.record(stream);
    device.wait(second);
    device.poll(first);
    CHECK(device.seconds_between(first, first) == 0);
    CHECK(device.seconds_between(first, second) >= 0);
    CHECK(device.seconds_between(first, second) < 100);
    device.recycle(first);
    device.recycle(second);
  });
}

TEST_CASE_TEMPLATE("events may outnumber anything else", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream one = device.make_stream(), two = device.make_stream();
    std::byte* const a = bench.host(1);
    std::byte* const b = bench.host(0);
    for (int i = 0; i < 500; ++i) {
      bench.order(one, two);
      bench.order(two, one);
    }
    bench.copy(one, b, a);
    CHECK(bench.wait(one) == Status::done);
    CHECK(bench.holds(b, 1));
  });
}

TEST_CASE_TEMPLATE("a failed copy fails its record, and nothing else", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    if constexpr (requires { bench.fail_copy(); }) {
      const Stream stream = device.make_stream(), other = device.make_stream();
      std::byte *const a = bench.host(1), *const b = bench.host(0), *const c = bench.host(0);
      for (const Stream on : {stream, device.compute_stream()}) {
        bench.fail_copy();
        bench.copy(on, b, a);
        const Event failed = device.record(on);
        CHECK(device.wait(failed) == Status::failed);
        CHECK_FALSE(device.failure(failed).empty());
        device.fence(other, failed, kSite);
        bench.copy(other, c, a);
        CHECK(bench.wait(other) == Status::done);
        CHECK(bench.holds(c, 1));
        bench.copy(on, b, a);
        CHECK(bench.wait(on) == Status::done);
        CHECK(bench.holds(b, 1));
        CHECK(device.poll(failed) == Status::failed);
        device.recycle(failed);
      }
      CHECK(bench.holds(a, 1));
    }
  });
}

TEST_CASE_TEMPLATE("close ends all work, and closes", F, KV_MACHINES) {
  for_each_seed<F>([](auto& bench, Device& device) {
    const Stream one = device.make_stream(), two = device.make_stream();
    std::byte *const a = bench.host(1), *const b = bench.host(0), *const c = bench.host(0);
    Event event{};
    for (int i = 0; i < 10; ++i) {
      bench.copy(one, b, a);
      bench.order(one, two);
      bench.copy(two, c, b);
      event = device.record(two);
      device.fence(one, event, kSite);
    }
    CHECK(device.is_open());
    device.close();
    device.close();
    CHECK_FALSE(device.is_open());
    CHECK(bench.holds(c, 1));
    CHECK_THROWS_AS(device.compute_stream(), DeviceError);
    CHECK_THROWS_AS(device.make_stream(), DeviceError);
    CHECK_THROWS_AS(device.copy(one, {}), DeviceError);
    CHECK_THROWS_AS(device.record(one), DeviceError);
    CHECK_THROWS_AS(device.fence(one, event, kSite), DeviceError);
    CHECK_THROWS_AS(device.poll(event), DeviceError);
    CHECK_THROWS_AS(device.wait(event), DeviceError);
    CHECK_THROWS_AS(device.failure(event), DeviceError);
    CHECK_THROWS_AS(device.recycle(event), DeviceError);
    CHECK_THROWS_AS(device.allocate_host(1), DeviceError);
  });
}

// Copies between buffers, every other one the device's, on three streams. Each is fenced behind the
// last writer and all readers of its target, and behind the last writer of its source; then the
// machine must do what a machine that does one thing after the other would.
TEST_CASE_TEMPLATE("random programs give what their declared order says", F, KV_MACHINES) {
  constexpr std::size_t kBuffers = 6;
  for_each_seed<F>([](auto& bench, Device& device) {
    std::mt19937 random(static_cast<unsigned>(bench.seed));
    const std::array<Stream, 3> streams{device.make_stream(), device.make_stream(),
                                        device.compute_stream()};
    std::array<std::byte*, kBuffers> buffers;
    std::array<int, kBuffers> model;
    std::array<std::vector<Event>, kBuffers> writers, readers;
    for (std::size_t i = 0; i < kBuffers; ++i) {
      std::byte* const first = bench.host(model[i] = static_cast<int>(i));
      buffers[i] = i % 2 == 0 ? first : bench.memory();
      if (i % 2 == 1) bench.copy(streams[0], buffers[i], first);
    }
    CHECK(bench.wait(streams[0]) == Status::done);
    for (int i = 0; i < 60; ++i) {
      const Stream stream = streams[random() % 3];
      const std::size_t source = random() % kBuffers;
      const std::size_t target = (source + 1 + random() % (kBuffers - 1)) % kBuffers;
      for (const auto& events : {writers[source], writers[target], readers[target]}) {
        for (const Event event : events) device.fence(stream, event, kSite);
      }
      bench.copy(stream, buffers[target], buffers[source]);
      model[target] = model[source];
      writers[target].assign({device.record(stream)});
      readers[target].clear();
      readers[source].push_back(writers[target].front());
    }
    for (const Stream stream : streams) CHECK(bench.wait(stream) == Status::done);
    for (std::size_t i = 0; i < kBuffers; ++i) {
      std::byte* const last = bench.host(0);
      bench.copy(streams[0], last, buffers[i]);
      CHECK(bench.wait(streams[0]) == Status::done);
      CHECK(bench.holds(last, model[i]));
    }
  });
}
