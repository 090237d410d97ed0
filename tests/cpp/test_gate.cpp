#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "bindings/gate.h"
#include "core/block_tree.h"

using namespace pagedkv;

TEST_CASE("a count that underflows is a defect, and poisons what it was met in") {
  Gate gate;
  BlockTree tree(4, 0, 2, 0);
  const NodeId node = tree.add(tree.anonymous_root(), Tier::device);
  gate.enter([&] { tree.unref(node, Tier::device, Leave::hot); });
  CHECK_THROWS_AS(gate.enter([&] { tree.unref(node, Tier::device, Leave::hot); }), BrokenInvariant);
  bool entered = false;
  CHECK_THROWS_AS(gate.enter([&] { entered = true; }), Poisoned);
  CHECK_THROWS_WITH(gate.enter([&] { entered = true; }), doctest::Contains("refuses further use"));
  CHECK(!entered);
}

TEST_CASE("what operation brings poisons nothing") {
  Gate gate;
  CHECK_THROWS_AS(gate.enter([] { throw InvalidSpec("no"); }), InvalidSpec);
  CHECK(gate.enter([] { return 7; }) == 7);
}

TEST_CASE("one at a time: the others meet ConcurrentUse, and so does who enters twice") {
  Gate gate;
  CHECK_THROWS_AS(gate.enter([&] { gate.enter([] {}); }), ConcurrentUse);
  std::int64_t sum = 0;  // for TSan: only who is inside touches it
  std::atomic<std::int64_t> entered = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20'000; ++i) {
        try {
          gate.enter([&] { ++sum; });
          ++entered;
        } catch (const ConcurrentUse&) {
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(sum == entered);
  CHECK(sum > 0);
}
