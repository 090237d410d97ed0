// Publication: of tokens that come late, record(), and of the blocks that a step filled.
#include <algorithm>
#include <string>

#include "core/block_manager.h"
#include "core/error.h"

namespace pagedkv {

// Returns the nodes that a record() may touch in all, and takes the memory for its longest path.
std::size_t BlockManager::check_record(std::span<const SequenceId> ids,
                                       std::span<const Token> tokens, Numbers counts) {
  if (counts) check_sizes(ids.size(), counts->size(), "counts");
  begin_batch();
  std::int64_t total = 0;
  std::size_t num_nodes = 0;
  std::int32_t longest = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::uint32_t slot = enter(ids[i], i);
    const Sequence& sequence = sequences_[slot];
    if (sequence.may_be_away()) require_resident(slot);
    const std::int64_t count = counts ? (*counts)[i] : 1;
    const std::int64_t unknown = sequence.length - sequence.known;
    if (count < 1 || count > unknown) {
      throw InvalidSpec("counts[" + std::to_string(i) + "] is " + std::to_string(count) +
                        ", expected 1 to the sequence's tokens without an id, " +
                        std::to_string(unknown));
    }
    total += count;
    const std::int32_t below = num_blocks(sequence.length) - blocks_below(sequence.known);
    num_nodes += static_cast<std::size_t>(below);
    longest = std::max(longest, below);
  }
  if (total != static_cast<std::int64_t>(tokens.size())) {
    throw InvalidSpec("tokens has " + std::to_string(tokens.size()) + " entries, expected " +
                      std::to_string(total) + ", the sum of counts");
  }
  chain_.reserve(static_cast<std::size_t>(longest));
  return num_nodes;
}

void BlockManager::record(std::span<const SequenceId> ids, std::span<const Token> tokens,
                          Numbers counts) {
  require_no_open_step();
  const std::size_t most_nodes = check_record(ids, tokens, counts);
  // Write all tokens, or on a contradiction between sharers none; then publish.
  struct Undo {
    NodeId node;
    std::uint16_t known;
  };
  std::vector<Undo> undo;
  undo.reserve(most_nodes);
  std::size_t at = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = sequences_[sequences_.slot(ids[i])];
    const auto count = static_cast<std::int32_t>(counts ? (*counts)[i] : 1);
    const std::int32_t last = blocks_below(sequence.known + count - 1);
    const std::int32_t num_nodes = last - blocks_below(sequence.known) + 1;
    chain_.resize(static_cast<std::size_t>(num_nodes));
    NodeId node = ancestor(sequence.tip, num_blocks(sequence.length) - 1 - last);
    for (std::int32_t k = num_nodes; k-- > 0; node = tree_.node(node).parent) {
      chain_[static_cast<std::size_t>(k)] = node;
    }
    std::int32_t position = sequence.known;
    for (const NodeId id : chain_) {
      undo.push_back({id, tree_.node(id).known});
      for (std::int32_t o = offset(position); o < block_size_ && position < sequence.known + count;
           ++o, ++position, ++at) {
        if (o < tree_.node(id).known) {
          if (tree_.tokens(id)[o] == tokens[at]) continue;
          for (; !undo.empty(); undo.pop_back()) {
            tree_.set_fill(undo.back().node, tree_.node(undo.back().node).fill, undo.back().known);
          }
          throw InvalidSpec("tokens[" + std::to_string(at) + "] is " + std::to_string(tokens[at]) +
                            ", but a sequence that shares this block recorded " +
                            std::to_string(tree_.tokens(id)[o]));
        }
        tree_.tokens(id)[o] = tokens[at];
        tree_.set_fill(id, tree_.node(id).fill, o + 1);
      }
    }
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = sequences_[sequences_.slot(ids[i])];
    const std::int32_t first_block = blocks_below(sequence.known);
    sequence.known += static_cast<std::int32_t>(counts ? (*counts)[i] : 1);
    publish_chain(sequence, first_block);
  }
}

// The nodes of the path from `first_block` on that have become complete are published; one that has
// an equal published sibling gives way to it. Only while the sequence alone runs through them: a
// node that others share from there on stays private, and so does all below it.
void BlockManager::publish_chain(Sequence& sequence, std::int32_t first_block) {
  const std::int32_t size = num_blocks(sequence.length) - first_block;
  chain_.resize(static_cast<std::size_t>(size));
  std::int32_t own = 0;  // from here on each node has one holder
  NodeId node = sequence.tip;
  for (std::int32_t k = size; k-- > 0; node = tree_.node(node).parent) {
    chain_[static_cast<std::size_t>(k)] = node;
    if (own == 0 && tree_.num_holders(node) != 1) own = k + 1;
  }
  for (std::int32_t k = 0; k < size; ++k) {
    const NodeId id = chain_[static_cast<std::size_t>(k)];
    if (tree_.node(id).published) continue;
    if (k < own || !tree_.may_publish(id)) return;
    const NodeId equal = tree_.find_equal(id);
    if (equal == NodeId::none) {
      tree_.publish(id);
      continue;
    }
    // A sequence that runs is not made to wait for a transfer: its path stays private instead.
    if (transfers_.landing(Tier::device, tree_.block(equal, Tier::device)) != TransferId::none) {
      return;
    }
    if (tree_.block(equal, Tier::device) == BlockId::none) {
      tree_.adopt_block(equal, id, Tier::device);
    } else {
      ++totals_.num_merged_blocks;
    }
    tree_.ref(equal, sequence.tier);
    if (k + 1 < size) {
      tree_.adopt(chain_[static_cast<std::size_t>(k + 1)], equal);
    } else {
      sequence.tip = equal;
    }
    tree_.remove(id, sequence.tier);
    sequence.lower_row(first_block + k);
  }
}

}  // namespace pagedkv
