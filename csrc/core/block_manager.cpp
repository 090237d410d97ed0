#include "core/block_manager.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "core/error.h"

namespace pagedkv {

namespace {

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  throw InvalidSpec(std::string(name) + " is " + std::to_string(value) + ", expected " +
                    std::to_string(least) + " to " + std::to_string(most));
}

constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 30) - 1;
constexpr std::int64_t kMaxLength = (std::int64_t{1} << 31) - 1 - kMaxBlockSize;

const Config& checked(const Config& config) {
  config.validate();
  return config;
}

}  // namespace

void Config::validate() const {
  check_range("num_device_blocks", num_device_blocks, 1, kMaxBlocks);
  check_range("num_host_blocks", num_host_blocks, 0, kMaxBlocks);
  check_range("block_size", block_size, 1, kMaxBlockSize);
  check_range("max_batch", max_batch, 1, kMaxBatch);
  check_range("watermark", watermark, 0, num_device_blocks - 1);
  if (max_model_len) check_range("max_model_len", *max_model_len, 1, kMaxLength);
}

std::int64_t Config::model_len() const {
  return std::min(max_model_len.value_or(num_device_blocks * block_size), kMaxLength);
}

double BlockManager::metadata_bytes(const Config& config) {
  const double blocks = static_cast<double>(config.num_device_blocks + config.num_host_blocks);
  const double per_block = sizeof(Node) + 4.0 * static_cast<double>(config.block_size) + 48.0;
  return blocks * per_block;
}

BlockManager::BlockManager(const Config& config)
    : config_(checked(config)),
      block_size_(static_cast<std::int32_t>(config.block_size)),
      max_model_len_(static_cast<std::int32_t>(config.model_len())),
      reciprocal_(
          block_size_ == 1 ? 0 : ~std::uint64_t{0} / static_cast<std::uint64_t>(block_size_) + 1),
      tree_(static_cast<std::int32_t>(config.num_device_blocks),
            static_cast<std::int32_t>(config.num_host_blocks), block_size_, config.seed),
      transfers_(static_cast<std::int32_t>(config.num_device_blocks),
                 static_cast<std::int32_t>(config.num_host_blocks)),
      buffers_(static_cast<std::size_t>(config.max_batch),
               static_cast<std::size_t>(config.num_device_blocks * config.block_size),
               static_cast<std::size_t>(num_blocks(max_model_len_))) {
  plan_.input_ids = buffers_.input_ids.data();
  plan_.slots = buffers_.slots.data();
  plan_.positions = buffers_.positions.data();
  plan_.query_starts = buffers_.query_starts.data();
  plan_.seq_lens = buffers_.seq_lens.data();
  plan_.block_tables = buffers_.block_tables.data();
  plan_.table_stride = num_blocks(max_model_len_);
  entries_.reserve(static_cast<std::size_t>(config.max_batch));
  filled_.reserve(static_cast<std::size_t>(config.max_batch));
}

// ---------------------------------------------------------------------------------- checking

void BlockManager::require_no_open_step() const {
  if (!open_) return;
  throw InvalidState("step " + std::to_string(plan_.step) +
                     " is open: commit() or roll it back first");
}

void BlockManager::check_sizes(std::size_t ids, std::size_t others, const char* name) {
  if (ids == others) return;
  throw InvalidSpec(std::string(name) + " has " + std::to_string(others) + " entries, expected " +
                    std::to_string(ids) + ", one for each of ids");
}

void BlockManager::require_resident(std::uint32_t slot) const {
  const Sequence& sequence = sequences_[slot];
  require_path(slot);
  if (sequence.tier == Tier::host) {
    throw NotResident(sequences_.id(slot), "is in host memory: swap it in, or resume() it, first");
  }
  if (transfers_.in_flight(sequence.transfer)) {
    throw NotResident(sequences_.id(slot), "waits for a transfer that has not ended",
                      sequence.transfer);
  }
}

void BlockManager::require_path(std::uint32_t slot) const {
  if (!sequences_[slot].dropped) return;
  throw NotResident(sequences_.id(slot),
                    "was dropped, and holds nothing: restore() it (resume() in a KVCache) first");
}

void BlockManager::repeated(SequenceId id, std::size_t i) {
  throw InvalidSpec("ids[" + std::to_string(i) + "] repeats the sequence " +
                    std::to_string(static_cast<std::int64_t>(id)) +
                    ": each may appear once in a call");
}

// ----------------------------------------------------------------------------------- sharing

std::vector<SequenceId> BlockManager::fork(SequenceId id, std::int64_t n) {
  require_no_open_step();
  check_range("n", n, 1, kMaxBatch);
  const std::uint32_t source_slot = sequences_.slot(id);
  require_path(source_slot);
  const auto size = static_cast<std::size_t>(n);
  sequences_.reserve(size - 1);  // from here on no reference into the table moves
  Sequence& source = sequences_[source_slot];
  fill_row(source);
  std::vector<SequenceId> ids(size, id);
  for (std::size_t i = 1; i < size; ++i) {
    const std::uint32_t slot = sequences_.open();
    Sequence& child = sequences_[slot];
    child.standing() = source.standing();
    try {
      sequences_.grow_row(child, source.row_capacity);
    } catch (...) {
      sequences_.close(slot);
      release(std::span(ids).subspan(1, i - 1));
      throw;
    }
    std::copy_n(source.row.get(), source.row_valid, child.row.get());
    child.row_valid = source.row_valid;
    tree_.ref(child.tip, child.tier);
    num_logical_ += num_blocks(child.length);
    ids[i] = sequences_.id(slot);
  }
  return ids;
}

// ------------------------------------------------------------------- giving up parts of paths

NodeId BlockManager::ancestor(NodeId node, std::int32_t steps) const {
  for (; steps > 0; --steps) node = tree_.node(node).parent;
  return node;
}

std::int32_t BlockManager::num_common_blocks(const Sequence& a, const Sequence& b) const {
  const std::int32_t num_a = num_blocks(a.length);
  const std::int32_t num_b = num_blocks(b.length);
  std::int32_t common = std::min(num_a, num_b);
  NodeId node_a = ancestor(a.tip, num_a - common);
  NodeId node_b = ancestor(b.tip, num_b - common);
  for (; common > 0 && node_a != node_b; --common) {
    node_a = tree_.node(node_a).parent;
    node_b = tree_.node(node_b).parent;
  }
  return common;
}

void BlockManager::reorder(std::span<const SequenceId> ids, std::span<const std::int64_t> parents) {
  require_no_open_step();
  check_sizes(ids.size(), parents.size(), "parents");
  begin_batch();
  slots_.clear();
  moves_.clear();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    slots_.push_back(enter(ids[i], i));
    require_path(slots_.back());
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t p = parents[i];
    if (p < 0 || p >= static_cast<std::int64_t>(ids.size())) {
      throw InvalidSpec("parents[" + std::to_string(i) + "] is " + std::to_string(p) +
                        ", expected a position in ids, 0 to " + std::to_string(ids.size() - 1));
    }
    if (p == static_cast<std::int64_t>(i)) continue;
    const Sequence& from = sequences_[slots_[static_cast<std::size_t>(p)]];
    moves_.push_back({slots_[i], num_common_blocks(sequences_[slots_[i]], from), from});
  }
  for (const Move& move : moves_)
    sequences_.grow_row(sequences_[move.slot], num_blocks(move.to.length));
  // Take every new reference before dropping any: one parent may feed all rows.
  for (const Move& move : moves_) tree_.ref(move.to.tip, move.to.tier);
  for (const Move& move : moves_) {
    Sequence& sequence = sequences_[move.slot];
    tree_.unref(sequence.tip, sequence.tier, Leave::cold);
    num_logical_ += num_blocks(move.to.length) - num_blocks(sequence.length);
    sequence.lower_row(sequence.tier == move.to.tier ? move.common : 0);
    sequence.standing() = move.to;
    if (!wanted_.empty()) wanted_.erase(move.slot);
  }
}

void BlockManager::truncate(std::span<const SequenceId> ids,
                            std::span<const std::int64_t> lengths) {
  require_no_open_step();
  check_sizes(ids.size(), lengths.size(), "lengths");
  begin_batch();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::uint32_t slot = enter(ids[i], i);
    require_path(slot);
    const Sequence& sequence = sequences_[slot];
    if (lengths[i] < 0 || lengths[i] > sequence.length) {
      throw InvalidSpec("lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                        ", expected 0 to the sequence's length, " +
                        std::to_string(sequence.length));
    }
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = sequences_[sequences_.slot(ids[i])];
    const auto length = static_cast<std::int32_t>(lengths[i]);
    const std::int32_t dropped = num_blocks(sequence.length) - num_blocks(length);
    if (dropped > 0) {
      const NodeId tip = ancestor(sequence.tip, dropped);
      tree_.ref(tip, sequence.tier);
      tree_.unref(sequence.tip, sequence.tier, Leave::cold);
      sequence.tip = tip;
      sequence.lower_row(num_blocks(length));
      num_logical_ -= dropped;
    }
    sequence.length = length;
    sequence.known = std::min(sequence.known, length);
    sequence.cached = std::min(sequence.cached, length);
    if (!wanted_.empty()) wanted_.erase(sequences_.slot(ids[i]));
  }
}

void BlockManager::release(std::span<const SequenceId> ids) {
  require_no_open_step();
  begin_batch();
  for (std::size_t i = 0; i < ids.size(); ++i) enter(ids[i], i);
  for (const SequenceId id : ids) {
    const std::uint32_t slot = sequences_.slot(id);
    Sequence& sequence = sequences_[slot];
    tree_.unref(sequence.tip, sequence.tier, Leave::hot);
    num_logical_ -= num_blocks(sequence.length);
    if (!wanted_.empty()) wanted_.erase(slot);
    sequences_.close(slot);
  }
}

void BlockManager::clear(std::optional<std::string_view> salt) {
  require_no_open_step();
  salt ? tree_.clear(*salt) : tree_.clear_all();
}

// --------------------------------------------------------------------------------- questions

void BlockManager::note_peak() {
  const std::int64_t num_active =
      tree_.pool(Tier::device).num_blocks() - tree_.num_available(Tier::device);
  totals_.num_peak_blocks = std::max(totals_.num_peak_blocks, num_active);
}

void BlockManager::fill_row(Sequence& sequence) const {
  const std::int32_t size = num_blocks(sequence.length);
  NodeId node = sequence.tip;
  for (std::int32_t i = size; i-- > sequence.row_valid; node = tree_.node(node).parent) {
    sequence.row[static_cast<std::size_t>(i)] = tree_.block(node, sequence.tier);
  }
  sequence.row_valid = size;
}

std::int32_t BlockManager::num_table_blocks(SequenceId id) const {
  return num_blocks(sequences_[sequences_.slot(id)].length);
}

void BlockManager::block_table(SequenceId id, std::span<BlockId> table) const {
  const std::uint32_t slot = sequences_.slot(id);
  require_resident(slot);
  NodeId node = sequences_[slot].tip;
  for (std::size_t i = table.size(); i-- > 0; node = tree_.node(node).parent) {
    table[i] = tree_.block(node, Tier::device);
  }
}

std::int64_t BlockManager::num_freed(std::span<const SequenceId> ids) {
  begin_batch();
  std::int64_t freed = 0;
  std::unordered_map<NodeId, std::int32_t> leaving;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Sequence& sequence = sequences_[enter(ids[i], i)];
    if (sequence.tier != Tier::device) continue;
    for (NodeId node = sequence.tip; !tree_.is_root(node); node = tree_.node(node).parent) {
      if (++leaving[node] < tree_.count(node, Tier::device)) break;
      ++freed;
    }
  }
  return freed;
}

Stats BlockManager::stats() const {
  Stats stats = totals_;
  const auto tier_stats = [this](Tier tier) {
    const BlockPool& pool = tree_.pool(tier);
    TierStats s{pool.num_blocks(), pool.num_free(), 0, tree_.num_cached(tier)};
    s.num_active = s.num_blocks - s.num_free - s.num_cached;
    return s;
  };
  stats.device = tier_stats(Tier::device);
  stats.host = tier_stats(Tier::host);
  stats.num_sequences = static_cast<std::int64_t>(sequences_.size());
  stats.num_logical_blocks = num_logical_;
  stats.num_evicted_blocks = tree_.num_evicted();
  stats.num_transfers = static_cast<std::int64_t>(transfers_.transfers().size());
  stats.metadata_bytes =
      static_cast<std::int64_t>(tree_.bytes() + sequences_.bytes() + transfers_.bytes());
  return stats;
}

}  // namespace pagedkv
