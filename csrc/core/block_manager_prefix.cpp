// Prefix hits: create(), lookup(), and fetch() from the host tier.
#include <algorithm>
#include <string>
#include <utility>

#include "core/block_manager.h"
#include "core/error.h"

namespace pagedkv {

SequenceId BlockManager::create_anonymous() {
  require_no_open_step();
  const std::uint32_t slot = sequences_.open();
  tree_.ref(tree_.anonymous_root(), Tier::device);
  sequences_[slot].tip = tree_.anonymous_root();
  return sequences_.id(slot);
}

SequenceId BlockManager::create(std::span<const Token> tokens, std::string_view salt) {
  require_no_open_step();
  if (tokens.size() > static_cast<std::size_t>(max_model_len_)) {
    throw InvalidSpec(
        "tokens has " + std::to_string(tokens.size()) +
        " entries, expected at most max_model_len = " + std::to_string(max_model_len_));
  }
  sequences_.reserve(1);
  const NodeId root = tree_.open_root(salt);
  const std::uint32_t slot = sequences_.open();
  Sequence& sequence = sequences_[slot];
  sequence.tip = root;
  try {
    sequences_.grow_row(sequence, num_blocks(static_cast<std::int32_t>(tokens.size())));
  } catch (...) {
    sequences_.close(slot);
    tree_.drop_if_unused(root);
    throw;
  }
  // The last token is left to compute, so that there are logits.
  tree_.ref(root, Tier::device);
  take_hit(slot, tokens, static_cast<std::int32_t>(tokens.size()) - 1);
  return sequences_.id(slot);
}

// Moves a sequence that ends at its root to the longest prefix of the first `most` of `tokens` that
// is on the device, and notes the rest if the host can go on from there.
void BlockManager::take_hit(std::uint32_t slot, std::span<const Token> tokens, std::int32_t most) {
  Sequence& sequence = sequences_[slot];
  std::int32_t length = 0;
  NodeId node = sequence.tip;
  NodeId next = NodeId::none;
  while (length + block_size_ <= most) {
    next = tree_.find_child(node, tokens.data() + length);
    if (next == NodeId::none || !is_hit(next)) break;
    node = std::exchange(next, NodeId::none);
    length += block_size_;
    sequence.row[static_cast<std::size_t>(sequence.row_valid++)] = tree_.block(node, Tier::device);
  }
  const auto rest = tokens.subspan(static_cast<std::size_t>(length),
                                   static_cast<std::size_t>(std::max(most - length, 0)));
  if (next != NodeId::none && is_fetchable(next)) {
    const std::span<Token> wanted = want(slot, blocks_below(length), rest.size());
    std::copy_n(rest.data(), std::min(rest.size(), wanted.size()), wanted.data());
  }
  if (!rest.empty()) {
    const auto [child, run] = find_partial(node, rest);
    if (child != NodeId::none) {
      node = child;
      length += run;
      sequence.row[static_cast<std::size_t>(sequence.row_valid++)] =
          tree_.block(node, Tier::device);
    }
  }
  const NodeId root = std::exchange(sequence.tip, node);
  tree_.ref(node, Tier::device);
  tree_.unref(root, Tier::device, Leave::hot);
  sequence.length = sequence.known = sequence.cached = length;
  num_logical_ += num_blocks(length);
  totals_.num_hit_tokens += length;
  note_peak();
}

PrefixHit BlockManager::lookup(std::span<const Token> tokens, std::string_view salt) const {
  PrefixHit hit;
  NodeId node = tree_.find_root(salt);
  if (node == NodeId::none || tokens.empty()) return hit;
  std::span<const Token> rest = tokens.first(tokens.size() - 1);
  while (rest.size() >= static_cast<std::size_t>(block_size_)) {
    const NodeId child = tree_.find_child(node, rest.data());
    if (child == NodeId::none || !is_hit(child)) break;
    node = child;
    ++hit.num_full_blocks;
    rest = rest.subspan(static_cast<std::size_t>(block_size_));
  }
  hit.num_host_tokens = num_fetchable(node, rest);
  hit.num_partial_tokens = find_partial(node, rest).second;
  hit.num_tokens =
      static_cast<std::int64_t>(hit.num_full_blocks) * block_size_ + hit.num_partial_tokens;
  return hit;
}

// -------------------------------------------------------------------- the host as a prefix cache

// Whether fetch() can bring this node, whose parent is on the device or can be brought.
bool BlockManager::is_fetchable(NodeId node) const {
  if (tree_.block(node, Tier::device) != BlockId::none) return true;  // there, or landing there
  return transfers_.landing(Tier::host, tree_.block(node, Tier::host)) == TransferId::none;
}

std::int64_t BlockManager::num_fetchable(NodeId node, std::span<const Token> tokens) const {
  std::int64_t found = 0;
  while (tokens.size() >= static_cast<std::size_t>(block_size_)) {
    node = tree_.find_child(node, tokens.data());
    if (node == NodeId::none || !is_fetchable(node)) break;
    found += block_size_;
    tokens = tokens.subspan(static_cast<std::size_t>(block_size_));
  }
  return found;
}

TransferPlan BlockManager::fetch(SequenceId id) {
  require_no_open_step();
  require_host_tier();
  const std::uint32_t slot = sequences_.slot(id);
  require_resident(slot);
  Sequence& sequence = sequences_[slot];
  const auto wanted = wanted_.find(slot);
  if (wanted == wanted_.end()) return plan_paths({}, Tier::device, 0);

  // Go on from the last full block: the host may have the whole of what is held in part.
  const Wanted& rest = wanted->second;
  NodeId tip = ancestor(sequence.tip, num_blocks(sequence.length) - rest.first_block);
  const auto count =
      static_cast<std::int32_t>(num_fetchable(tip, {rest.tokens.data(), rest.tokens.size()}));
  if (count == 0) return plan_paths({}, Tier::device, 0);
  for (std::int32_t at = 0; at < count; at += block_size_) {
    tip = tree_.find_child(tip, rest.tokens.data() + at);
  }
  const std::int32_t length = rest.first_block * block_size_ + count;
  const std::size_t num_copies = require_blocks({&tip, 1}, Tier::device);
  sequences_.grow_row(sequence, num_blocks(length));
  TransferPlan plan = plan_paths({&tip, 1}, Tier::device, num_copies);
  tree_.unref(sequence.tip, Tier::device, Leave::cold);
  num_logical_ += num_blocks(length) - num_blocks(sequence.length);
  totals_.num_hit_tokens += length - sequence.length;
  sequence.tip = tip;
  sequence.length = sequence.known = sequence.cached = length;
  sequence.transfer = plan.id;
  sequence.lower_row(rest.first_block);
  wanted_.erase(wanted);
  note_peak();
  return plan;
}

}  // namespace pagedkv
