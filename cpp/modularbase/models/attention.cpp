#include "modularbase/models/attention.h"

namespace modularbase {

Tensor Attention::build_store(GraphBuilder& g, KernelPath path, AttentionPath& attention, Tensor h,
                              float eps, int layer) const {
  Tensor x = g.tag(g.rms_norm(h, norm, eps), "attn_norm", layer);
  Tensor qkv = build_linear(g, path, {q, k, v}, x);
  return attention.store(g, qkv, q_norm, k_norm, layer);
}

Tensor Attention::build_attend(GraphBuilder& g, KernelPath path, AttentionPath& attention,
                               Tensor stored, Tensor h, Tensor rows, int layer) const {
  Tensor mixed = g.tag(attention.attend(g, stored, layer), "kqv_out", layer);
  if (rows) {
    mixed = g.get_rows(mixed, rows);
    h = g.get_rows(h, rows);
  }
  return g.tag(build_linear_add(g, path, output, mixed, h), "ffn_inp", layer);
}

}  // namespace modularbase
