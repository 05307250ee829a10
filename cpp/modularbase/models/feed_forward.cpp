#include "modularbase/models/feed_forward.h"

namespace modularbase {

FeedForward::Output FeedForward::build(GraphBuilder& g, KernelPath path, Tensor h, float eps,
                                       int layer) const {
  Tensor x = g.tag(g.rms_norm(h, norm, eps), "ffn_norm", layer);
  Tensor gated = g.tag(build_swiglu(g, path, gate, up, x), "ffn_gate_par", layer);
  return {x, g.tag(build_linear_add(g, path, down, gated, h), "l_out", layer)};
}

}  // namespace modularbase
