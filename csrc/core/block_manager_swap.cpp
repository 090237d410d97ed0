// Between tiers: swap_out(), swap_in(), fetch(), their ends, and recomputation.
#include <algorithm>
#include <string>
#include <utility>

#include "core/block_manager.h"
#include "core/check.h"
#include "core/error.h"

namespace pagedkv {

// ------------------------------------------------------------------------------------ planning

TransferPlan BlockManager::swap_out(std::span<const SequenceId> ids) {
  return move(ids, Tier::device, Tier::host);
}

TransferPlan BlockManager::swap_in(std::span<const SequenceId> ids) {
  return move(ids, Tier::host, Tier::device);
}

TransferPlan BlockManager::move(std::span<const SequenceId> ids, Tier source, Tier target) {
  require_no_open_step();
  require_host_tier();
  begin_batch();
  tips_.clear();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::uint32_t slot = enter(ids[i], i);
    require_path(slot);
    if (sequences_[slot].tier != source) {
      throw InvalidState("ids[" + std::to_string(i) + "] is on the " + std::string(name(target)) +
                         " tier already");
    }
    tips_.push_back(sequences_[slot].tip);
  }
  const std::size_t num_copies = require_blocks(tips_, target);
  TransferPlan plan = plan_paths(tips_, target, num_copies);
  for (const SequenceId id : ids) {
    const std::uint32_t slot = sequences_.slot(id);
    Sequence& sequence = sequences_[slot];
    tree_.unref(sequence.tip, source, Leave::moved);
    sequence.tier = target;
    sequence.transfer = plan.id;
    sequence.lower_row(0);
    if (!wanted_.empty()) wanted_.erase(slot);
  }
  note_peak();
  return plan;
}

void BlockManager::require_host_tier() const {
  if (config_.num_host_blocks > 0) return;
  throw InvalidState("there is no host tier: num_host_blocks is 0");
}

// How many blocks the paths to `tips` need to be in a tier; throws if it does not have them.
std::size_t BlockManager::require_blocks(std::span<const NodeId> tips, Tier target) {
  BlockTree::Missing missing;
  tree_.begin_count();
  for (const NodeId tip : tips) tree_.count_missing(tip, target, missing);
  const std::int32_t available = tree_.num_available(target) - missing.cached;
  if (missing.blocks > available) throw OutOfBlocks(target, missing.blocks, available);
  return static_cast<std::size_t>(missing.blocks);
}

// Counts the paths to `tips` in the target tier, with copies of what is not there.
TransferPlan BlockManager::plan_paths(std::span<const NodeId> tips, Tier target,
                                      std::size_t num_copies) {
  const Tier source = other(target);
  TransferPlan plan;
  plan.target = target;
  plan.after = last_committed_;
  plan.copies.reserve(num_copies);  // memory is taken before the first change
  plan.wait_for.reserve(transfers_.transfers().size());
  placed_.clear();
  placed_.reserve(num_copies);
  TransferTable::Transfer& transfer = transfers_.open(target, num_copies);
  plan.id = transfer.id;
  // What is there already may still be landing: then this transfer ends after that one. Where a
  // node has landed, so have those above it.
  const bool lands = std::ranges::any_of(transfers_.transfers(), [&](const auto& before) {
    return before.target == target && !before.landings.empty();
  });
  tree_.begin_count();
  for (const NodeId tip : lands ? tips : std::span<const NodeId>{}) {
    for (NodeId node = tip; !tree_.is_root(node) && tree_.first_visit(node);
         node = tree_.node(node).parent) {
      const BlockId block = tree_.block(node, target);
      if (block == BlockId::none) continue;
      const TransferId writer = transfers_.landing(target, block);
      if (writer == TransferId::none) break;
      TransferTable::add(transfer.depends_on, writer);
      TransferTable::add(transfer.wait_for, writer);
    }
  }
  tree_.place(tips, target, placed_);
  for (const NodeId node : placed_) {
    const BlockId from = tree_.block(node, source);
    const BlockId to = tree_.block(node, target);
    transfers_.read(transfer, source, from);
    transfers_.write(transfer, node, to);
    plan.copies.push_back({from, to, tree_.node(node).fill});
  }
  plan.wait_for.assign(transfer.wait_for.begin(), transfer.wait_for.end());
  (target == Tier::host ? totals_.num_swapped_out_blocks : totals_.num_swapped_in_blocks) +=
      static_cast<std::int64_t>(num_copies);
  return plan;
}

// -------------------------------------------------------------------------------------- ending

bool BlockManager::is_resident(SequenceId id) const {
  const Sequence& sequence = sequences_[sequences_.slot(id)];
  return !sequence.dropped && sequence.tier == Tier::device &&
         !transfers_.in_flight(sequence.transfer);
}

TransferId BlockManager::waits_for(SequenceId id) const {
  const TransferId transfer = sequences_[sequences_.slot(id)].transfer;
  return transfers_.in_flight(transfer) ? transfer : TransferId::none;
}

// A transfer that is in flight ends only after those that it waits for.
void BlockManager::require_may_end(TransferId id) const {
  const auto text = [](TransferId t) { return std::to_string(static_cast<std::int64_t>(t)); };
  const TransferTable::Transfer* transfer = transfers_.find(id);
  if (transfer == nullptr) {
    throw InvalidState("transfer " + text(id) +
                       " is not in flight: it was never planned, or ended");
  }
  for (const TransferId before : transfer->wait_for) {
    if (!transfers_.in_flight(before)) continue;
    throw InvalidState("transfer " + text(id) + " cannot end before transfer " + text(before) +
                       ", which it waits for");
  }
}

void BlockManager::complete(TransferId id) {
  require_no_open_step();
  require_may_end(id);
  transfers_.close(id);
}

std::vector<TransferId> BlockManager::transfers() const {
  std::vector<TransferId> ids;
  for (const TransferTable::Transfer& transfer : transfers_.transfers()) ids.push_back(transfer.id);
  return ids;
}

Aborted BlockManager::abort(TransferId id) {
  require_no_open_step();
  require_may_end(id);
  Aborted aborted;
  std::vector<TransferId> failed{id};
  for (TransferTable::Transfer& transfer : transfers_.transfers()) {  // ids ascend, so one pass
    const auto is_failed = [&](TransferId t) {
      return std::ranges::find(failed, t) != failed.end();
    };
    if (transfer.is_void || transfer.id == id ||
        std::ranges::none_of(transfer.depends_on, is_failed)) {
      continue;
    }
    failed.push_back(transfer.id);
    aborted.transfers.push_back(transfer.id);
  }
  for (std::uint32_t slot = 0; slot < sequences_.num_slots(); ++slot) {
    if (sequences_[slot].tip == NodeId::none) continue;
    if (std::ranges::find(failed, sequences_[slot].transfer) == failed.end()) continue;
    aborted.sequences.push_back(sequences_.id(slot));
    aborted.waited_for.push_back(sequences_[slot].transfer);
  }
  for (const SequenceId sequence : aborted.sequences) drop_path(sequences_.slot(sequence));
  for (const TransferId t : failed) {
    TransferTable::Transfer& transfer = *transfers_.find(t);
    for (const auto& [node, block] : transfer.landings) {
      if (transfers_.landing(transfer.target, block) != t) continue;
      transfers_.land(transfer.target, block);
      // It may have gone with an ancestor, or with its last holder.
      if (!tree_.node(node).live || tree_.block(node, transfer.target) != block) continue;
      KV_CHECK(tree_.count(node, transfer.target) == 0);
      tree_.drop_subtree(node, transfer.target);
    }
    // Those that needed it may still be copying: their blocks are waited for until they end.
    transfer.landings.clear();
    transfer.is_void = true;
  }
  transfers_.close(id);
  return aborted;
}

// ------------------------------------------------------------------------------- recomputation

// Room for tokens that the sequence would hold; none where there is no memory for them, since a
// sequence that forgets them only has more to compute.
std::span<Token> BlockManager::want(std::uint32_t slot, std::int32_t first_block,
                                    std::size_t num_tokens) {
  try {
    Wanted& wanted = wanted_[slot] = {first_block, std::vector<Token>(num_tokens)};
    return wanted.tokens;
  } catch (const std::bad_alloc&) {
    return {};
  }
}

void BlockManager::drop(std::span<const SequenceId> ids) {
  require_no_open_step();
  begin_batch();
  for (std::size_t i = 0; i < ids.size(); ++i) require_path(enter(ids[i], i));
  for (const SequenceId id : ids) drop_path(sequences_.slot(id));
}

// The sequence ends at its root, and remembers which tokens it held.
void BlockManager::drop_path(std::uint32_t slot) {
  Sequence& sequence = sequences_[slot];
  const std::int32_t size = num_blocks(sequence.length);
  wanted_.erase(slot);
  const std::span<Token> tokens = want(slot, 0, static_cast<std::size_t>(sequence.known));
  NodeId node = sequence.tip;
  for (std::int32_t i = size; i-- > 0; node = tree_.node(node).parent) {
    const auto first = static_cast<std::size_t>(i) * static_cast<std::size_t>(block_size_);
    if (first >= tokens.size()) continue;
    const std::span<Token> part = tokens.subspan(first);
    std::copy_n(tree_.tokens(node), std::min(part.size(), std::size_t(block_size_)), part.data());
  }
  tree_.ref(node, Tier::device);
  tree_.unref(sequence.tip, sequence.tier, Leave::hot);
  num_logical_ -= size;
  sequence.standing() = {.tip = node, .dropped = true};
  sequence.lower_row(0);
}

void BlockManager::restore(std::span<const SequenceId> ids) {
  require_no_open_step();
  begin_batch();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (sequences_[enter(ids[i], i)].dropped) continue;
    throw InvalidState("ids[" + std::to_string(i) +
                       "] was not dropped, and has nothing to restore");
  }
  for (const SequenceId id : ids) {  // memory first: what follows cannot fail
    const std::uint32_t slot = sequences_.slot(id);
    const auto wanted = wanted_.find(slot);
    if (wanted == wanted_.end()) continue;
    const auto size = static_cast<std::int32_t>(wanted->second.tokens.size());
    sequences_.grow_row(sequences_[slot], num_blocks(size));
  }
  for (const SequenceId id : ids) {
    const std::uint32_t slot = sequences_.slot(id);
    std::vector<Token> tokens;
    if (const auto wanted = wanted_.find(slot); wanted != wanted_.end()) {
      tokens = std::move(wanted->second.tokens);
      wanted_.erase(wanted);
    }
    take_hit(slot, tokens);
    sequences_[slot].dropped = false;
  }
}

}  // namespace pagedkv
