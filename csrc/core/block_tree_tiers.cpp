// A path in a second tier: what that takes, how it gets there, and how it is taken back.
#include <algorithm>

#include "core/block_tree.h"
#include "core/check.h"

namespace pagedkv {

void BlockTree::count_missing(NodeId id, Tier tier, Missing& missing) {
  for (;; id = node(id).parent) {
    Node& n = at(id);
    const Place& place = n.place[index(tier)];
    if (n.parent == NodeId::none || place.count > 0 || n.mark == mark_) return;
    n.mark = mark_;
    ++(place.block == BlockId::none ? missing.blocks : missing.cached);
  }
}

void BlockTree::place(std::span<const NodeId> ids, Tier tier, std::vector<NodeId>& placed) {
  const std::size_t t = index(tier);
  const std::size_t first = placed.size();
  for (NodeId id : ids) {
    const std::size_t from = placed.size();
    for (;; id = node(id).parent) {
      Node& n = at(id);
      if (n.place[t].count++ > 0 || n.parent == NodeId::none) break;
      if (n.place[t].block == BlockId::none) {
        placed.push_back(id);
      } else {
        orders_[t].remove(id);
      }
    }
    std::reverse(placed.begin() + static_cast<std::ptrdiff_t>(from), placed.end());
  }
  // All are counted by now, so that no part of a path is evicted for another one.
  for (std::size_t i = first; i < placed.size(); ++i) {
    at(placed[i]).place[t].block = take_block(tier);
    if (node(placed[i]).published) link_child(placed[i], tier);
  }
}

void BlockTree::adopt_block(NodeId id, NodeId twin, Tier tier) {
  const std::size_t t = index(tier);
  KV_CHECK(node(id).published && block(id, tier) == BlockId::none);
  std::swap(at(id).place[t].block, at(twin).place[t].block);
  link_child(id, tier);
  orders_[t].push_hot(id);
}

void BlockTree::drop_subtree(NodeId top, Tier tier) {
  // Bottom up and without a stack: go down to a leaf, take its block, continue from its parent.
  NodeId id = top;
  for (;;) {
    for (NodeId child; (child = node(id).place[index(tier)].first_child) != NodeId::none;) {
      id = child;
    }
    const NodeId parent = node(id).parent;
    drop_block(id, tier);
    if (id == top) return;
    id = parent;
  }
}

}  // namespace pagedkv
