#include "modularbase/kv/tile_reader.h"

namespace modularbase {

using kernels::kBlockTokens;
using kernels::KvTier;
using kernels::TileFormat;

TileReader::TileReader(const kernels::KvLayer& layer) : layer_(layer) {
  const auto n = static_cast<std::size_t>(layer.head_dim * kBlockTokens);
  keys_.rows.resize(n);
  values_.rows.resize(n);
}

const float* TileReader::row(Tile& tile, const TokenPlace& place, std::int64_t head,
                             TileFormat format, const std::byte* first) {
  if (tile.memory != place.memory || tile.block != place.block || tile.head != head) {
    const std::byte* from =
        tile_at(layer_, place.memory, place.block, head, const_cast<std::byte*>(first), format);
    kernels::read_tile(format, from, layer_.head_dim, tile.rows.data());
    tile.memory = place.memory;
    tile.block = place.block;
    tile.head = head;
  }
  return tile.rows.data() + place.index * layer_.head_dim;
}

const float* TileReader::key(const TokenPlace& place, std::int64_t head) {
  const kernels::KvTierLayer& tier = layer_.tiers[place.memory];
  return row(keys_, place, head, tier.k_format, tier.k);
}

const float* TileReader::value(const TokenPlace& place, std::int64_t head) {
  const kernels::KvTierLayer& tier = layer_.tiers[place.memory];
  return row(values_, place, head, tier.v_format, tier.v);
}

float TileReader::log_weight(const TokenPlace& place, std::int64_t head) const {
  return log_weights_at(layer_, place.block, head)[place.index];
}

std::byte* tile_at(const kernels::KvLayer& layer, KvTier memory, BlockId block, std::int64_t head,
                   std::byte* first, TileFormat format) {
  const kernels::KvTierLayer& tier = layer.tiers[memory];
  return first + static_cast<std::size_t>(block) * tier.block_stride +
         static_cast<std::size_t>(tier.tile(head)) * kernels::tile_bytes(format, layer.head_dim);
}

float* log_weights_at(const kernels::KvLayer& layer, BlockId block, std::int64_t head) {
  const kernels::KvTierLayer& tier = layer.tiers[kernels::kRedundantTier];
  std::byte* at = tier.log_weight + static_cast<std::size_t>(block) * tier.block_stride;
  return reinterpret_cast<float*>(at) + tier.tile(head) * kBlockTokens;
}

}  // namespace modularbase
