#pragma once

#include "modularbase/graph/graph_builder.h"

namespace modularbase {

/// What a family calls after each FFN. Packs implement it (adapters/); without a hook the graph is
/// the plain base, node for node.
class LayerHook {
 public:
  virtual ~LayerHook() = default;
  /// x [n_embd, n_rows] is the FFN's input (after ffn_norm), h [n_embd, n_rows] the residual stream
  /// with the FFN's output added; rows that restart at a split come behind the others, and only in
  /// layers from there on. Returns h with whatever the hook adds at this layer, or h itself.
  virtual Tensor after_ffn(GraphBuilder& g, Tensor x, Tensor h, int layer) = 0;
};

}  // namespace modularbase
