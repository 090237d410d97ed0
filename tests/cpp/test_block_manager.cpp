// The front door, from C++: determinism, eviction, undo, verification. The rules of the tree are
// tested one by one, and against a naive model, from Python.
#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <span>
#include <vector>

#include "core/block_manager.h"
#include "core/check.h"
#include "core/error.h"

using namespace pagedkv;

namespace {

Config config(std::int64_t num_blocks, std::int64_t block_size = 4) {
  Config c;
  c.num_device_blocks = num_blocks;
  c.block_size = block_size;
  return c;
}

std::vector<Token> tokens(int n, int seed = 0) {
  std::vector<Token> list(static_cast<std::size_t>(n));
  std::iota(list.begin(), list.end(), seed * 1000);
  return list;
}

SequenceId admit(BlockManager& m, const std::vector<Token>& prompt) {
  const SequenceId id = m.create(prompt, "");
  const auto rest = std::span(prompt).subspan(static_cast<std::size_t>(m.num_cached(id)));
  const auto count = static_cast<std::int64_t>(rest.size());
  m.commit(m.append({&id, 1}, rest, std::span(&count, 1)).step);
  return id;
}

void release(BlockManager& m, SequenceId id) { m.release({&id, 1}); }

}  // namespace

TEST_CASE("a config out of range names what is wrong") {
  CHECK_THROWS_WITH_AS(BlockManager(config(0)), doctest::Contains("num_device_blocks is 0"),
                       InvalidSpec);
  CHECK_THROWS_WITH_AS(BlockManager(config(4, 5000)), doctest::Contains("block_size is 5000"),
                       InvalidSpec);
  Config c = config(4);
  c.watermark = 4;
  CHECK_THROWS_WITH_AS(BlockManager{c}, doctest::Contains("watermark"), InvalidSpec);
}

TEST_CASE("every block size divides right") {
  for (const int block_size : {1, 2, 3, 5, 7, 16, 31, 48, 100, 4096}) {
    BlockManager m(config(64, block_size));
    const SequenceId id = m.create_anonymous();
    const int most = std::min(64 * block_size, 300);
    for (int length = 1; length <= most; ++length) {
      const StepPlan& plan = m.append({&id, 1});
      CHECK(plan.slots[0] % block_size == (length - 1) % block_size);
      m.commit(plan.step);
      CHECK(m.num_table_blocks(id) == (length + block_size - 1) / block_size);
    }
    m.verify();
  }
}

TEST_CASE("the same commands give the same plans, whatever the seed of the hashes") {
  std::vector<std::int64_t> logs[2];
  for (const int k : {0, 1}) {
    Config c = config(40);
    c.seed = static_cast<std::uint64_t>(k) * 12345;
    BlockManager m(c);
    std::mt19937 random(7);
    std::vector<SequenceId> live;
    for (int i = 0; i < 2000; ++i) {
      try {
        if (live.empty() || random() % 4 == 0) {
          live.push_back(m.create(
              tokens(static_cast<int>(random() % 20), static_cast<int>(random() % 3)), ""));
        }
        const SequenceId id = live[random() % live.size()];
        if (random() % 5 == 0) {
          std::erase(live, id);
          release(m, id);
          continue;
        }
        const auto new_tokens =
            tokens(static_cast<int>(1 + random() % 6), static_cast<int>(random() % 2));
        const auto count = static_cast<std::int64_t>(new_tokens.size());
        const StepPlan& plan = m.append({&id, 1}, new_tokens, std::span(&count, 1));
        logs[k].insert(logs[k].end(), plan.slots, plan.slots + plan.num_tokens);
        for (const BlockCopy& copy : plan.copies) logs[k].push_back(index(copy.target));
        m.commit(plan.step);
      } catch (const OutOfBlocks&) {
        logs[k].push_back(-1);
      }
      m.verify();
    }
  }
  CHECK(logs[0] == logs[1]);
  CHECK(logs[0].size() > 1000);
}

TEST_CASE("eviction takes the coldest leaf, and a parent never before its child") {
  BlockManager m(config(6));
  release(m, admit(m, tokens(8, 1)));      // two blocks, cold
  release(m, admit(m, tokens(8, 2)));      // two blocks
  release(m, m.create(tokens(9, 1), ""));  // the first prompt again: now the hotter one
  admit(m, tokens(12, 3));                 // needs one more block than is free
  CHECK(m.lookup(tokens(9, 1), "").num_tokens == 8);
  CHECK(m.lookup(tokens(9, 2), "").num_tokens == 4);  // its leaf went
  CHECK(m.stats().num_evicted_blocks == 1);
  m.verify();
}

TEST_CASE("a parent that is colder than its child waits for it") {
  BlockManager m(config(8));
  const SequenceId a = admit(m, tokens(12, 1));
  std::int64_t shorter = 4;
  release(m, m.fork(a, 2)[1]);
  m.truncate({&a, 1}, {&shorter, 1});  // abandons two blocks to the cold end
  release(m, a);                       // the first one: the hot end
  CHECK(m.stats().device.num_cached == 3);
  admit(m, tokens(24, 2));
  CHECK(m.lookup(tokens(13, 1), "").num_tokens == 8);
  m.verify();
}

TEST_CASE("long chains are evicted, cleared and released without recursion") {
  const int num_blocks = 200'000;
  Config c = config(num_blocks, 1);
  c.max_model_len = num_blocks;
  BlockManager m(c);
  for (const int round : {0, 1}) {
    const SequenceId id = admit(m, tokens(num_blocks - 1, round));
    release(m, id);
    CHECK(m.stats().device.num_cached == num_blocks - 1 + round);
  }
  CHECK(m.stats().num_evicted_blocks == num_blocks - 2);
  m.clear(std::nullopt);
  CHECK(m.stats().device.num_free == num_blocks);
  m.verify();
}

TEST_CASE("rollback leaves paths, lengths and counts as they were") {
  BlockManager m(config(20));
  const std::vector<SequenceId> ids = m.fork(admit(m, tokens(6)), 3);
  const Stats before = m.stats();
  for (int round = 0; round < 3; ++round) {
    const std::int64_t counts[3] = {1, 9, 3};
    const StepPlan& plan = m.append(ids, tokens(13), counts);
    CHECK(plan.copies.size() == 2);
    m.verify();
    m.rollback(plan.step);
    m.verify();
  }
  CHECK(m.stats().device.num_active == before.device.num_active);
  CHECK(m.length(ids[1]) == 6);
  CHECK(m.stats().num_logical_blocks == before.num_logical_blocks);
}

TEST_CASE("what fits in the pool is never refused to the only sequence") {
  for (unsigned seed = 0; seed < 1000; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&random](std::int64_t n) {
      return static_cast<std::int64_t>(random() % n);
    };
    Config c = config(1 + below(6), 1 + below(4));
    c.num_host_blocks = below(3) > 0 ? 0 : 3;
    BlockManager m(c);
    for (int round = 0; round < 20; ++round) {
      std::vector<Token> prompt(static_cast<std::size_t>(1 + below(c.model_len())));
      for (Token& token : prompt) token = static_cast<Token>(below(2));
      const SequenceId id = m.create(prompt, "");
      if (c.num_host_blocks > 0) m.complete(m.fetch(id).id);
      const auto rest = std::span(prompt).subspan(static_cast<std::size_t>(m.length(id)));
      const auto count = static_cast<std::int64_t>(rest.size());
      m.commit(m.append({&id, 1}, rest, std::span(&count, 1)).step);
      m.verify();
      const std::int64_t length = below(m.length(id) + 1);
      if (below(3) == 0) m.truncate({&id, 1}, {&length, 1});
      if (c.num_host_blocks > 0 && below(2) == 0 && m.num_table_blocks(id) <= c.num_host_blocks) {
        m.complete(m.swap_out({&id, 1}).id);
      }
      release(m, id);
      m.verify();
    }
  }
}

TEST_CASE("out of blocks changes nothing, not even what is cached") {
  Config c = config(6);
  c.max_model_len = 100;
  BlockManager m(c);
  release(m, admit(m, tokens(8, 1)));
  const SequenceId id = admit(m, tokens(8, 2));
  const auto more = tokens(20, 3);
  const std::int64_t count = 20;
  try {
    m.append({&id, 1}, more, std::span(&count, 1));
    FAIL("expected OutOfBlocks");
  } catch (const OutOfBlocks& e) {
    CHECK(e.needed == 5);
    CHECK(e.available == 4);
  }
  CHECK(m.lookup(tokens(9, 1), "").num_tokens == 8);
  CHECK(m.stats().num_evicted_blocks == 0);
  m.verify();
}

TEST_CASE("many salts come and go without a trace") {
  BlockManager m(config(4));
  for (int i = 0; i < 1000; ++i) {
    const SequenceId id = m.create(tokens(3), "tenant " + std::to_string(i));
    m.verify();
    release(m, id);
  }
  std::vector<SequenceId> live;
  for (int i = 0; i < 200; ++i) live.push_back(m.create({}, "tenant " + std::to_string(i)));
  m.verify();
  m.release(live);
  m.verify();
  CHECK(m.stats().num_sequences == 0);
}
