// Loops that several threads take turns at.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "host/parallel.h"
#include "watchdog.h"

using namespace pagedkv;

namespace {

// How often each turn was taken, counted without a lock by who takes it, and how many threads did.
struct Turns {
  Turns(int num_threads, int count) : taken(static_cast<std::size_t>(count)) {
    std::vector<std::size_t> of_thread(static_cast<std::size_t>(std::max(num_threads, 1)));
    parallel_for(num_threads, count, [&](std::int64_t i, int thread) {
      ++taken[static_cast<std::size_t>(i)];
      ++of_thread.at(static_cast<std::size_t>(thread));
    });
    for (const std::size_t n : of_thread) total += n;
  }

  bool each_once() const {
    return total == taken.size() && std::ranges::all_of(taken, [](int n) { return n == 1; });
  }

  std::vector<int> taken;
  std::size_t total = 0;
};

}  // namespace

TEST_CASE("each turn of a loop is taken once, by a thread that has a place of its own") {
  for (const int num_threads : {-1, 0, 1, 2, 3, 7, 40}) {
    for (const int count : {0, 1, 2, 5, 1000}) CHECK(Turns(num_threads, count).each_once());
  }
  for (int i = 0; i < 2000; ++i) REQUIRE(Turns(4, 8).each_once());
}

TEST_CASE("helpers do take turns, as soon as the caller waits for them to") {
  std::atomic<int> num_met = 0;
  parallel_for(3, 3, [&](std::int64_t, int) {
    ++num_met;
    while (num_met < 3) std::this_thread::yield();  // all three are in here, or nobody gets out
  });
  CHECK(num_met == 3);
}

TEST_CASE("several callers at once, and a loop within a loop, each get all of theirs") {
  std::atomic<int> num_wrong = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 300; ++i) num_wrong += !Turns(3, 20).each_once();
    });
  }
  for (std::thread& caller : callers) caller.join();
  parallel_for(3, 6, [&](std::int64_t, int) { num_wrong += !Turns(3, 20).each_once(); });
  CHECK(num_wrong == 0);
}

TEST_CASE("a forked child, which has no helpers, takes all turns itself") {
  REQUIRE(Turns(3, 50).each_once());
  const pid_t child = fork();
  if (child == 0) _exit(Turns(3, 50).each_once() ? 0 : 1);
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
