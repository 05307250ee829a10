#pragma once

#include <cstdint>

#include "modularbase/kernels/attention.h"
#include "modularbase/kernels/simd.h"

namespace modularbase::kernels {

/// How a cache type's elements become floats.
struct F16Cache {
  static simd::Vec load(const std::uint16_t* p) { return simd::load_f16(p); }
};
struct BF16Cache {
  static simd::Vec load(const std::uint16_t* p) { return simd::load_bf16(p); }
};

/// The [head_dim, kBlockTokens] tile of keys, or of values, of a (block, head).
inline std::byte* key_tile(const KvLayer& kv, const KvTierLayer& tier, std::int64_t block,
                           std::int64_t head) {
  return tier.k + static_cast<std::size_t>(block) * tier.block_stride +
         static_cast<std::size_t>(head) * tile_bytes(tier.k_format, kv.head_dim);
}
inline std::byte* value_tile(const KvLayer& kv, const KvTierLayer& tier, std::int64_t block,
                             std::int64_t head) {
  return tier.v + static_cast<std::size_t>(block) * tier.block_stride +
         static_cast<std::size_t>(head) * tile_bytes(tier.v_format, kv.head_dim);
}

}  // namespace modularbase::kernels
