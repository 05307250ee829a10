#include "modularbase/kv/kv_memory.h"

namespace modularbase {
namespace {

kernels::TileFormat tile_format(ggml_type type) {
  switch (type) {
    case GGML_TYPE_BF16:
      return kernels::TileFormat::kBF16;
    case GGML_TYPE_Q8_0:
      return kernels::TileFormat::kQ8_0;
    default:
      return kernels::TileFormat::kF16;
  }
}

}  // namespace

std::size_t KvGeometry::block_bytes() const {
  return static_cast<std::size_t>(block_rows()) * ggml_row_size(type, head_dim) +
         static_cast<std::size_t>(kernels::kBlockTokens * mid_width) * sizeof(float);
}

KvMemory::KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend)
    : geometry_(geometry),
      ctx_(make_tensor_context(static_cast<std::size_t>(2 * geometry.n_layer + 2))) {
  pool_ = ggml_new_tensor_2d(ctx_.get(), geometry.type, geometry.head_dim,
                             n_blocks * geometry.block_rows());
  ggml_set_name(pool_, "cache");
  if (geometry.mid_width > 0) {
    mid_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_F32, geometry.mid_width,
                              n_blocks * kernels::kBlockTokens);
    ggml_set_name(mid_, "cache_mid");
  }
  buffer_ = backend.allocate(ctx_.get(), "the KV cache");
  bytes_ = std::make_unique<HostBytes>(pool_);
  const auto add = [&](const char* name, std::int64_t layer, std::int64_t first_row) {
    Tensor rows = ggml_view_2d(ctx_.get(), pool_, geometry.head_dim, pool_->ne[1] - first_row,
                               pool_->nb[1], static_cast<std::size_t>(first_row) * pool_->nb[1]);
    ggml_format_name(rows, "%s-%d", name, static_cast<int>(geometry.first_layer + layer));
    ggml_backend_view_init(rows);
    return rows;
  };
  const std::int64_t n_tile_rows = geometry.n_head_kv * kernels::kBlockTokens;
  for (std::int64_t layer = 0; layer < geometry.n_layer; ++layer) {
    k_.push_back(add("cache_k", layer, 2 * layer * n_tile_rows));
    v_.push_back(add("cache_v", layer, (2 * layer + 1) * n_tile_rows));
  }
}

kernels::KvLayer KvMemory::layer(int layer) const {
  const kernels::TileFormat format = tile_format(geometry_.type);
  kernels::KvLayer result{
      .n_head_kv = geometry_.n_head_kv, .head_dim = geometry_.head_dim, .tiers = {}};
  result.tiers[kernels::kExactTier] = {.k_format = format,
                                       .v_format = format,
                                       .k = bytes_->data() + k(layer)->view_offs,
                                       .v = bytes_->data() + v(layer)->view_offs,
                                       .log_weight = nullptr,
                                       .block_stride = block_bytes()};
  return result;
}

void KvMemory::copy_rows(Tensor rows, std::int64_t from, std::int64_t to, std::int64_t n) {
  const auto at = [&](std::int64_t row) { return static_cast<std::size_t>(row) * rows->nb[1]; };
  staging_.resize(at(n));
  ggml_backend_tensor_get(rows, staging_.data(), at(from), staging_.size());
  ggml_backend_tensor_set(rows, staging_.data(), at(to), staging_.size());
}

void KvMemory::copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens) {
  constexpr std::int64_t kBlock = kernels::kBlockTokens;
  const std::int64_t n_rows = geometry_.block_rows();
  for (std::int64_t row = 0; row < n_rows; row += kBlock) {
    copy_rows(pool_, from * n_rows + row, to * n_rows + row, n_tokens);
  }
  if (mid_) copy_rows(mid_, from * kBlock, to * kBlock, n_tokens);
}

std::size_t KvMemory::layer_at(BlockId block, int layer) const {
  return static_cast<std::size_t>(block) * block_bytes() + index(layer) * layer_bytes();
}

std::span<std::byte> KvMemory::block_data(BlockId block) const {
  return {bytes_->data() + static_cast<std::size_t>(block) * block_bytes(), block_bytes()};
}

void KvMemory::download(BlockId block, int layer) const {
  bytes_->download(layer_at(block, layer), layer_bytes());
}

void KvMemory::upload(BlockId block, int layer) const {
  bytes_->upload(layer_at(block, layer), layer_bytes());
}

void KvMemory::discard(BlockId block) const {
  bytes_->discard(static_cast<std::size_t>(block) * block_bytes(), block_bytes());
}

}  // namespace modularbase
