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

/// The [head_dim, kBlockTokens] tile of a (block, head).
inline const std::uint16_t* cache_tile(const void* pool, const KvLayer& kv, std::int32_t block,
                                       std::int64_t head) {
  return static_cast<const std::uint16_t*>(pool) + block * kv.block_stride +
         head * kBlockTokens * kv.head_dim;
}

}  // namespace modularbase::kernels
