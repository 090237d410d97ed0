// Prefix hits: create(), lookup(), and fetch() from the host tier.
#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "core/block_manager.h"
#include "core/error.h"

namespace pagedkv {

namespace {

// What of a prompt may be a hit: its last token is left to compute, so that there are logits.
std::span<const Token> but_last(std::span<const Token> tokens) {
  return tokens.first(tokens.empty() ? 0 : tokens.size() - 1);
}

}  // namespace

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
  tree_.ref(root, Tier::device);
  take_hit(slot, but_last(tokens));
  return sequences_.id(slot);
}

// The longest prefix of `tokens` that the device has below `root`.
BlockManager::Hit BlockManager::find_hit(NodeId root, std::span<const Token> tokens) const {
  Hit hit{.full = root, .rest = tokens};
  while (hit.rest.size() >= static_cast<std::size_t>(block_size_)) {
    const NodeId child = tree_.find_child(hit.full, hit.rest.data());
    if (child == NodeId::none || !is_hit(child)) {
      hit.beyond = child;
      break;
    }
    hit.full = child;
    ++hit.num_full_blocks;
    hit.rest = hit.rest.subspan(static_cast<std::size_t>(block_size_));
  }
  if (!hit.rest.empty()) {
    std::tie(hit.partial, hit.num_partial_tokens) =
        tree_.find_partial(hit.full, hit.rest, [this](NodeId child) { return is_hit(child); });
  }
  return hit;
}

// Moves a sequence that ends at its root to the longest prefix of `tokens` that is on the device,
// and notes the rest if the host can go on from there.
void BlockManager::take_hit(std::uint32_t slot, std::span<const Token> tokens) {
  Sequence& sequence = sequences_[slot];
  const Hit hit = find_hit(sequence.tip, tokens);
  if (hit.beyond != NodeId::none && is_fetchable(hit.beyond)) {
    const std::span<Token> wanted = want(slot, hit.num_full_blocks, hit.rest.size());
    std::copy_n(hit.rest.data(), std::min(hit.rest.size(), wanted.size()), wanted.data());
  }
  const NodeId node = hit.partial != NodeId::none ? hit.partial : hit.full;
  const NodeId root = std::exchange(sequence.tip, node);
  tree_.ref(node, Tier::device);
  tree_.unref(root, Tier::device, Leave::hot);
  const std::int32_t length = hit.num_full_blocks * block_size_ + hit.num_partial_tokens;
  sequence.length = sequence.known = sequence.cached = length;
  num_logical_ += num_blocks(length);
  totals_.num_hit_tokens += length;
  note_peak();
}

PrefixHit BlockManager::lookup(std::span<const Token> tokens, std::string_view salt) const {
  const NodeId root = tree_.find_root(salt);
  if (root == NodeId::none) return {};
  const Hit hit = find_hit(root, but_last(tokens));
  return {.num_tokens = std::int64_t{hit.num_full_blocks} * block_size_ + hit.num_partial_tokens,
          .num_full_blocks = hit.num_full_blocks,
          .num_partial_tokens = hit.num_partial_tokens,
          .num_host_tokens =
              hit.beyond == NodeId::none ? 0 : find_fetchable(hit.full, hit.rest).second};
}

// -------------------------------------------------------------------- the host as a prefix cache

// Whether fetch() can bring this node, whose parent is on the device or can be brought.
bool BlockManager::is_fetchable(NodeId node) const {
  if (tree_.block(node, Tier::device) != BlockId::none) return true;  // there, or landing there
  return transfers_.landing(Tier::host, tree_.block(node, Tier::host)) == TransferId::none;
}

// Where the blocks of `tokens` below `node` end that fetch() can bring, and how many tokens these
// are.
std::pair<NodeId, std::int32_t> BlockManager::find_fetchable(NodeId node,
                                                             std::span<const Token> tokens) const {
  std::int32_t found = 0;
  while (tokens.size() >= static_cast<std::size_t>(block_size_)) {
    const NodeId child = tree_.find_child(node, tokens.data());
    if (child == NodeId::none || !is_fetchable(child)) break;
    node = child;
    found += block_size_;
    tokens = tokens.subspan(static_cast<std::size_t>(block_size_));
  }
  return {node, found};
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
  const NodeId full = ancestor(sequence.tip, num_blocks(sequence.length) - rest.first_block);
  const auto [tip, count] = find_fetchable(full, rest.tokens);
  if (count == 0) return plan_paths({}, Tier::device, 0);
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
