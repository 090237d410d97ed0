#include "core/block_pool.h"

#include "core/check.h"

namespace pagedkv {

BlockPool::BlockPool(std::int32_t num_blocks) : num_blocks_(num_blocks) {
  free_.reserve(static_cast<std::size_t>(num_blocks));
  for (std::int32_t i = num_blocks; i > 0; --i) free_.push_back(BlockId{i});
}

BlockId BlockPool::take() {
  KV_CHECK(!free_.empty());
  const BlockId block = free_.back();
  free_.pop_back();
  return block;
}

void BlockPool::give(BlockId block) {
  KV_CHECK(block > BlockId::none && index(block) <= num_blocks_ && num_free() < num_blocks_);
  free_.push_back(block);
}

}  // namespace pagedkv
