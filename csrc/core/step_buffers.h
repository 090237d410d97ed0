// The memory behind StepPlan: allocated once, so that every address in a plan but that of wait_for
// stays what it is.
#pragma once

#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "core/plan.h"

namespace pagedkv {

// Zeroed memory that the system maps when it is first touched, so that a generous bound is free.
template <class T>
class LazyArray {
 public:
  explicit LazyArray(std::size_t size)
      : data_(static_cast<T*>(std::calloc(size > 0 ? size : 1, sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }
  T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

struct StepBuffers {
  StepBuffers(std::size_t max_batch, std::size_t max_tokens, std::size_t max_blocks)
      : input_ids(max_tokens),
        slots(max_tokens),
        positions(max_tokens),
        query_starts(max_batch + 1),
        seq_lens(max_batch),
        block_tables(max_batch * max_blocks),
        owners(max_batch, SequenceId{-1}),
        widths(max_batch, 0) {
    copies.reserve(max_batch);         // at most one copy and one update a row,
    table_updates.reserve(max_batch);  // so these never move
  }

  LazyArray<std::int64_t> input_ids;
  LazyArray<std::int64_t> slots;
  LazyArray<std::int64_t> positions;
  LazyArray<std::int32_t> query_starts;
  LazyArray<std::int32_t> seq_lens;
  LazyArray<BlockId> block_tables;
  std::vector<SequenceId> owners;    // whose blocks stand in each row of the table,
  std::vector<std::int32_t> widths;  // and how many; the rest of the row is padding
  std::vector<BlockCopy> copies;
  std::vector<TableUpdate> table_updates;
  std::vector<TransferId> wait_for;  // moves as it grows
};

}  // namespace pagedkv
