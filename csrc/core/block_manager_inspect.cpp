// What looks at everything: verify() and snapshot(). Their cost grows with the pool.
#include <algorithm>

#include "core/block_manager.h"
#include "core/check.h"

namespace pagedkv {

void BlockManager::verify() const {
  std::vector<std::int32_t> ends(tree_.nodes().size(), 0);
  verify_sequences(ends);
  tree_.verify(ends);
}

void BlockManager::verify_sequences(std::vector<std::int32_t>& ends) const {
  std::int64_t num_logical = 0;
  std::size_t num_live = 0;
  for (std::uint32_t slot = 0; slot < sequences_.num_slots(); ++slot) {
    const Sequence& sequence = sequences_[slot];
    if (sequence.tip == NodeId::none) continue;
    ++num_live;
    ++ends[index(sequence.tip)];
    const std::int32_t size = num_blocks(sequence.length);
    num_logical += size;
    KV_CHECK(sequence.known <= sequence.length && sequence.cached <= sequence.length);
    KV_CHECK(sequence.sent_valid <= sequence.row_valid && sequence.row_valid <= size);
    NodeId node = sequence.tip;
    for (std::int32_t i = size; i-- > 0; node = tree_.node(node).parent) {
      const Node& n = tree_.node(node);
      KV_CHECK(!tree_.is_root(node));
      KV_CHECK(i >= sequence.row_valid ||
               sequence.row[static_cast<std::size_t>(i)] == n.block[index(sequence.tier)]);
      const std::int32_t held = std::min(block_size_, sequence.length - i * block_size_);
      KV_CHECK(n.fill >= held && n.known >= std::min(held, sequence.known - i * block_size_));
      KV_CHECK(i == size - 1 || n.fill == block_size_);
    }
    KV_CHECK(tree_.is_root(node));
  }
  KV_CHECK(num_live == sequences_.size());
  KV_CHECK(num_logical == num_logical_);
}

Snapshot BlockManager::snapshot() const {
  const std::span<const Node> nodes = tree_.nodes();
  std::vector<std::int32_t> depth(nodes.size(), 0);
  std::vector<NodeId> order;
  std::vector<NodeId> path;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (!nodes[i].live) continue;
    NodeId id{static_cast<std::int32_t>(i)};
    for (; !tree_.is_root(id) && depth[index(id)] == 0; id = tree_.node(id).parent) {
      path.push_back(id);
    }
    for (; !path.empty(); path.pop_back()) {
      depth[index(path.back())] = depth[index(tree_.node(path.back()).parent)] + 1;
      order.push_back(path.back());
    }
  }
  std::vector<std::int32_t> position(nodes.size(), -1);
  Snapshot snapshot;
  for (const NodeId id : order) {  // a parent enters `order` before its children
    const Node& n = tree_.node(id);
    position[index(id)] = static_cast<std::int32_t>(snapshot.parents.size());
    snapshot.parents.push_back(position[index(n.parent)]);
    snapshot.blocks.push_back(pagedkv::index(n.block[0]));
    snapshot.num_tokens.push_back(n.fill);
    snapshot.counts.push_back(n.count[0]);
    snapshot.published.push_back(n.published);
  }
  for (std::uint32_t slot = 0; slot < sequences_.num_slots(); ++slot) {
    const Sequence& sequence = sequences_[slot];
    if (sequence.tip == NodeId::none) continue;
    snapshot.sequence_ids.push_back(static_cast<std::int64_t>(sequences_.id(slot)));
    snapshot.sequence_nodes.push_back(position[index(sequence.tip)]);
    snapshot.sequence_lengths.push_back(sequence.length);
  }
  return snapshot;
}

}  // namespace pagedkv
