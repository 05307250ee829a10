#pragma once

#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/kernels/kv_layer.h"

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
                   kernels::TileFormat format, const std::byte* from);

  const kernels::KvLayer layer_;
  Tile keys_;
  Tile values_;
};

}  // namespace modularbase
