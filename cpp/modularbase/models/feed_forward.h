#pragma once

#include "modularbase/models/linear.h"

namespace modularbase {

/// SwiGLU feed-forward: h + W_down(silu(W_gate x) * W_up x), x = RMSNorm(h).
struct FeedForward {
  Tensor norm = nullptr;  // ffn_norm  [n_embd]
  Linear gate;            // ffn_gate  [n_embd, n_ff]
  Linear up;              // ffn_up    [n_embd, n_ff]
  Linear down;            // ffn_down  [n_ff, n_embd]

  struct Output {
    Tensor x;  // [n_embd, n_rows] the normalised input
    Tensor h;  // [n_embd, n_rows] the residual stream after the block
  };
  Output build(GraphBuilder& g, KernelPath path, Tensor h, float eps, int layer) const;
};

}  // namespace modularbase
