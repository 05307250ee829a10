#include "modularbase/kv/tier_memory.h"

#include <algorithm>
#include <utility>

namespace modularbase {
namespace {

constexpr std::size_t kTablesOfLayer = 4;

// A group none of whose layers has the tier has blocks all the same, of no bytes.
Tensor new_pool(ggml_context* ctx, std::size_t block_bytes, std::int64_t n_blocks) {
  const auto n_bytes = std::max<std::int64_t>(1, static_cast<std::int64_t>(block_bytes));
  Tensor pool = ggml_new_tensor_2d(ctx, GGML_TYPE_I8, n_bytes, n_blocks);
  ggml_set_name(pool, "cache_tier");
  return pool;
}

/// Whole runs of n numbers of the pool's bytes: [n, n_blocks, n_head].
Tensor table(ggml_context* ctx, Tensor pool, ggml_type type, std::int64_t n, std::int64_t n_head,
             std::size_t offset, std::size_t head_bytes) {
  Tensor runs = ggml_new_tensor_3d(ctx, type, n, pool->ne[1], n_head);
  runs->nb[1] = pool->nb[1];
  runs->nb[2] = head_bytes;
  runs->nb[3] = pool->nb[1] * static_cast<std::size_t>(pool->ne[1]);
  runs->view_src = pool;
  runs->view_offs = offset;
  ggml_backend_view_init(runs);
  return runs;
}

/// The type whose rows a tile consists of; COUNT for one that only our kernels read.
ggml_type rows_type(kernels::TileFormat format) {
  switch (format) {
    case kernels::TileFormat::kF16:
      return GGML_TYPE_F16;
    case kernels::TileFormat::kBF16:
      return GGML_TYPE_BF16;
    case kernels::TileFormat::kQ8_0:
    case kernels::TileFormat::kQ8Keys:
      return GGML_TYPE_Q8_0;
    case kernels::TileFormat::kQ4KeyRows:
    case kernels::TileFormat::kQ4ValueRows:
      return GGML_TYPE_Q4_0;
    default:
      return GGML_TYPE_COUNT;
  }
}

}  // namespace

std::int64_t TierGeometry::n_tiles(std::size_t layer) const {
  if (tiles.empty()) return n_head_kv;
  return std::ranges::count_if(tiles[layer], [](std::int32_t tile) { return tile >= 0; });
}

std::size_t TierGeometry::layer_bytes(std::size_t layer) const {
  const std::size_t log_weight_bytes = has_log_weights ? kernels::kBlockTokens * sizeof(float) : 0;
  return static_cast<std::size_t>(n_tiles(layer)) *
         (kernels::tile_bytes(k_formats[layer], head_dim) +
          kernels::tile_bytes(v_format, head_dim) + log_weight_bytes);
}

std::size_t TierGeometry::block_bytes() const {
  std::size_t n = 0;
  for (std::size_t layer = 0; layer < k_formats.size(); ++layer) n += layer_bytes(layer);
  return n;
}

TierMemory::TierMemory(TierGeometry geometry, std::int64_t n_blocks, const Backend& backend)
    : geometry_(std::move(geometry)),
      block_bytes_(geometry_.block_bytes()),
      ctx_(make_tensor_context(1 + kTablesOfLayer * geometry_.k_formats.size())),
      pool_(new_pool(ctx_.get(), block_bytes_, n_blocks)),
      buffer_(backend.allocate(ctx_.get(), "a tier of the KV cache")),
      bytes_(pool_) {
  std::size_t offset = 0;
  for (std::size_t layer = 0; layer < geometry_.k_formats.size(); ++layer) {
    offsets_.push_back(offset);
    offset += geometry_.layer_bytes(layer);
    tables_.push_back(make_tables(layer));
  }
}

TileTables TierMemory::make_tables(std::size_t layer) const {
  const kernels::TileFormat k_format = geometry_.k_formats[layer];
  const ggml_type k_type = rows_type(k_format);
  const ggml_type v_type = rows_type(geometry_.v_format);
  const std::int64_t n_tiles = geometry_.n_tiles(layer);
  if (n_tiles == 0 || k_type == GGML_TYPE_COUNT || v_type == GGML_TYPE_COUNT) return {};
  const std::size_t k_bytes = kernels::tile_bytes(k_format, geometry_.head_dim);
  const std::size_t v_bytes = kernels::tile_bytes(geometry_.v_format, geometry_.head_dim);
  const auto make = [&](ggml_type type, std::int64_t n, std::size_t offset, std::size_t bytes) {
    return table(ctx_.get(), pool_, type, n, n_tiles, offset, bytes);
  };
  const std::int64_t n_tile = kernels::kBlockTokens * geometry_.head_dim;
  const std::size_t k = offsets_[layer];
  const std::size_t v = k + static_cast<std::size_t>(n_tiles) * k_bytes;
  TileTables tables{.k = make(k_type, n_tile, k, k_bytes), .v = make(v_type, n_tile, v, v_bytes)};
  if (!geometry_.tiles.empty()) tables.tiles = geometry_.tiles[layer].data();
  if (k_format == kernels::TileFormat::kQ4KeyRows) {
    tables.k_mean =
        make(GGML_TYPE_F16, geometry_.head_dim, k + ggml_row_size(k_type, n_tile), k_bytes);
  }
  if (geometry_.has_log_weights) {
    tables.log_weight =
        make(GGML_TYPE_F32, kernels::kBlockTokens, v + static_cast<std::size_t>(n_tiles) * v_bytes,
             kernels::kBlockTokens * sizeof(float));
  }
  return tables;
}

kernels::KvTierLayer TierMemory::layer(int layer) const {
  const auto n_tiles = static_cast<std::size_t>(geometry_.n_tiles(index(layer)));
  if (n_tiles == 0) return {};
  const kernels::TileFormat k_format = geometry_.k_formats.at(index(layer));
  std::byte* k = bytes_.data() + offsets_[index(layer)];
  std::byte* v = k + n_tiles * kernels::tile_bytes(k_format, geometry_.head_dim);
  std::byte* log_weight = v + n_tiles * kernels::tile_bytes(geometry_.v_format, geometry_.head_dim);
  return {.k_format = k_format,
          .v_format = geometry_.v_format,
          .k = k,
          .v = v,
          .log_weight = geometry_.has_log_weights ? log_weight : nullptr,
          .block_stride = block_bytes_,
          .tiles = geometry_.tiles.empty() ? nullptr : geometry_.tiles[index(layer)].data()};
}

std::span<std::byte> TierMemory::block_data(BlockId block) const {
  return {bytes_.data() + at(block), block_bytes_};
}

void TierMemory::download(BlockId block, int layer) const {
  bytes_.download(at(block) + offsets_.at(index(layer)), geometry_.layer_bytes(index(layer)));
}

void TierMemory::upload(BlockId block, int layer) const {
  bytes_.upload(at(block) + offsets_.at(index(layer)), geometry_.layer_bytes(index(layer)));
}

void TierMemory::discard(BlockId block) const {
  bytes_.discard(at(block), block_bytes_);
}

}  // namespace modularbase
