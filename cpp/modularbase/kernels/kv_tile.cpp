#include "modularbase/kernels/kv_tile.h"

#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>

#include "modularbase/kernels/hadamard.h"
#include "modularbase/kernels/kv_tile_q4.h"

namespace modularbase::kernels {
namespace {

ggml_type row_type(TileFormat format) {
  switch (format) {
    case TileFormat::kBF16:
      return GGML_TYPE_BF16;
    case TileFormat::kQ8_0:
    case TileFormat::kQ8Keys:
      return GGML_TYPE_Q8_0;
    default:
      return GGML_TYPE_F16;
  }
}

// A part that is rotated is a whole number of blocks.
void write_q8_key(const float* row, std::int64_t head_dim, std::byte* to) {
  const std::int64_t n = hadamard_size(head_dim);
  float part[kMaxHadamard];
  for (std::int64_t d = 0; d < head_dim; d += n, to += ggml_row_size(GGML_TYPE_Q8_0, n)) {
    std::copy_n(row + d, n, part);
    hadamard_rotate(part, n);
    ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->from_float(part, to, n);
  }
}

}  // namespace

bool tile_supported(TileFormat format, std::int64_t head_dim) {
  const bool is_float = format == TileFormat::kF16 || format == TileFormat::kBF16;
  return head_dim > 0 && (is_float || head_dim % kQ4Group == 0);
}

void read_tile(TileFormat format, const std::byte* tile, std::int64_t head_dim, float* rows) {
  const std::int64_t n = kBlockTokens * head_dim;
  switch (format) {
    case TileFormat::kQ4Keys:
      return read_q4_keys(tile, head_dim, rows);
    case TileFormat::kQ4Values:
      return read_q4_values(tile, head_dim, rows);
    case TileFormat::kQ4KeyRows:
      return read_q4_key_rows(tile, head_dim, rows);
    case TileFormat::kQ4ValueRows:
      return read_q4_value_rows(tile, head_dim, rows);
    case TileFormat::kF16:
      // Vectors, where the table of types has single numbers.
      return ggml_cpu_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t*>(tile), rows, n);
    default:
      ggml_get_type_traits(row_type(format))->to_float(tile, rows, n);
  }
  if (format == TileFormat::kQ8Keys) hadamard_rotate_rows(rows, kBlockTokens, head_dim);
}

void write_tile(TileFormat format, const float* rows, std::int64_t head_dim, std::byte* tile) {
  switch (format) {
    case TileFormat::kQ4Keys:
      return write_q4_keys(rows, head_dim, tile);
    case TileFormat::kQ4Values:
      return write_q4_values(rows, head_dim, tile);
    case TileFormat::kQ4KeyRows:
      return write_q4_key_rows(rows, head_dim, tile);
    case TileFormat::kQ4ValueRows:
      return write_q4_value_rows(rows, head_dim, tile);
    default:
      for (int token = 0; token < kBlockTokens; ++token) {
        write_row(format, rows + token * head_dim, head_dim, token, tile);
      }
  }
}

void write_row(TileFormat format, const float* row, std::int64_t head_dim, int token,
               std::byte* tile) {
  const ggml_type type = row_type(format);
  std::byte* to = tile + static_cast<std::size_t>(token) * ggml_row_size(type, head_dim);
  if (format == TileFormat::kQ8Keys) return write_q8_key(row, head_dim, to);
  ggml_get_type_traits_cpu(type)->from_float(row, to, head_dim);
}

}  // namespace modularbase::kernels
