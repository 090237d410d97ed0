// The free blocks of one tier.
#pragma once

#include <vector>

#include "core/types.h"

namespace pagedkv {

// Hands out blocks 1 .. num_blocks, the one given back last first: it is the warmest in the caches.
class BlockPool {
 public:
  explicit BlockPool(std::int32_t num_blocks);

  BlockId take();            // there is a free block
  void give(BlockId block);  // it came from take()

  std::int32_t num_blocks() const { return num_blocks_; }
  std::int32_t num_free() const { return static_cast<std::int32_t>(free_.size()); }
  const std::vector<BlockId>& free_blocks() const { return free_; }
  std::size_t bytes() const { return free_.capacity() * sizeof(BlockId); }

 private:
  std::int32_t num_blocks_;
  std::vector<BlockId> free_;  // a stack; never reallocated
};

}  // namespace pagedkv
