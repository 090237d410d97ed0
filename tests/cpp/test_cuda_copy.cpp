// Which method copies a transfer, and what copies through staging consist of.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/copy_method.h"
#include "cuda/staging.h"

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
