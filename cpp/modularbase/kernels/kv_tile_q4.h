#pragma once

#include <cstddef>
#include <cstdint>

#include "modularbase/kernels/kv_tile.h"

namespace modularbase::kernels {

/// Both 4-bit tiles round 32 neighbouring dims of a token's rotated row with one scale. They differ
/// in the order of the half-bytes, which puts what a dot product sums next to each other: keys sum
/// over dims (a group at a time), values over tokens. The other axis runs along the lanes of a
/// vector, 16 at a time. In one run of summed numbers, n of them in each of 16 lanes, byte
/// 64 r + 4 lane + i holds number 4 r + i in its low half and number n / 2 + 4 r + i in the high
/// one: 64 bytes are two operands that sum four numbers in each lane.
inline constexpr int kQ4Group = 32;
inline constexpr int kQ4Lanes = 16;
inline constexpr int kQ4Offset = 8;  // what a half-byte holds is this more than what it stands for

inline constexpr int kQ4KeyRunBytes = kQ4Group * kQ4Lanes / 2;
inline constexpr int kQ4ValueRunBytes = kBlockTokens * kQ4Lanes / 2;

/// Keys: mean, scales, nibbles. Values: scales, nibbles.
struct Q4Layout {
  std::int64_t head_dim;
  bool has_mean;

  static Q4Layout keys(std::int64_t head_dim) { return {head_dim, true}; }
  static Q4Layout values(std::int64_t head_dim) { return {head_dim, false}; }

  std::int64_t n_groups() const { return head_dim / kQ4Group; }
  /// Bytes up to the scales, F16 [kBlockTokens, head_dim / 32].
  std::int64_t scales() const { return has_mean ? 2 * head_dim : 0; }
  /// Bytes up to the half-bytes. Keys: [kQ4KeyRunBytes, head_dim / 32, kBlockTokens / 16]; values:
  /// [kQ4ValueRunBytes, head_dim / 16].
  std::int64_t nibbles() const { return scales() + 2 * kBlockTokens * n_groups(); }
  std::int64_t bytes() const { return nibbles() + kBlockTokens * head_dim / 2; }
};

/// rows [head_dim, kBlockTokens], as read_tile() and write_tile() have them.
void read_q4_keys(const std::byte* tile, std::int64_t head_dim, float* rows);
void read_q4_values(const std::byte* tile, std::int64_t head_dim, float* rows);
void write_q4_keys(const float* rows, std::int64_t head_dim, std::byte* tile);
void write_q4_values(const float* rows, std::int64_t head_dim, std::byte* tile);

/// The same numbers in the order of ggml's Q4_0 rows. Bytes up to the mean of the keys:
inline std::int64_t q4_rows_bytes(std::int64_t head_dim) {
  return Q4Layout::values(head_dim).bytes();
}
void read_q4_key_rows(const std::byte* tile, std::int64_t head_dim, float* rows);
void read_q4_value_rows(const std::byte* tile, std::int64_t head_dim, float* rows);
void write_q4_key_rows(const float* rows, std::int64_t head_dim, std::byte* tile);
void write_q4_value_rows(const float* rows, std::int64_t head_dim, std::byte* tile);

}  // namespace modularbase::kernels
