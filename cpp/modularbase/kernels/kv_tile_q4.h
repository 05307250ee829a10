#pragma once

#include <cstddef>
#include <cstdint>

#include "modularbase/kernels/kv_tile.h"

namespace modularbase::kernels {

/// The two 4-bit tiles are one layout. Along one axis of the tile 32 numbers form a group with one
/// scale: dims for keys, tokens for values. Along the other axis, 16 numbers are the lanes of a
/// vector. A (lane block, group) is 256 bytes: in byte 64 r + 4 lane + i, the low half is element
/// 4 r + i of the group, the high half element 16 + 4 r + i. So 64 bytes are two operands of an
/// integer dot product that sums four neighbours in each lane.
inline constexpr int kQ4Group = 32;
inline constexpr int kQ4Lanes = 16;
inline constexpr int kQ4BlockBytes = kQ4Group * kQ4Lanes / 2;
inline constexpr int kQ4Offset = 8;  // what a half-byte holds is this more than what it stands for

/// Where the numbers of a 4-bit tile lie.
struct Q4Layout {
  std::int64_t head_dim;
  std::int64_t n_groups;  // along the axis that is summed over
  std::int64_t n_lanes;   // along the other: a multiple of 16

  static Q4Layout keys(std::int64_t head_dim) {
    return {head_dim, head_dim / kQ4Group, kBlockTokens};
  }
  static Q4Layout values(std::int64_t head_dim) {
    return {head_dim, kBlockTokens / kQ4Group, head_dim};
  }

  /// F16 [head_dim] begin the tile.
  static const std::uint16_t* mean(const std::byte* tile) {
    return reinterpret_cast<const std::uint16_t*>(tile);
  }
  /// F16 [n_lanes, n_groups].
  const std::uint16_t* scales(const std::byte* tile) const { return mean(tile) + head_dim; }
  /// [kQ4BlockBytes, n_groups, n_lanes / 16].
  const std::uint8_t* nibbles(const std::byte* tile) const {
    return reinterpret_cast<const std::uint8_t*>(scales(tile) + n_groups * n_lanes);
  }
};

std::size_t q4_tile_bytes(std::int64_t head_dim);
/// rows [head_dim, kBlockTokens], as read_tile() and write_tile() have them.
void read_q4_keys(const std::byte* tile, std::int64_t head_dim, float* rows);
void read_q4_values(const std::byte* tile, std::int64_t head_dim, float* rows);
void write_q4_keys(const float* rows, std::int64_t head_dim, std::byte* tile);
void write_q4_values(const float* rows, std::int64_t head_dim, std::byte* tile);

}  // namespace modularbase::kernels
