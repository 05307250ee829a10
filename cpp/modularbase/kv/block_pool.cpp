#include "modularbase/kv/block_pool.h"

#include "modularbase/core/errors.h"

namespace modularbase {

BlockPool::BlockPool(std::int64_t n_blocks, std::size_t block_bytes, KvBudget& budget)
    : block_bytes_(block_bytes), budget_(budget), holders_(static_cast<std::size_t>(n_blocks), 0) {
  free_.reserve(holders_.size());
  for (std::int64_t i = n_blocks - 1; i >= 0; --i) free_.push_back(static_cast<BlockId>(i));
}

std::optional<BlockId> BlockPool::allocate() {
  if (free_.empty() || !budget_.take(block_bytes_)) return std::nullopt;
  const BlockId block = free_.back();
  free_.pop_back();
  holders_[static_cast<std::size_t>(block)] = 1;
  return block;
}

void BlockPool::retain(BlockId block) {
  int& n = holders_.at(static_cast<std::size_t>(block));
  if (n == 0) throw Error("kv block " + std::to_string(block) + ": retained while free");
  ++n;
}

void BlockPool::release(BlockId block) {
  int& n = holders_.at(static_cast<std::size_t>(block));
  if (n == 0) throw Error("kv block " + std::to_string(block) + ": released while free");
  if (--n > 0) return;
  free_.push_back(block);
  budget_.give(block_bytes_);
}

}  // namespace modularbase
