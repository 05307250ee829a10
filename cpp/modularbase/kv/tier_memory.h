#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "modularbase/core/types.h"
#include "modularbase/graph/backend.h"
#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/attention.h"

namespace modularbase {

/// What a tier keeps of the past of a group of layers.
struct TierGeometry {
  std::int64_t n_head_kv = 0;
  std::int64_t head_dim = 0;
  std::int64_t first_layer = 0;
  std::vector<kernels::TileFormat> k_formats;  // of each layer
  kernels::TileFormat v_format = kernels::TileFormat::kF16;
  bool has_log_weights = false;  // its blocks hold slots
  std::vector<bool> lacks;       // of each layer: it has nothing there; empty: all have

  bool holds(std::size_t layer) const { return lacks.empty() || !lacks[layer]; }
  std::size_t layer_bytes(std::size_t layer) const;
  std::size_t block_bytes() const;
};

/// The memory of a tier's blocks, each one run of bytes ordered by layer: the heads' key tiles,
/// their value tiles, their log weights. Layers are numbered as in the model. CPU only.
class TierMemory {
 public:
  TierMemory(TierGeometry geometry, std::int64_t n_blocks, const Backend& backend);

  const TierGeometry& geometry() const { return geometry_; }
  /// No pointers for a layer that has nothing there.
  kernels::KvTierLayer layer(int layer) const;
  std::span<std::byte> block_data(BlockId block) const;
  /// Gives the memory of a block that nobody holds back to the system; it comes again when written.
  void discard(BlockId block);

 private:
  TierGeometry geometry_;
  std::size_t block_bytes_;
  ContextPtr ctx_;
  BufferPtr buffer_;
  Tensor pool_;                       // I8 [block_bytes, n_blocks]
  std::vector<std::size_t> offsets_;  // of each layer in a block
};

/// Tells the system that whole pages within these bytes are not needed as they are.
void discard_pages(std::span<std::byte> bytes);

}  // namespace modularbase
