#include "core/block_pool.h"

#include "core/check.h"

namespace pagedkv {

BlockPool::BlockPool(std::int32_t num_blocks) : num_blocks_(num_blocks), num_free_(num_blocks) {
  free_.reserve(static_cast<std::size_t>(num_blocks));
  for (std::int32_t i = num_blocks; i > 0; --i) free_.push_back(BlockId{i});
}

BlockId BlockPool::take() {
  KV_CHECK(num_free_ > 0);
  return free_[place(--num_free_)];
}

void BlockPool::give(BlockId block) {
  check_free(block);
  free_[place(num_free_++)] = block;
}

void BlockPool::give_last(BlockId block) {
  check_free(block);
  last_ = (last_ == 0 ? num_blocks_ : last_) - 1;
  ++num_free_;
  free_[place(0)] = block;
}

void BlockPool::check_free(BlockId block) const {
  KV_CHECK(block > BlockId::none && index(block) <= num_blocks_ && num_free_ < num_blocks_);
}

std::vector<BlockId> BlockPool::free_blocks() const {
  std::vector<BlockId> all;
  for (std::int32_t i = 0; i < num_free_; ++i) all.push_back(free_[place(i)]);
  return all;
}

}  // namespace pagedkv
