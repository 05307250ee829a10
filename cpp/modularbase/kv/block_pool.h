#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "modularbase/core/types.h"

namespace modularbase {

/// Hands out block ids and counts who holds each. Keeps true: a block is free exactly when nobody
/// holds it. Engine thread only.
class BlockPool {
 public:
  explicit BlockPool(std::int64_t n_blocks);

  /// A block with one holder, or nothing when all are held.
  std::optional<BlockId> allocate();
  void retain(BlockId block);
  void release(BlockId block);

  int n_holders(BlockId block) const { return holders_[static_cast<std::size_t>(block)]; }
  std::int64_t n_blocks() const { return static_cast<std::int64_t>(holders_.size()); }
  std::int64_t n_free() const { return static_cast<std::int64_t>(free_.size()); }

 private:
  std::vector<int> holders_;
  std::vector<BlockId> free_;
};

}  // namespace modularbase
