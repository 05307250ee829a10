#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/attention.h"
#include "modularbase/kv/host_bytes.h"

namespace modularbase {

/// What a group of layers keeps of one token: keys and values and, when mid_width is not 0, a row
/// of the residual stream.
struct KvGeometry {
  std::int64_t n_layer = 0;
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  ggml_type type = GGML_TYPE_F16;  // F16, BF16 or Q8_0
  std::int64_t first_layer = 0;
  std::int64_t mid_width = 0;

  bool holds(int layer) const { return layer >= first_layer && layer < first_layer + n_layer; }
  /// Rows [head_dim] of one block: keys and values of every layer.
  std::int64_t block_rows() const { return 2 * n_layer * n_head_kv * kernels::kBlockTokens; }
  std::size_t block_bytes() const;
};

/// The memory of all KV blocks of a group: rows [head_dim] ordered by (block, layer, K or V, head,
/// token). A block is one run of bytes, so that large pages serve it and pages of unused blocks
/// stay untouched. Layers are numbered as in the model.
class KvMemory {
 public:
  KvMemory(const KvGeometry& geometry, std::int64_t n_blocks, const Backend& backend);

  const KvGeometry& geometry() const { return geometry_; }
  /// As the host sees it (HostBytes).
  kernels::KvLayer layer(int layer) const;
  /// The pool from this layer's first row on: [head_dim, n]; blocks are block_rows() apart.
  Tensor k(int layer) const { return k_.at(index(layer)); }
  Tensor v(int layer) const { return v_.at(index(layer)); }
  /// F32 [mid_width, 64 n_blocks]: the row of a block's token i is 64 block + i. Null without.
  Tensor mid() const { return mid_; }

  /// Copies the first n_tokens of a block in every layer, mid rows included.
  void copy_tokens(BlockId from, BlockId to, std::int64_t n_tokens);
  /// Keys and values of a block, without mid rows.
  std::span<std::byte> block_data(BlockId block) const;
  /// As TierMemory.
  void download(BlockId block, int layer) const;
  void upload(BlockId block, int layer) const;
  void forget_copies() const { bytes_->forget_copies(); }
  void discard(BlockId block) const;

 private:
  std::size_t index(int layer) const {
    return static_cast<std::size_t>(layer - geometry_.first_layer);
  }
  std::size_t block_bytes() const {
    return static_cast<std::size_t>(geometry_.block_rows()) * pool_->nb[1];
  }
  std::size_t layer_at(BlockId block, int layer) const;
  std::size_t layer_bytes() const {
    return block_bytes() / static_cast<std::size_t>(geometry_.n_layer);
  }
  void copy_rows(Tensor rows, std::int64_t from, std::int64_t to, std::int64_t n);

  KvGeometry geometry_;
  ContextPtr ctx_;
  BufferPtr buffer_;
  Tensor pool_;  // [head_dim, n_blocks * block_rows]
  std::unique_ptr<HostBytes> bytes_;
  Tensor mid_ = nullptr;
  std::vector<Tensor> k_;
  std::vector<Tensor> v_;
  std::vector<std::byte> staging_;
};

}  // namespace modularbase
