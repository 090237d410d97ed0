// The host device: copies really run beside the caller and beside each other, and end as they must.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/check.h"
#include "host/host_device.h"
#include "watchdog.h"

using namespace pagedkv;

namespace {

constexpr auto kSite = FenceSite::transfer_after_transfer;

// Copies stop here until it is opened, and are counted.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    ++num_arrived_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait_for(int count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_arrived_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int num_arrived_ = 0;
  bool open_ = false;
};

HostOptions through(Gate& gate) {
  return {.chunk_bytes = 100,
          .copy = [&](std::byte* target, const std::byte* source, std::size_t bytes) {
            gate.pass();
            std::memcpy(target, source, bytes);
          }};
}

void copy(Device& device, Stream stream, std::vector<std::byte>& to,
          const std::vector<std::byte>& from) {
  const CopyRun run{to.data(), from.data(), from.size()};
  device.copy(stream, {&run, 1});
}

const bool kTwoThreads = std::thread::hardware_concurrency() >= 2;

}  // namespace

TEST_CASE("copies run beside the caller") {
  const Watchdog watchdog(60);
  Gate gate;
  HostDevice device(through(gate));
  const std::vector<std::byte> from(50, std::byte{7});
  std::vector<std::byte> to(50);
  const Stream stream = device.make_stream();
  copy(device, stream, to, from);
  const Event event = device.record(stream);
  CHECK(device.poll(event) == Status::pending);
  const Event own = device.record(device.compute_stream());
  CHECK(device.wait(own) == Status::done);
  device.fence(device.compute_stream(), own, kSite);
  CHECK(device.num_host_waits() == 0);
  std::thread opener([&] {
    gate.wait_for(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    gate.open();
  });
  device.fence(device.compute_stream(), event, kSite);
  CHECK(device.num_host_waits() == 1);
  CHECK(to == from);
  opener.join();
}

TEST_CASE("independent streams overlap, and so do the chunks of one copy") {
  if (!kTwoThreads) return;
  const Watchdog watchdog(60);
  for (const bool one_stream : {false, true}) {
    Gate gate;
    HostDevice device(through(gate));
    const std::vector<std::byte> from(one_stream ? 200 : 50, std::byte{7});
    std::vector<std::byte> to(from.size()), other(from.size());
    const Stream one = device.make_stream(), two = device.make_stream();
    copy(device, one, to, from);
    if (!one_stream) copy(device, two, other, from);
    gate.wait_for(2);
    gate.open();
    CHECK(device.wait(device.record(one)) == Status::done);
    CHECK(device.wait(device.record(two)) == Status::done);
    CHECK(to == from);
    CHECK((one_stream || other == from));
  }
}

TEST_CASE("a slow copy holds up its own stream and what is fenced behind it, nothing else") {
  if (!kTwoThreads) return;
  const Watchdog watchdog(60);
  Gate gate;
  const std::vector<std::byte> slow(50), quick(60);
  std::vector<std::byte> to(50), behind(60), beside(60);
  HostDevice device({.copy = [&](std::byte* target, const std::byte* source, std::size_t bytes) {
    if (source == slow.data()) gate.pass();
    std::memcpy(target, source, bytes);
  }});
  const Stream one = device.make_stream(), two = device.make_stream();
  copy(device, one, to, slow);
  const Event event = device.record(one);
  copy(device, one, behind, quick);
  const Event last = device.record(one);
  copy(device, two, beside, quick);
  CHECK(device.wait(device.record(two)) == Status::done);
  device.fence(two, event, kSite);
  const Event fenced = device.record(two);
  for (const Event e : {event, last, fenced}) CHECK(device.poll(e) == Status::pending);
  gate.open();
  for (const Event e : {fenced, last}) CHECK(device.wait(e) == Status::done);
}

TEST_CASE("streams take turns: a small copy does not wait for all of another stream's big one") {
  const Watchdog watchdog(60);
  Gate gate;
  const std::vector<std::byte> big(1000), small(50);
  std::vector<std::byte> to(1000), other(50);
  std::vector<bool> was_small;  // by the one worker
  HostDevice device({.num_workers = 1,
                     .chunk_bytes = 100,
                     .copy = [&](std::byte*, const std::byte* source, std::size_t) {
                       gate.pass();
                       was_small.push_back(source == small.data());
                     }});
  const Stream one = device.make_stream(), two = device.make_stream();
  copy(device, one, to, big);
  gate.wait_for(1);
  copy(device, two, other, small);
  gate.open();
  device.close();
  REQUIRE(was_small.size() == 11);
  CHECK(was_small[1]);
}

TEST_CASE("a failed chunk fails the record behind it, and says why") {
  const Watchdog watchdog(60);
  const std::vector<std::byte> from(1000);
  std::vector<std::byte> to(1000);
  HostDevice device(
      {.chunk_bytes = 100, .copy = [&](std::byte* target, const std::byte*, std::size_t) {
         if (target == to.data() + 500) throw std::runtime_error("bad chunk");
       }});
  const Stream stream = device.make_stream();
  copy(device, stream, to, from);
  const Event event = device.record(stream);
  CHECK(device.wait(event) == Status::failed);
  CHECK(device.failure(event) == "a copy failed: bad chunk");
  CHECK(device.wait(device.record(stream)) == Status::done);
}

TEST_CASE("closing under load ends the work; so does the destructor") {
  const Watchdog watchdog(60);
  const std::vector<std::byte> from(1 << 20, std::byte{5});
  for (const bool by_close : {true, false}) {
    std::vector<std::byte> to(from.size()), next(from.size());
    {
      HostDevice device({.chunk_bytes = 1 << 12});
      const Stream one = device.make_stream(), two = device.make_stream();
      for (int i = 0; i < 20; ++i) {
        copy(device, one, to, from);
        device.fence(two, device.record(one), kSite);
        copy(device, two, next, to);
        device.fence(one, device.record(two), kSite);
      }
      if (by_close) device.close();
    }
    CHECK(next == from);
  }
}

TEST_CASE("devices come and go without work") {
  const Watchdog watchdog(60);
  for (int i = 0; i < 50; ++i) HostDevice device;
  CHECK_THROWS_AS(HostDevice({.num_workers = 0}), InvalidSpec);
  CHECK_THROWS_AS(HostDevice({.chunk_bytes = 0}), InvalidSpec);
}

TEST_CASE("handles that were recycled or never made are unknown") {
  HostDevice device;
  const Event event = device.record(device.compute_stream());
  device.recycle(event);
  CHECK_THROWS_AS(device.recycle(event), BrokenInvariant);
  CHECK_THROWS_AS(device.poll(event), BrokenInvariant);
  CHECK_THROWS_AS(device.wait(Event::none), BrokenInvariant);
  CHECK_THROWS_AS(device.record(Stream{1}), BrokenInvariant);
}

TEST_CASE("events are recycled while other streams' workers wait for them") {
  const Watchdog watchdog(60);
  constexpr std::size_t kHops = 4, kLanes = 8, kBytes = 300;
  struct Lane {
    std::vector<std::vector<std::byte>> stages;
    Event end = Event::none;
  };
  std::vector<Lane> lanes(
      kLanes, {std::vector<std::vector<std::byte>>(kHops + 1, std::vector<std::byte>(kBytes))});
  HostDevice device({.num_workers = 4, .chunk_bytes = 100});
  std::vector<Stream> streams;
  for (std::size_t s = 0; s < kHops; ++s) streams.push_back(device.make_stream());
  int num_wrong = 0;
  for (std::size_t round = 0; round < 2000; ++round) {
    auto& [stages, end] = lanes[round % kLanes];
    if (end != Event::none) {
      device.wait(end);
      device.recycle(end);
      num_wrong += stages.back() != stages.front();
    }
    std::ranges::fill(stages.front(), static_cast<std::byte>(round));
    for (std::size_t hop = 0; hop < kHops; ++hop) {  // each on another stream than the one before
      const Stream stream = streams[(round + hop) % kHops];
      if (hop > 0) {
        device.fence(stream, end, kSite);
        device.recycle(end);  // the fence alone keeps it now
      }
      copy(device, stream, stages[hop + 1], stages[hop]);
      end = device.record(stream);
    }
  }
  device.close();
  for (const Lane& lane : lanes) num_wrong += lane.stages.back() != lane.stages.front();
  CHECK(num_wrong == 0);
}

TEST_CASE("a forked child has no workers: calls throw, and it ends") {
  const Watchdog watchdog(60);
  Gate gate;
  auto device = std::make_unique<HostDevice>(through(gate));
  const std::vector<std::byte> from(150, std::byte{3});
  std::vector<std::byte> to(150);
  const Stream stream = device->make_stream();
  copy(*device, stream, to, from);
  gate.wait_for(1);  // so that a worker is in the midst of it
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);  // alarms are not inherited
    int num_refused = 0;
    const auto refused = [&](auto call) {
      try {
        call();
      } catch (const DeviceError& error) {
        num_refused += std::strstr(error.what(), "fork") != nullptr;
      }
    };
    refused([&] { device->make_stream(); });
    refused([&] { device->copy(stream, {}); });
    refused([&] { device->record(stream); });
    refused([&] { device->allocate_host(1); });
    refused([&] { device->close(); });
    device.reset();
    ::_exit(num_refused == 5 ? 0 : 1);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  gate.open();
  CHECK(device->wait(device->record(stream)) == Status::done);
  CHECK(to == from);
}

// kv_tests --no-skip --test-case="benchmark: host*". Needs 1 GiB.
TEST_CASE("benchmark: host device against threads that call memcpy" * doctest::skip()) {
  constexpr std::size_t kBlocks = 256, kBlock = std::size_t{2} << 20, kThreads = 2;
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point since) {
    return std::chrono::duration<double>(Clock::now() - since).count();
  };
  HostDevice device;
  std::byte* const near = device.allocate_host(kBlocks * kBlock);
  std::byte* const far = device.allocate_host(kBlocks * kBlock);
  std::memset(near, 1, kBlocks * kBlock);
  std::memset(far, 2, kBlocks * kBlock);
  const Stream out = device.make_stream(), in = device.make_stream();
  std::vector<CopyRun> runs_out, runs_in;
  for (std::size_t i = 0; i < kBlocks; ++i) {
    runs_out.push_back({far + i * kBlock, near + i * kBlock, kBlock});
    runs_in.push_back({near + i * kBlock, far + i * kBlock, kBlock});
  }
  std::vector<double> plain, ours;
  for (int repeat = 0; repeat < 7; ++repeat) {
    auto start = Clock::now();
    for (const auto* runs : {&runs_out, &runs_in}) {
      std::vector<std::thread> threads;
      for (std::size_t t = 0; t < kThreads; ++t) {
        threads.emplace_back([=] {
          for (std::size_t i = t; i < kBlocks; i += kThreads) {
            std::memcpy((*runs)[i].target, (*runs)[i].source, kBlock);
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
    plain.push_back(seconds(start));
    start = Clock::now();
    device.copy(out, runs_out);
    device.fence(in, device.record(out), kSite);
    device.copy(in, runs_in);
    CHECK(device.wait(device.record(in)) == Status::done);
    ours.push_back(seconds(start));
  }
  std::ranges::sort(plain);
  std::ranges::sort(ours);
  const double gib = 2.0 * kBlocks * kBlock / (1 << 30);
  std::printf("host device %.2f GiB/s, plain memcpy %.2f GiB/s, ratio of medians %.2f\n",
              gib / ours[3], gib / plain[3], plain[3] / ours[3]);
  device.free_host(near, kBlocks * kBlock);
  device.free_host(far, kBlocks * kBlock);
}
