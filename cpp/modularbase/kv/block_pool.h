#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kv/kv_budget.h"

namespace modularbase {

/// Hands out block ids and counts who holds each. Keeps true: a block is free exactly when nobody
/// holds it, and the others' bytes are taken from the budget. Engine thread only.
class BlockPool {
 public:
  /// The budget outlives the pool.
  BlockPool(std::int64_t n_blocks, std::size_t block_bytes, KvBudget& budget);

  /// A block with one holder, or nothing when all are held or the budget is spent.
  std::optional<BlockId> allocate();
  void retain(BlockId block);
  void release(BlockId block);

  int n_holders(BlockId block) const { return holders_[static_cast<std::size_t>(block)]; }
  std::int64_t n_blocks() const { return static_cast<std::int64_t>(holders_.size()); }
  std::int64_t n_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::size_t block_bytes() const { return block_bytes_; }

 private:
  const std::size_t block_bytes_;
  KvBudget& budget_;
  std::vector<int> holders_;
  std::vector<BlockId> free_;
};

}  // namespace modularbase
