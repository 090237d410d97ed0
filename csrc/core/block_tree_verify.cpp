// What block_tree.h promises, recomputed from scratch.
#include <numeric>

#include "core/block_tree.h"
#include "core/check.h"

namespace pagedkv {

void BlockTree::verify(std::span<const std::int32_t> ends) const {
  const std::size_t size = nodes_.size();
  std::array<std::vector<std::int32_t>, kNumTiers> count;
  std::array<std::vector<std::uint8_t>, kNumTiers> used;
  for (std::size_t t = 0; t < kNumTiers; ++t) {
    count[t].assign(size, 0);
    used[t].assign(static_cast<std::size_t>(pools_[t].num_blocks()) + 1, 0);
  }
  std::vector<std::int32_t> num_children(size, 0);
  std::size_t num_live = 0;
  std::size_t num_roots = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const Node& n = nodes_[i];
    if (!n.live) {
      KV_CHECK(ends[i] == 0);
      continue;
    }
    ++num_live;
    count[0][i] += ends[i] + n.leaving;
    if (n.parent == NodeId::none) {
      ++num_roots;
      continue;
    }
    KV_CHECK(node(n.parent).live);
    if (n.published) ++num_children[index(n.parent)];
    for (std::size_t t = 0; t < kNumTiers; ++t) {
      if (n.count[t] > 0) ++count[t][index(n.parent)];
      if (n.block[t] == BlockId::none) continue;
      KV_CHECK(!used[t][static_cast<std::size_t>(n.block[t])]++);
    }
  }
  count[0][index(kAnonymousRoot)] += 1;
  KV_CHECK(num_roots == num_roots_);

  for (std::size_t t = 0; t < kNumTiers; ++t) {
    for (const BlockId block : pools_[t].free_blocks()) {
      KV_CHECK(!used[t][static_cast<std::size_t>(block)]++);
    }
    KV_CHECK(std::accumulate(used[t].begin(), used[t].end(), 0) == pools_[t].num_blocks());
    std::int32_t num_cached = 0;
    for (NodeId id = orders_[t].coldest(); id >= NodeId{0}; id = orders_[t].hotter(id)) {
      KV_CHECK(++num_cached <= orders_[t].size());
      KV_CHECK(node(id).live && node(id).published && node(id).count[t] == 0);
      KV_CHECK(node(id).block[t] != BlockId::none);
    }
    KV_CHECK(num_cached == orders_[t].size());
  }

  for (std::size_t i = 0; i < size; ++i) {
    const NodeId id{static_cast<std::int32_t>(i)};
    const Node& n = nodes_[i];
    if (!n.live) continue;
    std::int32_t children = 0;
    for (NodeId c = n.first_child; c != NodeId::none; c = node(c).next_sibling) {
      KV_CHECK(node(c).parent == id && node(c).published && ++children <= num_children[i]);
    }
    KV_CHECK(children == num_children[i]);
    for (std::size_t t = 0; t < kNumTiers; ++t) KV_CHECK(n.count[t] == count[t][i]);
    KV_CHECK(n.leaving <= n.count[0]);
    if (n.parent == NodeId::none) {
      KV_CHECK(n.published == salts_.contains(id));
      KV_CHECK(num_holders(id) > 0 || children > 0);
      continue;
    }
    KV_CHECK(n.known <= n.fill && n.fill <= block_size_ && n.fill > 0);
    KV_CHECK(n.count[0] == 0 || n.block[0] != BlockId::none);
    KV_CHECK(n.count[1] == 0 || n.block[1] != BlockId::none);
    if (n.published) {
      KV_CHECK(may_publish(id) && n.hash == child_hash(n.parent, tokens(id)));
      KV_CHECK(find_equal(id) == id);
      KV_CHECK(n.count[0] > 0 || orders_[0].contains(id));
    } else {
      KV_CHECK(num_holders(id) > 0 && children == 0);
    }
  }
  std::size_t num_free_nodes = 0;
  for (NodeId id = free_nodes_; id != NodeId::none; id = node(id).next_sibling) {
    KV_CHECK(!node(id).live && ++num_free_nodes <= size);
  }
  KV_CHECK(num_free_nodes + num_live == size);
  KV_CHECK(roots_.size() == salts_.size());
}

}  // namespace pagedkv
