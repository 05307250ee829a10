#pragma once

#include <string>
#include <vector>

#include "modularbase/core/errors.h"
#include "modularbase/graph/graph_builder.h"
#include "modularbase/kernels/fused_nodes.h"
#include "modularbase/kv/kv_group.h"
#include "modularbase/models/model_config.h"

namespace modularbase {

/// What the fused attention of one group of layers works on; batch and scratch are filled by the
/// runner before each step.
struct FusedInputs {
  const KvGroup* group;
  const kernels::AttentionBatch* batch;
  kernels::AttentionScratch* scratch;
};

/// Whose inputs a layer takes: those of the group that holds it.
template <class Inputs>
const Inputs& inputs_of(const std::vector<Inputs>& groups, int layer) {
  for (const Inputs& inputs : groups) {
    if (inputs.group->memory().geometry().holds(layer)) return inputs;
  }
  throw Error("layer " + std::to_string(layer) + ": expected a group of the KV cache, found none");
}

/// How a layer's attention becomes graph nodes: our fused kernels, or ggml's ops
/// (reference_attention.h).
class AttentionPath {
 public:
  virtual ~AttentionPath() = default;
  /// Normalises (where the norms are not null) and rotates q and k, and writes k and v to the
  /// cache. Returns what attend() needs; qkv is [qkv_dim, n_rows].
  virtual Tensor store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) = 0;
  /// Softmax attention of the stored rows over their sequences: [n_head * head_dim, n_rows].
  virtual Tensor attend(GraphBuilder& g, Tensor stored, int layer) = 0;
};

class FusedAttention final : public AttentionPath {
 public:
  /// Each layer takes the group whose memory holds it.
  FusedAttention(const ModelConfig& config, std::vector<FusedInputs> groups);
  Tensor store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) override;
  Tensor attend(GraphBuilder& g, Tensor stored, int layer) override;

 private:
  kernels::AttentionOp op(int layer) const;
  const ModelConfig& config_;
  std::vector<FusedInputs> groups_;
};

}  // namespace modularbase
