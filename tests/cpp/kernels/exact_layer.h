#pragma once

#include <cstdint>

#include "modularbase/kernels/attention.h"

namespace modularbase::kernels {

/// A layer of exact blocks alone, whose tiles follow one another: elements
/// [head_dim, kBlockTokens, n_head_kv, n_blocks] of 16 bits.
inline KvLayer exact_layer(TileFormat format, std::uint16_t* k, std::uint16_t* v,
                           std::int64_t n_head_kv, std::int64_t head_dim) {
  KvLayer layer{.n_head_kv = n_head_kv, .head_dim = head_dim, .tiers = {}};
  layer.tiers[kExactTier] = {
      .k_format = format,
      .v_format = format,
      .k = reinterpret_cast<std::byte*>(k),
      .v = reinterpret_cast<std::byte*>(v),
      .log_weight = nullptr,
      .block_stride = static_cast<std::size_t>(n_head_kv) * tile_bytes(format, head_dim)};
  return layer;
}

}  // namespace modularbase::kernels
