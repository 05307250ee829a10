#pragma once

#include <cstddef>
#include <cstdint>

namespace modularbase::kernels {

inline constexpr int kBlockTokens = 64;  // tokens in one KV block

/// How the keys or the values of one (block, head) are kept: a tile of bytes for kBlockTokens rows
/// of head_dim numbers.
///
/// kF16, kBF16: [token][head_dim].
/// kQ8_0: ggml's block_q8_0 rows, [token][head_dim / 32].
/// kQ8Keys: H k in such rows.
/// kQ4Keys: H (k - mean) in signed half-bytes: mean F16 [head_dim], the block's own; scales F16
///   [head_dim / 32][token], then half-bytes for dot products over dims (kv_tile_q4.h).
/// kQ4Values: H v in signed half-bytes: scales F16 [head_dim / 32][token], then half-bytes for dot
///   products over tokens.
/// kQ4KeyRows, kQ4ValueRows: the same numbers as ggml's block_q4_0 rows, [token][head_dim / 32];
///   behind the keys' rows their mean. For graphs of ggml's ops.
///
/// H is the Hadamard matrix over sqrt(n), n the largest power of two that divides head_dim, at most
/// 128: it spreads the few large dims of a row over all of them (QuaRot, arXiv:2404.00456).
enum class TileFormat : std::uint8_t {
  kF16,
  kBF16,
  kQ8_0,
  kQ8Keys,
  kQ4Keys,
  kQ4Values,
  kQ4KeyRows,
  kQ4ValueRows
};

/// Whether rows of head_dim numbers fit the format: whole groups of 32 for the quantised ones.
bool tile_supported(TileFormat format, std::int64_t head_dim);
inline std::size_t tile_bytes(TileFormat format, std::int64_t head_dim) {
  const auto n = static_cast<std::size_t>(head_dim);
  switch (format) {
    case TileFormat::kQ8_0:
    case TileFormat::kQ8Keys:
      return kBlockTokens * n / 32 * 34;  // F16 scale, 32 bytes
    case TileFormat::kQ4Values:
    case TileFormat::kQ4ValueRows:
      return kBlockTokens * n / 32 * 18;  // F16 scale, 32 half-bytes
    case TileFormat::kQ4Keys:
    case TileFormat::kQ4KeyRows:
      return kBlockTokens * n / 32 * 18 + 2 * n;  // and the mean
    default:
      return kBlockTokens * n * 2;
  }
}

/// rows [head_dim, kBlockTokens]: what the tile stands for, neither rotated nor centred.
void read_tile(TileFormat format, const std::byte* tile, std::int64_t head_dim, float* rows);
/// The same, written: all kBlockTokens rows.
void write_tile(TileFormat format, const float* rows, std::int64_t head_dim, std::byte* tile);
/// One token's row [head_dim]; not for the 4-bit formats, which are written a block at a time.
void write_row(TileFormat format, const float* row, std::int64_t head_dim, int token,
               std::byte* tile);

}  // namespace modularbase::kernels
