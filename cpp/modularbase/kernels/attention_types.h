#pragma once

#include <algorithm>
#include <cstdint>

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

/// The tile of keys, or of values, of a (block, head).
inline std::byte* key_tile(const KvLayer& kv, const KvTierLayer& tier, std::int64_t block,
                           std::int64_t head) {
  return tier.k + static_cast<std::size_t>(block) * tier.block_stride +
         static_cast<std::size_t>(tier.tile(head)) * tile_bytes(tier.k_format, kv.head_dim);
}
inline std::byte* value_tile(const KvLayer& kv, const KvTierLayer& tier, std::int64_t block,
                             std::int64_t head) {
  return tier.v + static_cast<std::size_t>(block) * tier.block_stride +
         static_cast<std::size_t>(tier.tile(head)) * tile_bytes(tier.v_format, kv.head_dim);
}

/// What one block shows of one head.
struct Page {
  const KvTierLayer* tier;
  const std::byte* k;
  const std::byte* v;
  const float* log_weight;  // [kBlockTokens], added to the scores; or null
  std::uint64_t visible;    // never 0
};

inline Page page_of(const KvLayer& kv, std::int32_t tier_index, std::int64_t block,
                    std::int64_t head, std::uint64_t visible) {
  const KvTierLayer& tier = kv.tiers[tier_index];
  const float* log_weight = nullptr;
  if (tier.log_weight) {
    log_weight = reinterpret_cast<const float*>(tier.log_weight + static_cast<std::size_t>(block) *
                                                                      tier.block_stride) +
                 tier.tile(head) * kBlockTokens;
  }
  return {&tier, key_tile(kv, tier, block, head), value_tile(kv, tier, block, head), log_weight,
          visible};
}

/// The index of a row's place in its window, counted over layers; -1 where nobody wants it, or
/// where a later row of the span takes the same place.
inline std::int64_t window_row(const AttentionSpan& span, int layer, int row) {
  const QueryWindow* window = span.window;
  const std::int32_t position = span.pos0 + row;
  if (!window || position % window->stride != 0) return -1;
  if (row + window->stride * window->n_rows < span.n_rows) return -1;
  const std::int64_t first = static_cast<std::int64_t>(layer) * window->n_rows;
  return first + position / window->stride % window->n_rows;
}

/// Bits [first, end) of a block, 0 <= first < end <= kBlockTokens.
inline std::uint64_t token_bits(int first, int end) {
  return ~std::uint64_t{0} << first & ~std::uint64_t{0} >> (kBlockTokens - end);
}

/// Fetches bytes that are read later, a step at a time while others are computed: the memory never
/// rests.
class Prefetch {
 public:
  Prefetch(const std::byte* begin, std::ptrdiff_t n_bytes, int n_steps)
      : at_(begin), end_(begin + n_bytes), step_bytes_(n_bytes / n_steps / kLine * kLine + kLine) {}

  void step() {
    const std::byte* stop = at_ + std::min(step_bytes_, end_ - at_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, kIntoL2);
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64;
  static constexpr int kIntoL2 = 2;
  const std::byte* at_;
  const std::byte* end_;
  std::ptrdiff_t step_bytes_;
};

/// The tiles that a thread reads after those it is computing.
class TilesAhead {
 public:
  void add(const std::byte* tile, std::size_t n_bytes) {
    tiles_[n_tiles_++] = {tile, static_cast<std::ptrdiff_t>(n_bytes)};
    n_bytes_ += static_cast<float>(n_bytes);
  }
  /// Everything is to be fetched in the time of so many computed bytes.
  void spread(std::size_t n_bytes) { share_ = n_bytes_ / static_cast<float>(n_bytes); }

  /// What to fetch, in so many steps, while a tile of n_bytes is computed.
  Prefetch take(std::size_t n_bytes, int n_steps) {
    due_ += share_ * static_cast<float>(n_bytes);
    if (next_ == n_tiles_) return Prefetch(nullptr, 0, 1);
    Tile& tile = tiles_[next_];
    const Tile part = {tile.begin, std::min(static_cast<std::ptrdiff_t>(due_), tile.n_bytes)};
    due_ -= static_cast<float>(part.n_bytes);
    tile = {tile.begin + part.n_bytes, tile.n_bytes - part.n_bytes};
    if (tile.n_bytes == 0) ++next_;
    return Prefetch(part.begin, part.n_bytes, n_steps);
  }

 private:
  struct Tile {
    const std::byte* begin;
    std::ptrdiff_t n_bytes;
  };
  Tile tiles_[4 * kPartPages];  // of two items
  int n_tiles_ = 0;
  int next_ = 0;
  float n_bytes_ = 0.0f;
  float share_ = 0.0f;
  float due_ = 0.0f;
};

}  // namespace modularbase::kernels
