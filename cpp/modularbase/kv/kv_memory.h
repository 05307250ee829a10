#pragma once

#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/attention.h"

namespace modularbase {

/// What one token's keys and values look like.
struct KvGeometry {
  std::int64_t n_layer = 0;
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  ggml_type type = GGML_TYPE_F16;  // F16 or BF16

  std::size_t block_bytes() const;  // one block of all layers, keys and values
};

/// The memory of all KV blocks: per layer a K and a V tensor [head_dim, kBlockTokens, n_head_kv,
/// n_blocks].
class KvMemory {
 public:
  KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend);

  const KvGeometry& geometry() const { return geometry_; }
  kernels::KvLayer layer(int layer) const;
  Tensor k(int layer) const { return k_[static_cast<std::size_t>(layer)]; }
  Tensor v(int layer) const { return v_[static_cast<std::size_t>(layer)]; }

  /// Copies the first n_tokens of a block in every layer.
  void copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens);

 private:
  KvGeometry geometry_;
  ContextPtr ctx_;
  BufferPtr buffer_;
  std::vector<Tensor> k_;
  std::vector<Tensor> v_;
  std::vector<std::byte> staging_;
};

}  // namespace modularbase
