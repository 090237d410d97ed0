#include "host/host_pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pagedkv {

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace

HostPool::HostPool(std::vector<Region> regions, std::int32_t num_blocks, std::int32_t block_size)
    : regions_(std::move(regions)), num_blocks_(num_blocks), block_size_(block_size) {
  require(num_blocks > 0 && block_size > 0, "num_blocks and block_size: expected positive numbers");
  for (const Region& r : regions_) {
    require(r.base != nullptr && r.token_bytes > 0 && r.block_stride >= r.token_bytes * block_size,
            "regions: expected a base, and blocks that do not overlap");
  }
}

const Region& HostPool::region(std::size_t i) const {
  require(i < regions_.size(), "region: no such region");
  return regions_[i];
}

void HostPool::copy_blocks(std::span<const std::int32_t> copies) const {
  require(copies.size() % 3 == 0, "copies: expected rows of three");
  for (std::size_t i = 0; i < copies.size(); i += 3) {
    const bool inside = copies[i] >= 0 && copies[i] < num_blocks_ && copies[i + 1] >= 0 &&
                        copies[i + 1] < num_blocks_ && copies[i + 2] >= 0 &&
                        copies[i + 2] <= block_size_;
    require(inside, "copies: a block or token count is outside the pool");
  }
  for (const Region& r : regions_) {
    for (std::size_t i = 0; i < copies.size(); i += 3) {
      if (copies[i] == copies[i + 1]) continue;
      std::memcpy(r.base + copies[i + 1] * r.block_stride, r.base + copies[i] * r.block_stride,
                  static_cast<std::size_t>(copies[i + 2] * r.token_bytes));
    }
  }
}

void HostPool::scatter(std::size_t i, std::span<const std::int64_t> slots, const std::byte* source,
                       std::int64_t source_stride) const {
  const Region& r = region(i);
  const std::int64_t num_slots = std::int64_t{num_blocks_} * block_size_;
  for (const std::int64_t slot : slots) {
    require(slot >= 0 && slot < num_slots, "slots: a slot is outside the pool");
  }
  std::int64_t block = -1;  // slots mostly run on within a block
  std::byte* at = nullptr;
  for (const std::int64_t slot : slots) {
    if (slot / block_size_ != block) {
      block = slot / block_size_;
      at = r.base + block * r.block_stride - block * block_size_ * r.token_bytes;
    }
    std::memcpy(at + slot * r.token_bytes, source, static_cast<std::size_t>(r.token_bytes));
    source += source_stride;
  }
}

void HostPool::gather(std::size_t i, const TableView& table, std::int32_t first_block,
                      std::span<const std::int32_t> num_tokens, std::byte* target,
                      std::int64_t target_stride) const {
  const Region& r = region(i);
  require(first_block >= 0 && num_tokens.size() == static_cast<std::size_t>(table.num_rows),
          "num_tokens: expected one for each row of the table");
  for (std::int32_t b = 0; b < table.num_rows; ++b) {
    const std::int64_t tokens = num_tokens[static_cast<std::size_t>(b)];
    const std::int64_t last = first_block + (tokens + block_size_ - 1) / block_size_;
    require(tokens >= 0 && last <= table.width && tokens * r.token_bytes <= target_stride,
            "num_tokens: a row reaches past the table or the target");
    for (std::int64_t k = first_block; k < last; ++k) {
      const std::int32_t block = table.cells[b * table.stride + k];
      require(block >= 0 && block < num_blocks_, "block_tables: a block is outside the pool");
    }
  }
  for (std::int32_t b = 0; b < table.num_rows; ++b) {
    const std::int32_t* cells = table.cells + b * table.stride + first_block;
    std::byte* at = target + b * target_stride;
    std::int64_t left = num_tokens[static_cast<std::size_t>(b)];
    for (; left > 0; ++cells) {
      const std::int64_t bytes = std::min<std::int64_t>(left, block_size_) * r.token_bytes;
      std::memcpy(at, r.base + *cells * r.block_stride, static_cast<std::size_t>(bytes));
      at += bytes;
      left -= block_size_;
    }
    const std::byte* end = target + (b + 1) * target_stride;
    std::memset(at, 0, static_cast<std::size_t>(end - at));
  }
}

}  // namespace pagedkv
