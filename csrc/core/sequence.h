// Sequences: where a path ends, how long it is, and its row of the block table.
#pragma once

#include <memory>
#include <vector>

#include "core/error.h"
#include "core/types.h"

namespace pagedkv {

// Where a sequence stands: all that one forked from it, or reordered to it, has in common with it.
struct Standing {
  NodeId tip = NodeId::none;  // none: this slot is free
  std::int32_t length = 0;
  std::int32_t known = 0;                  // leading tokens whose ids are known
  std::int32_t cached = 0;                 // tokens that create() found
  TransferId transfer = TransferId::none;  // the last one that its blocks came with
  bool admitted = false;                   // has committed an append
  bool dropped = false;                    // lost its path, and was not restored yet
  Tier tier = Tier::device;
};

// row[0 .. row_valid) equals the path's blocks; the rest is filled by walking up from the tip when
// somebody needs it. Of these, the first `sent_valid` cells stand in row `sent_row` of the batch's
// table too, if that row is still this sequence's.
struct alignas(64) Sequence : Standing {
  std::uint32_t generation = 0;
  std::uint32_t mark = 0;  // of the last batch that named it
  std::unique_ptr<BlockId[]> row;
  std::int32_t row_capacity = 0;
  std::int32_t row_valid = 0;
  std::int32_t sent_row = -1;
  std::int32_t sent_valid = 0;

  Standing& standing() { return *this; }

  // False: nothing can be in the way of a step.
  bool may_be_away() const {
    return transfer != TransferId::none || dropped || tier != Tier::device;
  }

  void lower_row(std::int32_t valid) {
    if (row_valid > valid) row_valid = valid;
    if (sent_valid > valid) sent_valid = valid;
  }
};
static_assert(sizeof(Sequence) == 64);

// Slots and ids. An id carries its slot's generation, so that a stale one is never another's.
class SequenceTable {
 public:
  std::uint32_t slot(SequenceId id) const {  // throws UnknownSequence
    const auto bits = static_cast<std::uint64_t>(id);
    const auto slot = static_cast<std::uint32_t>(bits);
    if (slot < slots_.size()) [[likely]] {
      const Sequence& sequence = slots_[slot];
      if (sequence.generation == bits >> 32 && sequence.tip != NodeId::none) [[likely]]
        return slot;
    }
    throw UnknownSequence(id);
  }
  Sequence& operator[](std::uint32_t slot) { return slots_[slot]; }
  const Sequence& operator[](std::uint32_t slot) const { return slots_[slot]; }
  SequenceId id(std::uint32_t slot) const;

  void reserve(std::size_t more);  // the next `more` open() calls neither allocate nor throw
  std::uint32_t open();            // a slot with its row's memory, and nothing else, left in place
  void close(std::uint32_t slot);
  void grow_row(Sequence& sequence, std::int32_t num_blocks);

  std::size_t size() const { return slots_.size() - free_.size(); }
  std::size_t num_slots() const { return slots_.size(); }
  std::size_t bytes() const;

 private:
  std::vector<Sequence> slots_;
  std::vector<std::uint32_t> free_;
  std::size_t row_bytes_ = 0;  // of all slots
};

}  // namespace pagedkv
