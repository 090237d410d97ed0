// What a step does with the device tier: the copies of copy-on-write, scatter and gather.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/plan.h"

namespace pagedkv {

// One tensor's share of every block: block b lies at base + b * block_stride, and in it token o at
// o * token_bytes. A layer has two regions, its keys and its values.
struct Region {
  std::byte* base;
  std::int64_t block_stride;
  std::int64_t token_bytes;
};

// The cells of a block table that a gather reads: row b starts at cells + b * stride.
struct TableView {
  const std::int32_t* cells;
  std::int64_t stride;
  std::int32_t num_rows;
  std::int32_t width;
};

// The blocks of all regions, as work on the caller's stream. Arrays (slots, tables, ...) are where
// the tensors are: a pool in host memory checks every block and slot before it touches memory; a
// GPU's cannot see them, and both have to stay what they are until the stream has come past.
class Pool {
 public:
  virtual ~Pool() = default;

  // Before a step's first work, on the stream that the caller is going to use for it: brings the
  // plan's arrays to the tensors, and carries out its copies.
  virtual void begin_step(const StepPlan& plan) {
    if (!plan.copies.empty()) copy_blocks(cells_of(plan.copies));
  }

  // Rows of `copies`: source block, target block, tokens. In every region.
  virtual void copy_blocks(std::span<const std::int32_t> copies) = 0;

  // Token t comes from source + t * source_stride and goes to slots[t].
  virtual void scatter(std::size_t region, std::span<const std::int64_t> slots,
                       const std::byte* source, std::int64_t source_stride) = 0;

  // A layer's keys and values, which are regions 2 * layer and 2 * layer + 1.
  virtual void write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
                     std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) {
    scatter(2 * layer, slots, k, k_stride);
    scatter(2 * layer + 1, slots, v, v_stride);
  }

  // For each row b, num_tokens[b] tokens from block first_block of it on. The target is dense,
  // [rows, num_heads, width, token_bytes / num_heads], zeros past each row's tokens.
  virtual void gather(std::size_t region, const TableView& table, std::int32_t first_block,
                      std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                      std::int32_t width, std::byte* target) = 0;

  // Returns when all that these calls queued on the caller's stream has ended.
  virtual void synchronize() = 0;

  // A plan's copies as copy_blocks() takes them.
  static std::span<const std::int32_t> cells_of(std::span<const BlockCopy> copies) {
    static_assert(sizeof(BlockCopy) == 3 * sizeof(std::int32_t));
    return {reinterpret_cast<const std::int32_t*>(copies.data()), 3 * copies.size()};
  }
};

}  // namespace pagedkv
