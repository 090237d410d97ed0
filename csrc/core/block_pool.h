// The free blocks of one tier.
#pragma once

#include <vector>

#include "core/types.h"

namespace pagedkv {

// Hands out blocks 1 .. num_blocks, the one given back last first: it is the warmest in the caches.
// But one that a transfer still touches comes after all others, since its taker has to wait.
class BlockPool {
 public:
  explicit BlockPool(std::int32_t num_blocks);

  BlockId take();            // there is a free block
  void give(BlockId block);  // it came from take()
  void give_last(BlockId block);

  std::int32_t num_blocks() const { return num_blocks_; }
  std::int32_t num_free() const { return num_free_; }
  std::vector<BlockId> free_blocks() const;
  std::size_t bytes() const { return free_.capacity() * sizeof(BlockId); }

 private:
  std::size_t place(std::int32_t i) const {  // of the i-th free block, counted from the last
    const std::int32_t at = last_ + i;
    return static_cast<std::size_t>(at < num_blocks_ ? at : at - num_blocks_);
  }
  void check_free(BlockId block) const;

  std::int32_t num_blocks_;
  std::vector<BlockId> free_;  // a ring
  std::int32_t last_ = 0;      // where the block that comes last is
  std::int32_t num_free_;
};

}  // namespace pagedkv
