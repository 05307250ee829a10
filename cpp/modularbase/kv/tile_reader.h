#pragma once

#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kernels/attention.h"

namespace modularbase {

/// Where a token or slot lies.
struct TokenPlace {
  kernels::KvTier memory = kernels::kExactTier;
  BlockId block = -1;
  std::int32_t index = 0;  // in the block
};

/// Keys and values of one layer as floats. Keeps the tile it read last: tokens that are wanted
/// together mostly lie together.
class TileReader {
 public:
  explicit TileReader(const kernels::KvLayer& layer);

  /// [head_dim], until the next call.
  const float* key(const TokenPlace& place, std::int64_t head);
  const float* value(const TokenPlace& place, std::int64_t head);
  /// Of a slot.
  float log_weight(const TokenPlace& place, std::int64_t head) const;

 private:
  struct Tile {
    kernels::KvTier memory = kernels::kExactTier;
    BlockId block = -1;
    std::int64_t head = -1;
    std::vector<float> rows;  // [head_dim, 64]
  };
  const float* row(Tile& tile, const TokenPlace& place, std::int64_t head,
                   kernels::TileFormat format, const std::byte* first);

  const kernels::KvLayer layer_;
  Tile keys_;
  Tile values_;
};

/// The tile of (block, head) behind `first` = a KvTierLayer's k or v.
std::byte* tile_at(const kernels::KvLayer& layer, kernels::KvTier memory, BlockId block,
                   std::int64_t head, std::byte* first, kernels::TileFormat format);
/// F32 [64]: of (block, head).
float* log_weights_at(const kernels::KvLayer& layer, BlockId block, std::int64_t head);

}  // namespace modularbase
