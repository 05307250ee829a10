#include "modularbase/kv/kv_memory.h"

namespace modularbase {

std::size_t KvGeometry::block_bytes() const {
  return static_cast<std::size_t>(block_rows()) * ggml_row_size(type, head_dim);
}

KvMemory::KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend)
    : geometry_(geometry),
      ctx_(make_tensor_context(static_cast<std::size_t>(2 * geometry.n_layer + 1))) {
  pool_ = ggml_new_tensor_2d(ctx_.get(), geometry.type, geometry.head_dim,
                             n_blocks * geometry.block_rows());
  ggml_set_name(pool_, "cache");
  buffer_ = backend.allocate(ctx_.get(), "the KV cache");
  const auto add = [&](const char* name, std::int64_t layer, std::int64_t first_row) {
    Tensor rows = ggml_view_2d(ctx_.get(), pool_, geometry.head_dim, pool_->ne[1] - first_row,
                               pool_->nb[1], static_cast<std::size_t>(first_row) * pool_->nb[1]);
    ggml_format_name(rows, "%s-%d", name, static_cast<int>(layer));
    ggml_backend_view_init(rows);
    return rows;
  };
  const std::int64_t n_tile_rows = geometry.n_head_kv * kernels::kBlockTokens;
  for (std::int64_t layer = 0; layer < geometry.n_layer; ++layer) {
    k_.push_back(add("cache_k", layer, 2 * layer * n_tile_rows));
    v_.push_back(add("cache_v", layer, (2 * layer + 1) * n_tile_rows));
  }
  staging_.resize(static_cast<std::size_t>(kernels::kBlockTokens) * pool_->nb[1]);
}

kernels::KvLayer KvMemory::layer(int layer) const {
  return {geometry_.type,      k(layer)->data,     v(layer)->data,
          geometry_.n_head_kv, geometry_.head_dim, geometry_.block_rows() * geometry_.head_dim};
}

void KvMemory::copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens) {
  const std::size_t row_bytes = pool_->nb[1];
  const std::size_t n_bytes = static_cast<std::size_t>(n_tokens) * row_bytes;
  for (std::int64_t row = 0; row < geometry_.block_rows(); row += kernels::kBlockTokens) {
    const auto at = [&](BlockId block) {
      return static_cast<std::size_t>(block * geometry_.block_rows() + row) * row_bytes;
    };
    ggml_backend_tensor_get(pool_, staging_.data(), at(from), n_bytes);
    ggml_backend_tensor_set(pool_, staging_.data(), at(to), n_bytes);
  }
}

}  // namespace modularbase
