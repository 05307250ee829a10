#pragma once

#include <algorithm>
#include <cstdint>

#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

inline constexpr int kMaxGroup = 4;  // query heads per pass: their sums fit the registers
// Pages of a part at most, and the distance of two heads' scores of them.
inline constexpr int kMaxPages = std::max(kPartSegments, kPartBlocks);
inline constexpr int kScoreStride = kMaxPages * kBlockTokens;

/// What one block shows of one head.
struct Page {
  const KvTierLayer* tier;
  const std::byte* k;
  const std::byte* v;
  const float* log_weight;  // [kBlockTokens], added to the scores; or null
  std::uint64_t visible;    // never 0
};

inline Page page_of(const KvLayer& kv, std::int32_t tier, std::int64_t block, std::int64_t head,
                    std::uint64_t visible) {
  return {&kv.tiers[tier], kv.key_tile(tier, block, head), kv.value_tile(tier, block, head),
          kv.log_weights(tier, block, head), visible};
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

}  // namespace modularbase::kernels
