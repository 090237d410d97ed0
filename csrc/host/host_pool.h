// Keys and values in host memory. What is asked is done when a call returns.
//
// Slots, tables and lengths are checked before anything is done. Another thread may still change
// them meanwhile: then what is done is wrong, but inside the pool, since each is bounded again as
// it is read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfer/pool.h"

namespace pagedkv {

class HostPool final : public Pool {
 public:
  // Blocks 0 .. num_blocks - 1 exist in every region.
  HostPool(std::vector<Region> regions, std::int32_t num_blocks, std::int32_t block_size);

  const std::vector<Region>& regions() const { return regions_; }
  std::int32_t block_size() const { return block_size_; }

  void copy_blocks(std::span<const std::int32_t> copies) override;
  void scatter(std::size_t region, std::span<const std::int64_t> slots, const std::byte* source,
               std::int64_t source_stride) override;
  void write(std::size_t layer, std::span<const std::int64_t> slots, const std::byte* k,
             std::int64_t k_stride, const std::byte* v, std::int64_t v_stride) override;
  void gather(std::size_t region, const TableView& table, std::int32_t first_block,
              std::span<const std::int32_t> num_tokens, std::int32_t num_heads, std::int32_t width,
              std::byte* target) override;
  void synchronize() override {}

  // A block that is there: `block`, unless another thread has changed it since it was checked.
  std::int64_t bounded(std::int32_t block) const {
    return static_cast<std::uint32_t>(block) < static_cast<std::uint32_t>(num_blocks_) ? block : 0;
  }

  // What the calls above check first; InvalidSpec says what is wrong.
  const Region& region(std::size_t i) const;
  void check_copies(std::span<const std::int32_t> copies) const;
  void check_slots(std::size_t region, std::span<const std::int64_t> slots) const;
  void check_gather_shape(std::size_t region, const TableView& table, std::int32_t first_block,
                          std::span<const std::int32_t> num_tokens, std::int32_t num_heads) const;
  void check_gather(std::size_t region, const TableView& table, std::int32_t first_block,
                    std::span<const std::int32_t> num_tokens, std::int32_t num_heads,
                    std::int32_t width) const;

 private:
  struct Part {  // of a token: what goes into one region
    Region region;
    const std::byte* source;
    std::int64_t stride;
  };
  template <std::size_t kNumParts>
  void scatter_parts(std::array<Part, kNumParts> parts, std::span<const std::int64_t> slots) const;
  template <std::size_t kBytes, std::size_t kNumParts>
  void scatter_tokens(std::array<Part, kNumParts> parts, std::span<const std::int64_t> slots) const;

  std::vector<Region> regions_;
  std::int32_t num_blocks_;
  std::int32_t block_size_;
  int shift_ = -1;  // block_size is 1 << shift; -1: it is no power of two
};

}  // namespace pagedkv
