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

  /// Rows [head_dim] of one block: keys and values of every layer.
  std::int64_t block_rows() const { return 2 * n_layer * n_head_kv * kernels::kBlockTokens; }
  std::size_t block_bytes() const;
};

/// The memory of all KV blocks: rows [head_dim] ordered by (block, layer, K or V, head, token). A
/// block is one run of bytes, so that large pages serve it and pages of unused blocks stay
/// untouched.
class KvMemory {
 public:
  KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend);

  const KvGeometry& geometry() const { return geometry_; }
  kernels::KvLayer layer(int layer) const;
  /// The pool from this layer's first row on: [head_dim, n]; blocks are block_rows() apart.
  Tensor k(int layer) const { return k_[static_cast<std::size_t>(layer)]; }
  Tensor v(int layer) const { return v_[static_cast<std::size_t>(layer)]; }

  /// Copies the first n_tokens of a block in every layer.
  void copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens);

 private:
  KvGeometry geometry_;
  ContextPtr ctx_;
  BufferPtr buffer_;
  Tensor pool_;
  std::vector<Tensor> k_;
  std::vector<Tensor> v_;
  std::vector<std::byte> staging_;
};

}  // namespace modularbase
