// Which method copies a transfer, and what copies through staging consist of.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/copy_method.h"
#include "cuda/staging.h"
#include "cuda_world.h"

using namespace pagedkv;

TEST_CASE("the method of copying is the fastest that was measured, unless the caller says which") {
  CopyMethods methods(true);
  const std::vector<CopyRun> small(20, {nullptr, nullptr, 5000}),
      large(8, {nullptr, nullptr, 3 << 20}), many(200, {nullptr, nullptr, 5000});
  const auto choose = [&](Direction direction, std::span<const CopyRun> runs,
                          std::size_t num_host_ranges = 1) {
    return methods.choose(direction, runs, num_host_ranges);
  };
  CHECK(choose(Direction::out, small) == CopyMethod::batch);
  methods.calibrate([](CopyMethod method, Direction direction, std::size_t piece, std::size_t n) {
    if (method == CopyMethod::staged) return n == 128 ? 40e9 : 1e9;
    if (method == CopyMethod::kernel)
      return direction == Direction::out && piece < 65536 ? 30e9 : 1e9;
    return method == CopyMethod::batch ? 20e9 : piece > 65536 ? 25e9 : 2e9;
  });
  CHECK(choose(Direction::out, small) == CopyMethod::kernel);
  CHECK(choose(Direction::in, small) == CopyMethod::batch);
  CHECK(choose(Direction::in, large) == CopyMethod::loop);
  CHECK(choose(Direction::out, {small.data(), 1}) == CopyMethod::loop);
  CHECK(choose(Direction::in, many) == CopyMethod::staged);
  CHECK(choose(Direction::in, many, 100) == CopyMethod::staged);
  CHECK(choose(Direction::in, many, 101) == CopyMethod::batch);  // nearly no neighbours
  CHECK(choose(Direction::out, many, 200) == CopyMethod::kernel);
  methods.rule_out_staging();
  CHECK(choose(Direction::in, many) == CopyMethod::batch);
  CHECK(methods.table().find("kernel") != std::string::npos);
  methods.always(CopyMethod::batch);
  CHECK(choose(Direction::out, large) == CopyMethod::batch);
  methods.always(std::nullopt);
  CHECK(choose(Direction::out, small) == CopyMethod::kernel);

  CopyMethods old(false);
  CHECK(old.choose(Direction::in, small, 1) == CopyMethod::loop);
  CHECK_THROWS_AS(old.always(CopyMethod::batch), InvalidSpec);
  old.calibrate([](CopyMethod method, Direction, std::size_t, std::size_t n) {
    REQUIRE(method != CopyMethod::batch);
    return n > 2 || method != CopyMethod::kernel ? 0 : 1e9;  // what is too much counts as fewer
  });
  CHECK(old.choose(Direction::in, many, 1) == CopyMethod::kernel);
}

TEST_CASE("processors are left to the model, unless copying by them is clearly faster") {
  CopyMethods methods(true);
  const auto measured = [&](double loop, double batch, double kernel, double staged) {
    methods.calibrate([=](CopyMethod method, Direction, std::size_t, std::size_t) {
      return std::array{loop, batch, kernel, staged}[static_cast<std::size_t>(method)];
    });
    const std::vector<CopyRun> runs(16, {nullptr, nullptr, 1 << 20});
    return methods.choose(Direction::out, runs, 1);
  };
  CHECK(measured(25e9, 24e9, 25.5e9, 25.4e9) == CopyMethod::loop);
  CHECK(measured(25e9, 26e9, 25.5e9, 28e9) == CopyMethod::batch);
  CHECK(measured(20e9, 10e9, 23e9, 22e9) == CopyMethod::kernel);
  CHECK(measured(20e9, 10e9, 23e9, 24e9) == CopyMethod::staged);
  CHECK(measured(0, 0, 3e9, 0) == CopyMethod::kernel);
  // Of very many pieces a loop is not to be taken: then what comes next.
  const std::vector<CopyRun> many(1000, {nullptr, nullptr, 1 << 20});
  measured(25e9, 3e9, 0, 24e9);
  CHECK(methods.choose(Direction::out, many, 1) == CopyMethod::staged);
  CHECK(methods.choose(Direction::out, many, 1000) == CopyMethod::batch);
  CHECK_THROWS_AS(CopyMethods(true, false).always(CopyMethod::kernel), InvalidSpec);
}

TEST_CASE("rounds of staging copy every byte once, neighbours of host memory as one") {
  std::mt19937_64 random(5);
  for (int turn = 0; turn < 300; ++turn) {
    const Direction direction = turn % 2 ? Direction::out : Direction::in;
    std::vector<std::byte> host(1000), device(1000), staging(1 + random() % 300 + 15);
    for (auto* memory : {&host, &device}) {
      for (std::byte& b : *memory) b = static_cast<std::byte>(random());
    }
    // Pieces of the device in another order than in host memory, and gaps between some.
    std::vector<CopyRun> runs;
    std::vector<std::size_t> places(10);
    std::iota(places.begin(), places.end(), 0);
    std::ranges::shuffle(places, random);
    for (std::size_t i = 0; i < 10; ++i) {
      if (random() % 4 == 0) continue;
      const std::size_t bytes = random() % 3 ? 100 : 1 + random() % 100;
      std::byte* const here = host.data() + 100 * i;
      std::byte* const there = device.data() + 100 * places[i];
      runs.push_back(direction == Direction::out ? CopyRun{here, there, bytes}
                                                 : CopyRun{there, here, bytes});
    }
    std::vector<std::byte> expected = direction == Direction::out ? host : device;
    std::byte* const base = direction == Direction::out ? host.data() : device.data();
    for (const CopyRun& run : runs) {
      std::copy_n(run.source, run.bytes, expected.begin() + (run.target - base));
    }
    std::ranges::shuffle(runs, random);
    sort_by_host(runs, direction);
    const std::size_t num_ranges = num_host_ranges(runs, direction);
    const auto rounds = staged_rounds(runs, direction, staging.data(), staging.size());
    std::size_t num_across = 0;
    for (const StagedRound& round : rounds) {
      num_across += round.across.size();
      const auto& first = direction == Direction::out ? round.inside : round.across;
      const auto& second = direction == Direction::out ? round.across : round.inside;
      for (const auto* list : {&first, &second}) {
        for (const CopyRun& run : *list) {
          const std::byte* const ends[] = {run.source + run.bytes, run.target + run.bytes};
          for (const std::byte* end : ends) {
            const bool here = end > staging.data() && end <= staging.data() + staging.size();
            const bool elsewhere = (end > host.data() && end <= host.data() + host.size()) ||
                                   (end > device.data() && end <= device.data() + device.size());
            CHECK((here || elsewhere));
          }
          std::copy_n(run.source, run.bytes, run.target);
        }
      }
    }
    CHECK((direction == Direction::out ? host : device) == expected);
    CHECK(num_across >= num_ranges);
    CHECK(num_across < num_ranges + rounds.size());
  }
}

TEST_CASE("where there is no memory for staging, copies go without") {
  CudaWorld w;
  w.device->methods().always(CopyMethod::staged);
  std::byte* const host = w.device->allocate_host(4096);
  std::vector<std::byte> memory(4096, std::byte{7});
  w.runtime->fail("cudaMalloc", kOutOfMemory);
  const Stream stream = w.device->make_stream();
  const std::vector<CopyRun> runs{{host, memory.data() + 1024, 512},
                                  {host + 512, memory.data(), 512}};
  const auto copied = [&] {
    w.device->copy(stream, runs);
    const Event end = w.device->record(stream);
    CHECK(w.device->wait(end) == Status::done);
    w.device->recycle(end);
    return w.runtime->num_calls("transfer_blocks");
  };
  const std::int64_t asked = w.runtime->num_calls("cudaMalloc");
  CHECK(copied() == 0);
  CHECK(copied() == 0);
  CHECK(w.runtime->num_calls("cudaMalloc") == asked);  // once is enough
  CHECK(!w.device->methods().may_stage());
  CHECK(host[1023] == std::byte{7});
  w.device->free_host(host, 4096);
  w.check_nothing_left();
}

TEST_CASE("calibration tries every method in both directions, and gives everything back") {
  for (const bool has_batch : {true, false}) {
    CudaOptions options = kSmall;
    options.staging_bytes = options.calibration_bytes;  // so that a round is enough
    CudaWorld w(Schedule::random, 1, options, has_batch);
    constexpr int kMeasured = 2 * 8 * 3;  // directions, sizes and numbers that fit, rounds
    const std::size_t registered = w.runtime->num_registered_bytes();
    w.device->calibrate();
    CHECK(w.runtime->num_calls("transfer_blocks") == 2 * kMeasured);  // direct, and staged
    CHECK(w.runtime->num_calls("cudaMemcpyBatchAsync") == (has_batch ? kMeasured : 0));
    CHECK(w.runtime->num_registered_bytes() == registered);
    const std::string measured = w.device->methods().table();
    w.runtime->fail("cudaMalloc", kOutOfMemory);
    w.device->calibrate();
    CHECK(w.device->methods().table() == measured);
    w.runtime->fail("cudaMalloc", 801);
    CHECK(contains(message([&] { w.device->calibrate(); }), "cudaMalloc"));
    CHECK(w.runtime->num_registered_bytes() == registered);
    w.check_nothing_left();
  }
}

TEST_CASE("a measurement that breaks off and cannot be waited for keeps its memory") {
  CudaWorld w;
  w.runtime->fail("cudaMemcpyAsync", kOutOfMemory, 2);
  w.runtime->fail("cudaStreamSynchronize", kOutOfMemory);
  const auto num_allocations = w.runtime->num_allocations();
  CHECK(contains(message([&] { w.device->calibrate(); }), "cudaMemcpyAsync"));
  CHECK(w.runtime->machine().num_pending() > 0);
  CHECK(w.runtime->num_allocations() > num_allocations);
  w.device->close();
  CHECK(w.runtime->machine().num_pending() == 0);
}

TEST_CASE("a method that is refused, or cannot reach the memory, is not chosen") {
  CudaWorld w(Schedule::eager);
  w.runtime->fail("cudaMemcpyBatchAsync", 801);
  w.device->calibrate();
  CHECK(contains(w.device->methods().table(), "  0.0"));
  const std::int64_t launches = w.runtime->num_calls("transfer_blocks");
  w.runtime->limit_registered(w.runtime->num_registered_bytes());
  w.device->calibrate();
  CHECK(w.runtime->num_calls("transfer_blocks") == launches);
  CHECK(!contains(w.device->methods().table(), "      kernel"));
  w.runtime->fail("cudaMemcpyAsync", kIllegalAddress);
  CHECK(contains(message([&] { w.device->calibrate(); }), "restart"));
}

TEST_CASE("where the device cannot reach the host, neither kernel nor batch is asked to") {
  auto runtime = std::make_shared<SimulatedRuntime>(SimulatedOptions{.schedule = Schedule::eager});
  runtime->hide_host();
  CudaDevice device(runtime, kSmall);
  CHECK_THROWS_AS(device.methods().always(CopyMethod::kernel), InvalidSpec);
  CHECK_THROWS_AS(device.methods().always(CopyMethod::batch), InvalidSpec);
  device.calibrate();
  CHECK(!contains(device.methods().table(), "kernel  "));  // but staging is inside the device
  device.methods().always(CopyMethod::staged);
  std::byte* const host = device.allocate_host(4096);
  std::vector<std::byte> memory(4096, std::byte{7});
  const Stream stream = device.make_stream();
  device.copy(stream,
              std::vector<CopyRun>{{host, memory.data(), 16}, {host + 64, memory.data() + 64, 16}});
  const Event end = device.record(stream);
  CHECK(device.wait(end) == Status::done);
  CHECK(host[64 + 15] == std::byte{7});
  device.close();
  device.free_host(host, 4096);
}

TEST_CASE("memory that a transfer needs is pinned before its time begins") {
  CudaWorld w;
  std::byte* const host = w.device->allocate_host(3 * 8192);
  std::vector<std::byte> memory(8192);
  const CopyRun run{host + 8000, memory.data(), 1000};
  const auto pinned = [&] { return w.runtime->num_calls("cudaHostRegister"); };
  const std::int64_t before = pinned();
  w.device->prepare_memory({&run, 1});
  CHECK(pinned() == before + 2);
  w.device->copy(w.device->make_stream(), {&run, 1});
  CHECK(pinned() == before + 2);
  w.device->close();
  w.device->free_host(host, 3 * 8192);
}
