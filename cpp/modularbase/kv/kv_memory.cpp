#include "modularbase/kv/kv_memory.h"

namespace modularbase {

std::size_t KvGeometry::block_bytes() const {
  return 2 * static_cast<std::size_t>(n_layer * n_head_kv * kernels::kBlockTokens) *
         ggml_row_size(type, head_dim);
}

KvMemory::KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend)
    : geometry_(geometry),
      ctx_(make_tensor_context(static_cast<std::size_t>(2 * geometry.n_layer))) {
  const auto add = [&](const char* name, std::int64_t layer) {
    Tensor tensor = ggml_new_tensor_4d(ctx_.get(), geometry.type, geometry.head_dim,
                                       kernels::kBlockTokens, geometry.n_head_kv, n_blocks);
    ggml_format_name(tensor, "%s-%d", name, static_cast<int>(layer));
    return tensor;
  };
  for (std::int64_t layer = 0; layer < geometry.n_layer; ++layer) {
    k_.push_back(add("cache_k", layer));
    v_.push_back(add("cache_v", layer));
  }
  buffer_ = backend.allocate(ctx_.get(), "the KV cache");
  staging_.resize(k_[0]->nb[2]);
}

kernels::KvLayer KvMemory::layer(int layer) const {
  return {geometry_.type, k(layer)->data, v(layer)->data, geometry_.n_head_kv, geometry_.head_dim};
}

void KvMemory::copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens) {
  const std::size_t n_bytes = static_cast<std::size_t>(n_tokens) * k_[0]->nb[1];
  const auto copy = [&](Tensor tensor) {
    for (std::int64_t head = 0; head < geometry_.n_head_kv; ++head) {
      const auto at = [&](BlockId block) {
        return static_cast<std::size_t>(block) * tensor->nb[3] +
               static_cast<std::size_t>(head) * tensor->nb[2];
      };
      ggml_backend_tensor_get(tensor, staging_.data(), at(from), n_bytes);
      ggml_backend_tensor_set(tensor, staging_.data(), at(to), n_bytes);
    }
  };
  for (Tensor tensor : k_) copy(tensor);
  for (Tensor tensor : v_) copy(tensor);
}

}  // namespace modularbase
