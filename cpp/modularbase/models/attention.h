#pragma once

#include "modularbase/models/attention_path.h"
#include "modularbase/models/linear.h"

namespace modularbase {

/// Grouped-query self-attention. q/k norms are null but in qwen3; biases are null but in qwen2.
struct Attention {
  Tensor norm = nullptr;    // attn_norm    [n_embd]
  Linear q;                 // attn_q       [n_embd, n_head * head_dim]
  Linear k;                 // attn_k       [n_embd, n_head_kv * head_dim]
  Linear v;                 // attn_v       [n_embd, n_head_kv * head_dim]
  Linear output;            // attn_output  [n_head * head_dim, n_embd]
  Tensor q_norm = nullptr;  // attn_q_norm  [head_dim]
  Tensor k_norm = nullptr;  // attn_k_norm  [head_dim]

  /// Projects h [n_embd, n_rows], rotates, and writes the cache.
  Tensor build_store(GraphBuilder& g, KernelPath path, AttentionPath& attention, Tensor h,
                     float eps, int layer) const;
  /// h + W_o attention(stored). rows [n_out], when not null, are the only rows carried on.
  Tensor build_attend(GraphBuilder& g, KernelPath path, AttentionPath& attention, Tensor stored,
                      Tensor h, Tensor rows, int layer) const;
};

}  // namespace modularbase
