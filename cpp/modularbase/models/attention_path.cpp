#include "modularbase/models/attention_path.h"

#include <utility>

namespace modularbase {

FusedAttention::FusedAttention(const ModelConfig& config, std::vector<FusedInputs> groups)
    : config_(config), groups_(std::move(groups)) {}

kernels::AttentionOp FusedAttention::op(int layer) const {
  const FusedInputs& inputs = inputs_of(groups_, layer);
  return {.batch = inputs.batch,
          .scratch = inputs.scratch,
          .kv = inputs.group->layer(layer),
          .layer = inputs.group->index_of(layer),
          .n_head = config_.n_head,
          .rope_dim = config_.rope_dim,
          .style = config_.rope_style,
          .q_norm = nullptr,
          .k_norm = nullptr,
          .norm_eps = config_.norm_eps};
}

Tensor FusedAttention::store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) {
  kernels::AttentionOp store_op = op(layer);
  store_op.q_norm = q_norm;
  store_op.k_norm = k_norm;
  return kernels::rope_store_node(g, store_op, qkv);
}

Tensor FusedAttention::attend(GraphBuilder& g, Tensor stored, int layer) {
  return kernels::attention_node(g, op(layer), stored);
}

}  // namespace modularbase
