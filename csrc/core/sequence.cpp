#include "core/sequence.h"

#include <algorithm>
#include <bit>

#include "core/check.h"

namespace pagedkv {

SequenceId SequenceTable::id(std::uint32_t slot) const {
  return SequenceId{static_cast<std::int64_t>(
      (static_cast<std::uint64_t>(slots_[slot].generation) << 32) | slot)};
}

void SequenceTable::reserve(std::size_t more) {
  if (free_.size() >= more) return;
  const std::size_t needed = size() + more;
  if (needed > slots_.capacity()) slots_.reserve(std::max(needed, 2 * slots_.capacity()));
  free_.reserve(slots_.capacity());
}

std::uint32_t SequenceTable::open() {
  reserve(1);
  if (free_.empty()) {
    free_.push_back(static_cast<std::uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  Sequence& sequence = slots_[slot];
  KV_CHECK(sequence.tip == NodeId::none);
  // The sign bit stays clear; 2^31 lives of one slot are out of reach.
  sequence.generation = (sequence.generation + 1) & 0x7fffffffu;
  sequence.standing() = {};
  sequence.row_valid = sequence.sent_valid = 0;
  sequence.sent_row = -1;
  return slot;
}

void SequenceTable::close(std::uint32_t slot) {
  slots_[slot].tip = NodeId::none;
  free_.push_back(slot);  // reserve() keeps room for every slot
}

void SequenceTable::grow_row(Sequence& sequence, std::int32_t num_blocks) {
  if (num_blocks <= sequence.row_capacity) return;
  const auto capacity = std::bit_ceil(std::max<std::uint32_t>(16, num_blocks));
  auto row = std::make_unique_for_overwrite<BlockId[]>(capacity);
  std::copy_n(sequence.row.get(), sequence.row_valid, row.get());
  sequence.row = std::move(row);
  row_bytes_ += (capacity - static_cast<std::size_t>(sequence.row_capacity)) * sizeof(BlockId);
  sequence.row_capacity = static_cast<std::int32_t>(capacity);
}

std::size_t SequenceTable::bytes() const {
  return slots_.capacity() * sizeof(Sequence) + free_.capacity() * sizeof(std::uint32_t) +
         row_bytes_;
}

}  // namespace pagedkv
