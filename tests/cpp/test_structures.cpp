// The small structures of core: pool, eviction order, index, roots, sequence table.
#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include "core/block_pool.h"
#include "core/block_tree.h"
#include "core/check.h"
#include "core/error.h"
#include "core/eviction_order.h"
#include "core/prefix_index.h"
#include "core/sequence.h"

using namespace pagedkv;

TEST_CASE("a pool hands out each block once, the last one given back first") {
  BlockPool pool(3);
  const BlockId a = pool.take();
  const BlockId b = pool.take();
  const BlockId c = pool.take();
  CHECK(index(a) + index(b) + index(c) == 1 + 2 + 3);
  CHECK(pool.num_free() == 0);
  CHECK_THROWS_AS(pool.take(), BrokenInvariant);
  pool.give(b);
  CHECK(pool.take() == b);
  CHECK_THROWS_AS(pool.give(BlockId{4}), BrokenInvariant);
  CHECK_THROWS_AS(pool.give(BlockId::none), BrokenInvariant);
}

TEST_CASE("a pool refuses more blocks than it has") {
  BlockPool pool(1);
  CHECK_THROWS_AS(pool.give(BlockId{1}), BrokenInvariant);
}

TEST_CASE("the eviction order goes from cold to hot") {
  EvictionOrder order;
  order.ensure(8);
  CHECK(order.coldest() < NodeId{0});
  order.push_hot(NodeId{1});
  order.push_hot(NodeId{2});
  order.push_cold(NodeId{3});
  order.push_hot(NodeId{4});
  order.push_waiting(NodeId{5});
  const auto read = [&order] {
    std::vector<int> nodes;
    for (NodeId id = order.coldest(); id >= NodeId{0}; id = order.hotter(id)) {
      nodes.push_back(static_cast<int>(id));
    }
    return nodes;
  };
  CHECK(read() == std::vector{3, 1, 2, 4});
  order.remove(NodeId{1});
  CHECK(read() == std::vector{3, 2, 4});
  CHECK(order.size() == 4);
  CHECK(!order.contains(NodeId{1}));
  CHECK((order.waits(NodeId{5}) && order.contains(NodeId{5}) && !order.waits(NodeId{4})));
  CHECK_THROWS_AS(order.push_hot(NodeId{5}), BrokenInvariant);
  order.remove(NodeId{5});
  CHECK((read() == std::vector{3, 2, 4} && order.size() == 3));
  CHECK_THROWS_AS(order.remove(NodeId{1}), BrokenInvariant);
  CHECK_THROWS_AS(order.push_hot(NodeId{4}), BrokenInvariant);
}

TEST_CASE("the index agrees with a list, through collisions and wrap-around") {
  constexpr int kNodes = 40;
  PrefixIndex nodes(kNodes);
  std::vector<std::uint64_t> hashes(kNodes);
  std::vector<bool> inside(kNodes);
  std::mt19937_64 random(3);
  // Few homes, the last ones of the table among them.
  for (auto& hash : hashes) hash = (random() % 3 == 0 ? ~std::uint64_t{0} : random() % 4 << 61);
  for (int i = 0; i < 20'000; ++i) {
    const auto n = static_cast<std::size_t>(random() % kNodes);
    const NodeId id{static_cast<std::int32_t>(n)};
    if (inside[n]) {
      CHECK(nodes.erase(id, hashes[n]));
    } else {
      CHECK(!nodes.erase(id, hashes[n]));
      nodes.insert(id, hashes[n]);
    }
    inside[n] = !inside[n];
    const auto k = static_cast<std::size_t>(random() % kNodes);
    const NodeId other{static_cast<std::int32_t>(k)};
    const NodeId found = nodes.find(hashes[k], [other](NodeId node) { return node == other; });
    CHECK(found == (inside[k] ? other : NodeId::none));
  }
}

TEST_CASE("a salt takes no more than its root, and moves no node") {
  BlockTree tree(1000, 1000, 16, 0);
  const Node* const nodes = tree.nodes().data();
  const std::size_t bytes = tree.bytes();
  for (int i = 0; i < 1000; ++i) tree.open_root(std::to_string(i));
  CHECK(tree.nodes().data() == nodes);
  CHECK(tree.bytes() == bytes + 1000 * sizeof(Node));
}

TEST_CASE("an id dies with its sequence, even when its slot lives on") {
  SequenceTable table;
  const std::uint32_t slot = table.open();
  table[slot].tip = NodeId{0};
  const SequenceId first = table.id(slot);
  CHECK(table.slot(first) == slot);
  table.close(slot);
  CHECK_THROWS_AS(table.slot(first), UnknownSequence);
  const std::uint32_t again = table.open();
  table[again].tip = NodeId{0};
  CHECK(again == slot);
  CHECK(table.id(again) != first);
  CHECK_THROWS_AS(table.slot(first), UnknownSequence);
  CHECK_THROWS_AS(table.slot(SequenceId{-1}), UnknownSequence);
  CHECK(table.size() == 1);
}

TEST_CASE("rows of sequences are counted as they grow, and stay with their slots") {
  SequenceTable table;
  table.reserve(2);
  const std::size_t bytes = table.bytes();
  const std::uint32_t slots[] = {table.open(), table.open()};
  table.grow_row(table[slots[0]], 17);
  table.grow_row(table[slots[0]], 20);
  table.grow_row(table[slots[1]], 1);
  table.grow_row(table[slots[0]], 100);
  table.close(slots[0]);
  CHECK(table.bytes() == bytes + (128 + 16) * sizeof(BlockId));
}
