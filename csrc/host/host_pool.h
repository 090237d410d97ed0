// Keys and values in host memory: the copies of copy-on-write, scatter and gather. The reference
// for every other device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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

// Checks every block and slot before it touches memory. Does not own it.
class HostPool {
 public:
  // Blocks 0 .. num_blocks - 1 exist in every region.
  HostPool(std::vector<Region> regions, std::int32_t num_blocks, std::int32_t block_size);

  std::size_t num_regions() const { return regions_.size(); }

  // Rows of `copies`: source block, target block, tokens. In every region.
  void copy_blocks(std::span<const std::int32_t> copies) const;

  // Token t comes from source + t * source_stride and goes to slots[t].
  void scatter(std::size_t region, std::span<const std::int64_t> slots, const std::byte* source,
               std::int64_t source_stride) const;

  // For each row b, num_tokens[b] tokens from block first_block of it on. The target is dense,
  // [rows, num_heads, width, token_bytes / num_heads], zeros past each row's tokens.
  void gather(std::size_t region, const TableView& table, std::int32_t first_block,
              std::span<const std::int32_t> num_tokens, std::int32_t num_heads, std::int32_t width,
              std::byte* target) const;

 private:
  const Region& region(std::size_t i) const;

  std::vector<Region> regions_;
  std::int32_t num_blocks_;
  std::int32_t block_size_;
};

}  // namespace pagedkv
