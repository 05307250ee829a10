#include "modularbase/kv/tile_reader.h"

namespace modularbase {

using kernels::kBlockTokens;
using kernels::TileFormat;

TileReader::TileReader(const kernels::KvLayer& layer) : layer_(layer) {
  const auto n = static_cast<std::size_t>(layer.head_dim * kBlockTokens);
  keys_.rows.resize(n);
  values_.rows.resize(n);
}

const float* TileReader::row(Tile& tile, const TokenPlace& place, std::int64_t head,
                             TileFormat format, const std::byte* from) {
  if (tile.memory != place.memory || tile.block != place.block || tile.head != head) {
    kernels::read_tile(format, from, layer_.head_dim, tile.rows.data());
    tile.memory = place.memory;
    tile.block = place.block;
    tile.head = head;
  }
  return tile.rows.data() + place.index * layer_.head_dim;
}

const float* TileReader::key(const TokenPlace& place, std::int64_t head) {
  return row(keys_, place, head, layer_.tiers[place.memory].k_format,
             layer_.key_tile(place.memory, place.block, head));
}

const float* TileReader::value(const TokenPlace& place, std::int64_t head) {
  return row(values_, place, head, layer_.tiers[place.memory].v_format,
             layer_.value_tile(place.memory, place.block, head));
}

float TileReader::log_weight(const TokenPlace& place, std::int64_t head) const {
  return layer_.log_weights(place.memory, place.block, head)[place.index];
}

}  // namespace modularbase
