// What looks at everything: verify() and snapshot(). Their cost grows with the pool.
#include <algorithm>

#include "core/block_manager.h"
#include "core/check.h"

namespace pagedkv {

void BlockManager::verify() const {
  BlockTree::Ends ends;
  for (auto& tier : ends) tier.assign(tree_.nodes().size(), 0);
  verify_sequences(ends);
  tree_.verify(ends);
  verify_transfers();
}

void BlockManager::verify_sequences(BlockTree::Ends& ends) const {
  std::int64_t num_logical = 0;
  std::size_t num_live = 0;
  for (std::uint32_t slot = 0; slot < sequences_.num_slots(); ++slot) {
    const Sequence& sequence = sequences_[slot];
    if (sequence.tip == NodeId::none) continue;
    ++num_live;
    ++ends[index(sequence.tier)][index(sequence.tip)];
    const bool waits = transfers_.in_flight(sequence.transfer);
    KV_CHECK(!sequence.dropped || sequence.length == 0);
    const std::int32_t size = num_blocks(sequence.length);
    num_logical += size;
    KV_CHECK(sequence.known <= sequence.length && sequence.cached <= sequence.length);
    KV_CHECK(sequence.sent_valid <= sequence.row_valid && sequence.row_valid <= size);
    NodeId node = sequence.tip;
    for (std::int32_t i = size; i-- > 0; node = tree_.node(node).parent) {
      const Node& n = tree_.node(node);
      KV_CHECK(!tree_.is_root(node));
      KV_CHECK(i >= sequence.row_valid ||
               sequence.row[static_cast<std::size_t>(i)] == tree_.block(node, sequence.tier));
      KV_CHECK(waits || transfers_.landing(sequence.tier, tree_.block(node, sequence.tier)) ==
                            TransferId::none);
      const std::int32_t held = std::min(block_size_, sequence.length - i * block_size_);
      KV_CHECK(n.fill >= held && n.known >= std::min(held, sequence.known - i * block_size_));
      KV_CHECK(i == size - 1 || n.fill == block_size_);
    }
    KV_CHECK(tree_.is_root(node));
  }
  KV_CHECK(num_live == sequences_.size());
  KV_CHECK(num_logical == num_logical_);
}

void BlockManager::verify_transfers() const {
  TransferId before = TransferId::none;
  for (const TransferTable::Transfer& transfer : transfers_.transfers()) {
    KV_CHECK(before < transfer.id);
    before = transfer.id;
    for (const TransferId id : transfer.wait_for) KV_CHECK(id < transfer.id);
  }
  for (std::size_t i = 0; i < tree_.nodes().size(); ++i) {
    if (!tree_.nodes()[i].live || tree_.is_root(NodeId{static_cast<std::int32_t>(i)})) continue;
    for (const Tier tier : kTiers) {
      const BlockId block = tree_.nodes()[i].place[index(tier)].block;
      if (block == BlockId::none) continue;
      const TransferId writer = transfers_.landing(tier, block);
      KV_CHECK(writer == TransferId::none || transfers_.in_flight(writer));
      const NodeId parent = tree_.nodes()[i].parent;
      KV_CHECK(writer != TransferId::none || tree_.is_root(parent) ||
               transfers_.landing(tier, tree_.block(parent, tier)) == TransferId::none);
    }
  }
}

Snapshot BlockManager::snapshot() const {
  const std::span<const Node> nodes = tree_.nodes();
  std::vector<std::uint8_t> seen(nodes.size(), 0);
  std::vector<NodeId> order;
  std::vector<NodeId> path;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (!nodes[i].live) continue;
    NodeId id{static_cast<std::int32_t>(i)};
    for (; !tree_.is_root(id) && !seen[index(id)]; id = tree_.node(id).parent) {
      seen[index(id)] = 1;
      path.push_back(id);
    }
    for (; !path.empty(); path.pop_back()) order.push_back(path.back());
  }
  std::vector<std::int32_t> position(nodes.size(), -1);
  Snapshot snapshot;
  for (const NodeId id : order) {  // a parent enters `order` before its children
    const Node& n = tree_.node(id);
    position[index(id)] = static_cast<std::int32_t>(snapshot.parents.size());
    snapshot.parents.push_back(position[index(n.parent)]);
    snapshot.blocks.push_back(pagedkv::index(n.place[0].block));
    snapshot.num_tokens.push_back(n.fill);
    snapshot.counts.push_back(n.place[0].count);
    snapshot.host_blocks.push_back(pagedkv::index(n.place[1].block));
    snapshot.host_counts.push_back(n.place[1].count);
    snapshot.published.push_back(n.published);
  }
  for (std::uint32_t slot = 0; slot < sequences_.num_slots(); ++slot) {
    const Sequence& sequence = sequences_[slot];
    if (sequence.tip == NodeId::none) continue;
    snapshot.sequence_ids.push_back(static_cast<std::int64_t>(sequences_.id(slot)));
    snapshot.sequence_nodes.push_back(position[index(sequence.tip)]);
    snapshot.sequence_lengths.push_back(sequence.length);
    snapshot.sequence_tiers.push_back(static_cast<std::uint8_t>(sequence.tier));
  }
  return snapshot;
}

}  // namespace pagedkv
