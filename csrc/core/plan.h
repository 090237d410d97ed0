// All that leaves core: plain values that say what to do.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"

namespace pagedkv {

// A row of StepPlan::copies: the first `num_tokens` tokens of one device block into another.
struct BlockCopy {
  BlockId source;
  BlockId target;
  std::int32_t num_tokens;
};

// A row of StepPlan::table_updates: cells [first, last) of one row of the block table changed.
struct TableUpdate {
  std::int32_t row;
  std::int32_t first;
  std::int32_t last;
};

// One step over a batch of B sequences and T new tokens, as views of the manager's buffers, whose
// addresses never change. Valid until the next append.
//
// All copies precede all writes of the step, and no copy's target is another's source, so the
// copies may run in any order.
struct StepPlan {
  std::int64_t step = 0;
  std::int64_t after = 0;  // the last step that was committed before it; 0 if none was
  std::int32_t batch_size = 0;
  std::int64_t num_tokens = 0;
  bool has_tokens = false;
  const std::int64_t* input_ids = nullptr;     // [T] if has_tokens
  const std::int64_t* slots = nullptr;         // [T] block * block_size + offset
  const std::int64_t* positions = nullptr;     // [T]
  const std::int32_t* query_starts = nullptr;  // [B + 1]
  const std::int32_t* seq_lens = nullptr;      // [B], after the step
  const BlockId* block_tables = nullptr;       // [B, table_width], rows table_stride apart
  std::int32_t table_width = 0;                // the widest row of this step
  std::int32_t table_stride = 0;
  std::span<const BlockCopy> copies;
  std::span<const TableUpdate> table_updates;
  std::span<const TransferId> wait_for;  // transfers that must have ended before any of this
};

// Copies of blocks from one tier to the other, to be carried out in any order and beside the steps
// that follow. Not before the steps that were committed earlier, nor before the transfers in
// `wait_for`. The manager learns of its end by complete() or abort().
struct TransferPlan {
  TransferId id = TransferId::none;
  Tier target = Tier::host;          // device: swap in, host: swap out
  std::vector<BlockCopy> copies;     // source block of the other tier, target block, tokens in it
  std::vector<TransferId> wait_for;  // transfers that must have ended before any of this
  std::int64_t after = 0;            // the last step that was committed before it
};

// What abort() took along.
struct Aborted {
  std::vector<TransferId> transfers;   // that needed the aborted one, and are void
  std::vector<SequenceId> sequences;   // that lost their path, and may be restored or released
  std::vector<TransferId> waited_for;  // by each of these
};

struct PrefixHit {
  std::int64_t num_tokens = 0;  // on the device, which create() takes
  std::int32_t num_full_blocks = 0;
  std::int32_t num_partial_tokens = 0;
  std::int64_t num_host_tokens = 0;  // beyond the full blocks, which fetch() brings
};

struct TierStats {
  std::int32_t num_blocks = 0;
  std::int32_t num_free = 0;
  std::int32_t num_active = 0;
  std::int32_t num_cached = 0;
};

struct Stats {
  TierStats device;
  TierStats host;
  std::int64_t num_sequences = 0;
  std::int64_t num_logical_blocks = 0;   // sum over sequences: what no sharing would take
  std::int64_t num_peak_blocks = 0;      // most device blocks ever active at once
  std::int64_t num_steps = 0;            // committed
  std::int64_t num_appended_tokens = 0;  // committed
  std::int64_t num_hit_tokens = 0;       // found by create(), fetch() and restore()
  std::int64_t num_copies = 0;           // planned
  std::int64_t num_merged_blocks = 0;
  std::int64_t num_evicted_blocks = 0;
  std::int64_t num_swapped_out_blocks = 0;  // planned copies
  std::int64_t num_swapped_in_blocks = 0;
  std::int64_t num_transfers = 0;  // planned and not ended
  std::int64_t metadata_bytes = 0;
};

// The tree at one moment, one entry a node, parents before children.
struct Snapshot {
  std::vector<std::int32_t> parents;  // position in these vectors; -1: a root
  std::vector<std::int32_t> blocks;   // on the device; 0: none
  std::vector<std::int32_t> num_tokens;
  std::vector<std::int32_t> counts;
  std::vector<std::int32_t> host_blocks;
  std::vector<std::int32_t> host_counts;
  std::vector<bool> published;
  std::vector<std::int64_t> sequence_ids;
  std::vector<std::int32_t> sequence_nodes;  // -1: empty
  std::vector<std::int64_t> sequence_lengths;
  std::vector<std::uint8_t> sequence_tiers;
};

}  // namespace pagedkv
