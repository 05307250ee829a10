#pragma once

#include <cstddef>
#include <cstdint>

#include "modularbase/kernels/kv_tile.h"

namespace modularbase::kernels {

/// Which blocks a token's keys and values lie in, by how much of it is kept.
enum KvTier : std::int32_t {
  kExactTier,
  kImportantTier,
  kRedundantTier,  // slots; not of the heads of the next
  kDetailTier,     // the tokens that slots stand for, of the heads that cannot do without them
};
inline constexpr int kNKvTiers = 4;

/// One tier's keys and values of one layer.
struct KvTierLayer {
  TileFormat k_format;
  TileFormat v_format;
  std::byte* k;  // of block 0; null: this layer lacks the tier
  std::byte* v;
  std::byte* log_weight;                // F32 [64, tile] of each block of slots; else null
  std::size_t block_stride;             // bytes from a block to the next, in all three
  const std::int32_t* tiles = nullptr;  // of each head, -1: it lacks the tier; null: all in order

  std::int64_t tile(std::int64_t head) const { return tiles ? tiles[head] : head; }
  bool has(std::int64_t head) const { return k && tile(head) >= 0; }
};

/// The keys and values of one layer.
struct KvLayer {
  std::int64_t n_head_kv;
  std::int64_t head_dim;
  KvTierLayer tiers[kNKvTiers];

  /// The tile of a (block, head) that has the tier.
  std::byte* key_tile(std::int32_t tier, std::int64_t block, std::int64_t head) const {
    return tile_of(tiers[tier], tiers[tier].k, tiers[tier].k_format, block, head);
  }
  std::byte* value_tile(std::int32_t tier, std::int64_t block, std::int64_t head) const {
    return tile_of(tiers[tier], tiers[tier].v, tiers[tier].v_format, block, head);
  }
  /// [kBlockTokens], added to the scores; null where the tier has none.
  float* log_weights(std::int32_t tier, std::int64_t block, std::int64_t head) const {
    const KvTierLayer& of = tiers[tier];
    if (!of.log_weight) return nullptr;
    std::byte* first = of.log_weight + static_cast<std::size_t>(block) * of.block_stride;
    return reinterpret_cast<float*>(first) + of.tile(head) * kBlockTokens;
  }

 private:
  std::byte* tile_of(const KvTierLayer& tier, std::byte* first, TileFormat format,
                     std::int64_t block, std::int64_t head) const {
    return first + static_cast<std::size_t>(block) * tier.block_stride +
           static_cast<std::size_t>(tier.tile(head)) * tile_bytes(format, head_dim);
  }
};

}  // namespace modularbase::kernels
