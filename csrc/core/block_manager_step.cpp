// Steps: append(), commit() and rollback().
#include <algorithm>
#include <cstring>
#include <string>

#include "core/block_manager.h"
#include "core/check.h"
#include "core/error.h"

namespace pagedkv {

// Decides in batch order how each sequence writes, and returns how many blocks that takes. A copied
// node is marked as being left, so that the last holder of all may write in place.
std::int64_t BlockManager::decide(std::span<const SequenceId> ids, Numbers counts,
                                  std::vector<Entry>& entries) {
  if (ids.size() > static_cast<std::size_t>(config_.max_batch)) {
    throw InvalidSpec(
        "ids has " + std::to_string(ids.size()) +
        " entries, expected at most max_batch = " + std::to_string(config_.max_batch));
  }
  if (counts) check_sizes(ids.size(), counts->size(), "counts");
  begin_batch();
  entries.clear();
  entries.reserve(ids.size());
  std::int64_t needed = 0;
  try {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const std::uint32_t slot = enter(ids[i], i);
      Sequence& sequence = sequences_[slot];
      if (sequence.may_be_away()) [[unlikely]] {
        require_resident(slot);
        sequence.transfer = TransferId::none;
      }
      const std::int64_t count = counts ? (*counts)[i] : 1;
      check_count(i, count, sequence.length);
      const std::int32_t block_at = blocks_below(sequence.length);
      const std::int32_t o = sequence.length - block_at * block_size_;
      Entry entry{slot,
                  sequence.tip,
                  sequence.length,
                  sequence.known,
                  static_cast<std::int32_t>(count),
                  block_at,
                  static_cast<std::uint16_t>(o),
                  Write::extend,
                  !sequence.admitted};
      needed += o + entry.count <= block_size_ ? o == 0 : num_blocks(o + entry.count) - (o > 0);
      if (o > 0) {
        const Node& node = tree_.node(entry.tip);
        const bool in_place = o == node.fill ? tree_.sole_holder_stays(entry.tip)
                                             : !node.published && tree_.num_holders(entry.tip) == 1;
        entry.write = in_place ? Write::in_place : Write::copy;
        if (!in_place) {
          tree_.mark_leaving(entry.tip);
          ++needed;
        }
      }
      entries.push_back(entry);
    }
  } catch (...) {
    undecide(entries);
    throw;
  }
  return needed;
}

void BlockManager::check_count(std::size_t i, std::int64_t count, std::int32_t length) const {
  if (count >= 1 && count <= max_model_len_ - length) [[likely]]
    return;
  if (count < 1) {
    throw InvalidSpec("counts[" + std::to_string(i) + "] is " + std::to_string(count) +
                      ", expected at least 1");
  }
  throw InvalidSpec("counts[" + std::to_string(i) + "] is " + std::to_string(count) +
                    " and takes a sequence of " + std::to_string(length) +
                    " tokens past max_model_len = " + std::to_string(max_model_len_));
}

void BlockManager::undecide(std::vector<Entry>& entries) {
  for (const Entry& entry : entries) {
    if (entry.write == Write::copy) tree_.unmark_leaving(entry.tip);
  }
}

// A published block that only its one sequence needs may be written in place, at the price of its
// publication, and of what is cached below it: so a prompt that hits never needs more blocks than
// one that misses.
std::int64_t BlockManager::take_over(std::vector<Entry>& entries, std::int64_t excess) {
  std::int64_t saved = 0;
  for (Entry& entry : entries) {
    if (saved == excess) break;
    if (entry.write != Write::copy || !tree_.node(entry.tip).published ||
        tree_.num_holders(entry.tip) != 1) {
      continue;
    }
    tree_.unmark_leaving(entry.tip);
    entry.write = Write::take_over;
    ++saved;
  }
  return saved;
}

std::int64_t BlockManager::num_needed(std::span<const SequenceId> ids, Numbers counts) {
  const std::int64_t needed = decide(ids, counts, asked_);
  undecide(asked_);
  return needed;
}

const StepPlan& BlockManager::append(std::span<const SequenceId> ids,
                                     std::optional<std::span<const Token>> tokens, Numbers counts) {
  require_no_open_step();
  std::int64_t needed = decide(ids, counts, entries_);
  std::int64_t num_tokens = 0;
  std::int64_t available = tree_.num_available(Tier::device);
  try {
    bool admits = false;
    std::int32_t longest = 0;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const Entry& entry = entries_[i];
      Sequence& sequence = sequences_[entry.slot];
      if (tokens && entry.known < entry.length) {
        throw InvalidSpec("ids[" + std::to_string(i) + "] has " +
                          std::to_string(entry.length - entry.known) +
                          " tokens without an id: record() them before appending known ones");
      }
      sequences_.grow_row(sequence, num_blocks(entry.length + entry.count));
      num_tokens += entry.count;
      admits |= entry.admits;
      longest = std::max(longest, entry.count);
    }
    chain_.reserve(static_cast<std::size_t>(num_blocks(longest)) + 1);  // commit() cannot fail
    buffers_.wait_for.reserve(transfers_.transfers().size());
    if (tokens && num_tokens != static_cast<std::int64_t>(tokens->size())) {
      throw InvalidSpec("tokens has " + std::to_string(tokens->size()) + " entries, expected " +
                        std::to_string(num_tokens) + ", the sum of counts");
    }
    if (admits) available -= config_.watermark;
    if (needed > available) needed -= take_over(entries_, needed - available);
    if (needed > available && needed > 0) {
      throw OutOfBlocks(Tier::device, needed, std::max<std::int64_t>(available, 0));
    }
  } catch (...) {
    undecide(entries_);
    throw;
  }

  open_ = true;
  filled_.clear();
  buffers_.copies.clear();
  buffers_.table_updates.clear();
  buffers_.wait_for.clear();
  plan_.table_width = 0;
  buffers_.query_starts[0] = 0;
  std::int64_t at = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    Sequence& sequence = sequences_[entry.slot];
    const auto row = static_cast<std::int32_t>(i);
    if (tokens && entry.count == 1 && entry.write == Write::in_place) {  // most of decoding
      tree_.put(entry.tip, entry.offset, (*tokens)[static_cast<std::size_t>(at)]);
      const BlockId block = tree_.block(entry.tip, Tier::device);
      transfers_.wait_for(Tier::device, block, buffers_.wait_for);
      buffers_.slots[static_cast<std::size_t>(at)] =
          static_cast<std::int64_t>(block) * block_size_ + entry.offset;
      buffers_.positions[static_cast<std::size_t>(at)] = entry.length;
      sequence.length = sequence.known = entry.length + 1;
    } else {
      write(entry, tokens ? tokens->data() + at : nullptr, at);
    }
    at += entry.count;
    if (tokens && entry.offset + entry.count >= block_size_) filled_.push_back(row);
    buffers_.query_starts[i + 1] = static_cast<std::int32_t>(at);
    buffers_.seq_lens[i] = sequence.length;
    send_row(row, ids[i], sequence);
  }
  if (tokens) std::copy_n(tokens->data(), num_tokens, buffers_.input_ids.data());

  ++plan_.step;
  plan_.after = last_committed_;
  plan_.batch_size = static_cast<std::int32_t>(ids.size());
  plan_.num_tokens = num_tokens;
  plan_.has_tokens = tokens.has_value();
  plan_.copies = buffers_.copies;
  plan_.table_updates = buffers_.table_updates;
  plan_.wait_for = buffers_.wait_for;
  totals_.num_copies += static_cast<std::int64_t>(buffers_.copies.size());
  note_peak();
  return plan_;
}

// Moves one sequence along its path by entry.count tokens, the first of which is the step's `at`th.
void BlockManager::write(const Entry& entry, const Token* tokens, std::int64_t at) {
  Sequence& sequence = sequences_[entry.slot];
  std::int32_t position = entry.length;
  const std::int32_t end = position + entry.count;
  std::int32_t block_at = entry.block_at;
  std::int32_t o = entry.offset;
  NodeId node = entry.tip;
  bool fresh = entry.write == Write::extend;
  if (!fresh) {
    int known = std::min<int>(tree_.node(node).known, o);
    if (entry.write == Write::take_over) tree_.take_over(node);
    if (entry.write == Write::copy) {
      const NodeId parent = tree_.node(entry.tip).parent;
      node = tree_.add(parent, Tier::device);
      tree_.ref(parent, Tier::device);
      std::copy_n(tree_.tokens(entry.tip), known, tree_.tokens(node));
      buffers_.copies.push_back(
          {tree_.block(entry.tip, Tier::device), tree_.block(node, Tier::device), o});
      sequence.lower_row(block_at);
    }
    tree_.set_fill(node, o, known);
  }
  while (position < end) {
    if (fresh) {
      node = tree_.add(node, Tier::device);
      o = 0;
    }
    const BlockId block = tree_.block(node, Tier::device);
    transfers_.claim(Tier::device, block, buffers_.wait_for);
    if (sequence.row_valid == block_at) {
      sequence.row[static_cast<std::size_t>(block_at)] = block;
      ++sequence.row_valid;
    }
    const std::int32_t count = std::min(block_size_ - o, end - position);
    int known = tree_.node(node).known;
    if (tokens != nullptr) {
      std::copy_n(tokens, count, tree_.tokens(node) + o);
      tokens += count;
      known = o + count;
    }
    tree_.set_fill(node, o + count, known);
    std::int64_t* slots = buffers_.slots.data() + at;
    std::int64_t* positions = buffers_.positions.data() + at;
    const std::int64_t slot = static_cast<std::int64_t>(block) * block_size_ + o;
    for (std::int32_t i = 0; i < count; ++i) {
      slots[i] = slot + i;
      positions[i] = static_cast<std::int64_t>(position) + i;
    }
    at += count;
    position += count;
    ++block_at;
    fresh = true;
  }
  num_logical_ += num_blocks(end) - num_blocks(entry.length);
  sequence.tip = node;
  sequence.length = end;
  if (tokens != nullptr) sequence.known = end;
}

// Brings one row of the batch's table up to date: all of it if it was another sequence's, else from
// the first block that changed.
void BlockManager::send_row(std::int32_t row, SequenceId id, Sequence& sequence) {
  const auto r = static_cast<std::size_t>(row);
  const std::int32_t size = num_blocks(sequence.length);
  plan_.table_width = std::max(plan_.table_width, size);
  const bool ours = sequence.sent_row == row && buffers_.owners[r] == id;
  const std::int32_t first = ours ? sequence.sent_valid : 0;
  const std::int32_t last = std::max(size, buffers_.widths[r]);
  if (first == last) return;
  if (sequence.row_valid < size) fill_row(sequence);
  BlockId* cells = buffers_.block_tables.data() + r * static_cast<std::size_t>(plan_.table_stride);
  std::copy(sequence.row.get() + first, sequence.row.get() + size, cells + first);
  std::fill(cells + size, cells + last, BlockId::none);
  buffers_.owners[r] = id;
  buffers_.widths[r] = size;
  buffers_.table_updates.push_back({row, first, last});
  sequence.sent_row = row;
  sequence.sent_valid = size;
}

// ----------------------------------------------------------------------------------- closing

void BlockManager::require_open(std::int64_t step) const {
  if (open_ && step == plan_.step) return;
  throw InvalidState(open_ ? "step " + std::to_string(step) + " is not the open one, which is " +
                                 std::to_string(plan_.step)
                           : "step " + std::to_string(step) +
                                 " is not open: it was committed or rolled back");
}

// Drops the step's tokens from `length` on. What it drops is new and has no other holder.
void BlockManager::keep(const Entry& entry, std::int32_t length) {
  Sequence& sequence = sequences_[entry.slot];
  const std::int32_t size = num_blocks(length);
  num_logical_ -= num_blocks(sequence.length) - size;
  for (std::int32_t k = num_blocks(sequence.length); k > size; --k) {
    const NodeId parent = tree_.node(sequence.tip).parent;
    tree_.drop(sequence.tip);
    sequence.tip = parent;
  }
  sequence.length = length;
  sequence.known = std::min(sequence.known, length);
  sequence.lower_row(size);
  if (entry.write == Write::extend && length == entry.length) return;
  const int fill = length - (size - 1) * block_size_;
  tree_.set_fill(sequence.tip, fill, std::min<int>(tree_.node(sequence.tip).known, fill));
}

void BlockManager::rollback(std::int64_t step) {
  require_open(step);
  for (const Entry& entry : entries_) {
    keep(entry, entry.length);
    Sequence& sequence = sequences_[entry.slot];
    sequence.known = entry.known;
    if (entry.write != Write::copy) continue;
    tree_.remove(sequence.tip, Tier::device);
    sequence.tip = entry.tip;
    sequence.lower_row(entry.block_at);
    tree_.unmark_leaving(entry.tip);
  }
  open_ = false;
}

void BlockManager::commit(std::int64_t step, Numbers lengths) {
  require_open(step);
  if (lengths) {
    check_sizes(entries_.size(), lengths->size(), "lengths");
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const Sequence& sequence = sequences_[entries_[i].slot];
      if ((*lengths)[i] >= entries_[i].length && (*lengths)[i] <= sequence.length) continue;
      throw InvalidSpec("lengths[" + std::to_string(i) + "] is " + std::to_string((*lengths)[i]) +
                        ", expected " + std::to_string(entries_[i].length) + " to " +
                        std::to_string(sequence.length) + ", the length before and after the step");
    }
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const auto length = static_cast<std::int32_t>((*lengths)[i]);
      totals_.num_appended_tokens -= sequences_[entries_[i].slot].length - length;
      if (length < sequences_[entries_[i].slot].length) keep(entries_[i], length);
    }
  }
  for (const Entry& entry : entries_) {
    if (entry.admits) sequences_[entry.slot].admitted = true;
    if (!wanted_.empty()) wanted_.erase(entry.slot);
    if (entry.write != Write::copy) continue;
    tree_.unmark_leaving(entry.tip);
    tree_.unref(entry.tip, Tier::device, Leave::hot);
  }
  for (const std::int32_t row : filled_) {
    const Entry& entry = entries_[static_cast<std::size_t>(row)];
    publish_chain(sequences_[entry.slot], entry.block_at);
  }
  last_committed_ = step;
  ++totals_.num_steps;
  totals_.num_appended_tokens += plan_.num_tokens;
  open_ = false;
}

}  // namespace pagedkv
