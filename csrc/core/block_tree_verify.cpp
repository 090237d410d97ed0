// What block_tree.h promises, recomputed from scratch.
#include <numeric>

#include "core/block_tree.h"
#include "core/check.h"

namespace pagedkv {

void BlockTree::verify(const Ends& ends) const {
  std::size_t num_live = 0;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const NodeId id{static_cast<std::int32_t>(i)};
    if (!node(id).live) {
      KV_CHECK(ends[0][i] + ends[1][i] == 0);
      continue;
    }
    ++num_live;
    verify_node(id);
  }
  for (const Tier tier : kTiers) verify_tier(tier, ends[index(tier)]);

  std::size_t num_free_nodes = 0;
  for (NodeId id : {free_nodes_, free_roots_}) {
    for (; id != NodeId::none; id = node(id).place[0].next_sibling) {
      KV_CHECK(!node(id).live && ++num_free_nodes <= nodes_.size());
    }
  }
  KV_CHECK(num_free_nodes + num_live == nodes_.size());
  KV_CHECK(roots_.size() == salts_.size());
}

void BlockTree::verify_node(NodeId id) const {
  const Node& n = node(id);
  KV_CHECK(is_root(id) == (index(id) * std::size_t(block_size_) >= tokens_.size()));
  if (is_root(id)) {
    KV_CHECK(n.published == salts_.contains(id));
    KV_CHECK(num_holders(id) > 0 || has_children(id));
    return;
  }
  KV_CHECK(node(n.parent).live);
  KV_CHECK(n.known <= n.fill && n.fill <= block_size_ && n.fill > 0);
  KV_CHECK(n.place[0].block != BlockId::none || n.place[1].block != BlockId::none);
  if (n.published) {
    KV_CHECK(may_publish(id) && n.hash == child_hash(n.parent, tokens(id)));
    KV_CHECK(find_equal(id) == id);
  } else {
    KV_CHECK(num_holders(id) > 0 && !has_children(id));
  }
}

void BlockTree::verify_tier(Tier tier, const std::vector<std::int32_t>& ends) const {
  const std::size_t t = index(tier);
  const EvictionOrder& order = orders_[t];
  std::vector<std::uint8_t> used(static_cast<std::size_t>(pools_[t].num_blocks()) + 1, 0);
  std::vector<std::int32_t> count = ends;
  std::vector<std::int32_t> num_children(nodes_.size(), 0);  // published ones in this tier
  if (tier == Tier::device) count[index(anonymous_root_)] += 1;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const Node& n = nodes_[i];
    if (!n.live) continue;
    if (tier == Tier::device) count[i] += n.leaving;
    if (n.parent == NodeId::none) continue;
    if (n.place[t].count > 0) ++count[index(n.parent)];
    if (n.place[t].block == BlockId::none) continue;
    KV_CHECK(is_root(n.parent) || block(n.parent, tier) != BlockId::none);
    KV_CHECK(!used[static_cast<std::size_t>(n.place[t].block)]++);
    if (n.published) ++num_children[index(n.parent)];
  }
  for (const BlockId block : pools_[t].free_blocks()) {
    KV_CHECK(!used[static_cast<std::size_t>(block)]++);
  }
  KV_CHECK(std::accumulate(used.begin(), used.end(), 0) == pools_[t].num_blocks());

  std::int32_t num_in_line = 0;
  for (NodeId id = order.coldest(); id != NodeId::none; id = order.hotter(id)) {
    KV_CHECK(++num_in_line <= order.size() && !order.waits(id));
    KV_CHECK(node(id).live && node(id).published && node(id).place[t].count == 0);
    KV_CHECK(node(id).place[t].block != BlockId::none);
  }
  std::int32_t num_waiting = 0;

  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const NodeId id{static_cast<std::int32_t>(i)};
    const Place& place = nodes_[i].place[t];
    if (!nodes_[i].live) continue;
    KV_CHECK(place.count == count[i]);
    std::int32_t children = 0;
    for (NodeId c = place.first_child; c != NodeId::none; c = node(c).place[t].next_sibling) {
      KV_CHECK(node(c).parent == id && node(c).published && ++children <= num_children[i]);
      KV_CHECK(node(c).place[t].block != BlockId::none);
    }
    KV_CHECK(children == num_children[i]);
    if (is_root(id)) continue;
    KV_CHECK(place.count == 0 || place.block != BlockId::none);
    if (place.block == BlockId::none || place.count > 0) continue;
    KV_CHECK(nodes_[i].published && order.contains(id));
    if (!order.waits(id)) continue;
    KV_CHECK(children > 0);
    ++num_waiting;
  }
  KV_CHECK(num_in_line + num_waiting == order.size());
}

}  // namespace pagedkv
