// The front door of core: commands in, plans out. The same commands always give the same plans.
//
// Every command checks all it needs before it changes anything, so that an Error leaves the state
// as it was. One step may be open at a time; while it is, only questions, commit() and rollback()
// are allowed.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/block_tree.h"
#include "core/plan.h"
#include "core/sequence.h"
#include "core/step_buffers.h"
#include "core/transfer_table.h"
#include "core/types.h"

namespace pagedkv {

struct Config {
  std::int64_t num_device_blocks = 0;
  std::int64_t num_host_blocks = 0;
  std::int64_t block_size = 16;
  std::int64_t max_batch = 256;
  std::optional<std::int64_t> max_model_len;  // default: what the device tier holds
  std::int64_t watermark = 0;                 // blocks that a sequence's first append must leave
  std::uint64_t seed = 0;                     // of the hashes; decides no result

  void validate() const;           // throws InvalidSpec naming the argument
  std::int64_t model_len() const;  // tokens of the longest sequence that there may be
};

class BlockManager {
 public:
  explicit BlockManager(const Config& config);

  const Config& config() const { return config_; }
  // What the tables of such a manager take, without building one.
  static double metadata_bytes(const Config& config);

  // --- sequences. `salt` chooses the root; without tokens the sequence is anonymous.
  SequenceId create(std::span<const Token> tokens, std::string_view salt);
  SequenceId create_anonymous();
  std::int64_t num_cached(SequenceId id) const { return sequences_[sequences_.slot(id)].cached; }
  std::int64_t length(SequenceId id) const { return sequences_[sequences_.slot(id)].length; }
  PrefixHit lookup(std::span<const Token> tokens, std::string_view salt) const;
  std::vector<SequenceId> fork(SequenceId id, std::int64_t n);  // n ids, the first is `id` itself
  void reorder(std::span<const SequenceId> ids, std::span<const std::int64_t> parents);
  void truncate(std::span<const SequenceId> ids, std::span<const std::int64_t> lengths);
  void release(std::span<const SequenceId> ids);
  void clear(std::optional<std::string_view> salt);

  // --- steps. Without `tokens`: not known yet. Without `counts`: one token each. Without
  // `lengths`: all of them stay.
  using Numbers = std::optional<std::span<const std::int64_t>>;
  const StepPlan& append(std::span<const SequenceId> ids,
                         std::optional<std::span<const Token>> tokens = {}, Numbers counts = {});
  void commit(std::int64_t step, Numbers lengths = {});
  void rollback(std::int64_t step);
  const StepPlan& plan() const { return plan_; }
  std::int64_t open_step() const { return open_ ? plan_.step : 0; }  // its number; 0: there is none
  void record(std::span<const SequenceId> ids, std::span<const Token> tokens, Numbers counts = {});

  // --- between tiers. A whole path moves: a shared block once, and none that is there already.
  TransferPlan swap_out(std::span<const SequenceId> ids);
  TransferPlan swap_in(std::span<const SequenceId> ids);
  // The part of create()'s or restore()'s prompt that only the host still has.
  TransferPlan fetch(SequenceId id);
  void complete(TransferId transfer);  // all its copies have ended, and succeeded
  // Its copies have ended, or will never begin, and count for nothing.
  Aborted abort(TransferId transfer);

  std::vector<TransferId> transfers() const;  // planned and not ended, by ascending id

  // --- recomputation. A dropped sequence gives up its path and remembers its tokens; restored, it
  // holds what is still a prefix hit of them.
  void drop(std::span<const SequenceId> ids);
  void restore(std::span<const SequenceId> ids);

  // --- questions
  Tier tier(SequenceId id) const { return sequences_[sequences_.slot(id)].tier; }
  bool is_dropped(SequenceId id) const { return sequences_[sequences_.slot(id)].dropped; }
  bool is_resident(SequenceId id) const;  // it can be in a step
  // The transfer in flight that the sequence waits for; none: it is where it lives.
  TransferId waits_for(SequenceId id) const;
  std::int64_t num_needed(std::span<const SequenceId> ids, Numbers counts = {});
  std::int64_t num_freed(std::span<const SequenceId> ids);
  std::int32_t num_table_blocks(SequenceId id) const;
  void block_table(SequenceId id, std::span<BlockId> table) const;
  Stats stats() const;
  Snapshot snapshot() const;
  void verify() const;

 private:
  // How a sequence writes its next token.
  enum class Write : std::uint8_t {
    extend,     // into a new block: its last one is full, or there is none
    in_place,   // into its last block, which nobody else needs from there on
    copy,       // into a copy of it
    take_over,  // in place, into a published block that loses its publication
  };
  // One row of a batch: what append() decided, and what rollback() restores.
  struct Entry {
    std::uint32_t slot;
    NodeId tip;
    std::int32_t length;
    std::int32_t known;
    std::int32_t count;
    std::int32_t block_at;  // length == block_at * block_size + offset
    std::uint16_t offset;
    Write write;
    bool admits;
  };

  // What a row becomes in reorder(), read before any row changes.
  struct Move {
    std::uint32_t slot;
    std::int32_t common;  // leading blocks that stay
    Standing to;
  };
  // A prefix of tokens that the device has.
  struct Hit {
    NodeId full;                    // where its full blocks end
    NodeId partial = NodeId::none;  // the child of `full` that holds the first of `rest`, if any
    NodeId beyond = NodeId::none;   // the one that holds a block of `rest`, not (yet) on the device
    std::int32_t num_full_blocks = 0;
    std::int32_t num_partial_tokens = 0;
    std::span<const Token> rest;  // behind the full blocks
  };
  // Tokens that a sequence would hold, from its block `first_block` on.
  struct Wanted {
    std::int32_t first_block;
    std::vector<Token> tokens;
  };

  // n / block_size by one multiplication, for 0 <= n < 2^32.
  std::int32_t blocks_below(std::int32_t n) const {
    if (reciprocal_ == 0) return n;
    return static_cast<std::int32_t>(
        (static_cast<unsigned __int128>(reciprocal_) * static_cast<std::uint64_t>(n)) >> 64);
  }
  std::int32_t num_blocks(std::int32_t length) const {
    return blocks_below(length + block_size_ - 1);
  }
  std::int32_t offset(std::int32_t length) const {
    return length - blocks_below(length) * block_size_;
  }

  void require_no_open_step() const;
  void require_open(std::int64_t step) const;
  void begin_batch() {  // each sequence may enter once from here on
    if (++mark_ == 0) mark_ = 1;
  }
  [[noreturn]] static void repeated(SequenceId id, std::size_t i);
  std::uint32_t enter(SequenceId id, std::size_t i) {  // ids[i] is live and new to this batch
    const std::uint32_t slot = sequences_.slot(id);
    if (sequences_[slot].mark == mark_) [[unlikely]]
      repeated(id, i);
    sequences_[slot].mark = mark_;
    return slot;
  }
  void require_host_tier() const;
  void require_may_end(TransferId id) const;
  void require_resident(std::uint32_t slot) const;
  void require_path(std::uint32_t slot) const;  // not dropped
  static void check_sizes(std::size_t ids, std::size_t others, const char* name);
  NodeId ancestor(NodeId node, std::int32_t steps) const;
  std::int32_t num_common_blocks(const Sequence& a, const Sequence& b) const;
  void fill_row(Sequence& sequence) const;
  void note_peak();
  Hit find_hit(NodeId root, std::span<const Token> tokens) const;
  void take_hit(std::uint32_t slot, std::span<const Token> tokens);
  bool is_hit(NodeId node) const {  // on the device
    const BlockId block = tree_.block(node, Tier::device);
    return block != BlockId::none && transfers_.landing(Tier::device, block) == TransferId::none;
  }
  bool is_fetchable(NodeId node) const;
  std::pair<NodeId, std::int32_t> find_fetchable(NodeId node, std::span<const Token> tokens) const;
  TransferPlan move(std::span<const SequenceId> ids, Tier source, Tier target);
  std::size_t require_blocks(std::span<const NodeId> tips, Tier target);
  TransferPlan plan_paths(std::span<const NodeId> tips, Tier target, std::size_t num_copies);
  std::span<Token> want(std::uint32_t slot, std::int32_t first_block, std::size_t num_tokens);
  void drop_path(std::uint32_t slot);
  std::size_t check_record(std::span<const SequenceId> ids, std::span<const Token> tokens,
                           Numbers counts);
  void publish_chain(Sequence& sequence, std::int32_t first_block);

  std::int64_t decide(std::span<const SequenceId> ids, Numbers counts, std::vector<Entry>& entries);
  void check_count(std::size_t i, std::int64_t count, std::int32_t length) const;
  void undecide(std::vector<Entry>& entries);
  std::int64_t take_over(std::vector<Entry>& entries, std::int64_t excess);
  void write(const Entry& entry, const Token* tokens, std::int64_t at);
  void send_row(std::int32_t row, SequenceId id, Sequence& sequence);
  void keep(const Entry& entry, std::int32_t length);

  void verify_sequences(BlockTree::Ends& ends) const;
  void verify_transfers() const;

  const Config config_;
  const std::int32_t block_size_;
  const std::int32_t max_model_len_;
  const std::uint64_t reciprocal_;
  BlockTree tree_;
  TransferTable transfers_;
  SequenceTable sequences_;
  std::unordered_map<std::uint32_t, Wanted> wanted_;  // by slot
  std::uint32_t mark_ = 0;

  StepBuffers buffers_;
  StepPlan plan_;
  bool open_ = false;
  std::int64_t last_committed_ = 0;   // the step
  std::vector<Entry> entries_;        // of the open step
  std::vector<std::int32_t> filled_;  // rows of the open step in which a block became full
  std::vector<Entry> asked_;          // of num_needed()
  std::vector<NodeId> chain_;         // of publish_chain()
  std::vector<NodeId> tips_;          // of move()
  std::vector<NodeId> placed_;        // of plan_paths()
  std::vector<std::uint32_t> slots_;  // of reorder()
  std::vector<Move> moves_;

  std::int64_t num_logical_ = 0;
  Stats totals_;
};

}  // namespace pagedkv
