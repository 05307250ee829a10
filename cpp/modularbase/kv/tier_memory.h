#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/graph/backend.h"
#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/attention.h"
#include "modularbase/kv/host_bytes.h"

namespace modularbase {

/// What a tier keeps of the past of a group of layers.
struct TierGeometry {
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  std::int64_t first_layer = 0;
  std::vector<kernels::TileFormat> k_formats;  // of each layer
  kernels::TileFormat v_format = kernels::TileFormat::kF16;
  bool has_log_weights = false;  // its blocks hold slots
  // Of each layer and head: the number of its tile there, -1: it has none. Empty: all have one.
  std::vector<std::vector<std::int32_t>> tiles;

  std::int64_t n_tiles(std::size_t layer) const;
  std::size_t layer_bytes(std::size_t layer) const;
  std::size_t block_bytes() const;
};

/// A tier's tiles of one layer as tables for ggml_get_rows, whose row is a whole tile, for the
/// heads that have some. Null: none has, or the formats have no such thing. Rounded keys are
/// rotated, and values of Q4_0.
struct TileTables {
  Tensor k = nullptr;       // [64 * head_dim, n_blocks, n_tiles]; less k_mean where there is one
  Tensor k_mean = nullptr;  // F16 [head_dim, n_blocks, n_tiles]
  Tensor v = nullptr;       // [64 * head_dim, n_blocks, n_tiles]
  Tensor log_weight = nullptr;          // F32 [64, n_blocks, n_tiles]
  const std::int32_t* tiles = nullptr;  // as in KvTierLayer
};

/// The memory of a tier's blocks, each one run of bytes ordered by layer: the heads' key tiles,
/// their value tiles, their log weights. Layers are numbered as in the model.
class TierMemory {
 public:
  TierMemory(TierGeometry geometry, std::int64_t n_blocks, const Backend& backend);

  const TierGeometry& geometry() const { return geometry_; }
  /// As the host sees it (HostBytes). No pointers for a layer that has nothing there.
  kernels::KvTierLayer layer(int layer) const;
  /// As graphs see it; formats made of ggml's rows only.
  const TileTables& tables(int layer) const { return tables_.at(index(layer)); }

  std::span<std::byte> block_data(BlockId block) const;
  /// As HostBytes, of a layer of a block.
  void download(BlockId block, int layer) const;
  void upload(BlockId block, int layer) const;
  void forget_copies() const { bytes_.forget_copies(); }
  /// Gives the memory of a block that nobody holds back to the system; it comes again when written.
  void discard(BlockId block) const;

 private:
  std::size_t index(int layer) const {
    return static_cast<std::size_t>(layer - geometry_.first_layer);
  }
  std::size_t at(BlockId block) const { return static_cast<std::size_t>(block) * block_bytes_; }
  TileTables make_tables(std::size_t layer) const;

  TierGeometry geometry_;
  std::size_t block_bytes_;
  ContextPtr ctx_;
  Tensor pool_;  // I8 [block_bytes, n_blocks]
  BufferPtr buffer_;
  HostBytes bytes_;
  std::vector<std::size_t> offsets_;  // of each layer in a block
  std::vector<TileTables> tables_;    // of each layer
};

}  // namespace modularbase
