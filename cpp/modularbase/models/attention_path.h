#pragma once

#include <vector>

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

/// The same for the reference attention, as tensors; n_rows are the rows of this group's layers.
struct ReferenceInputs {
  const KvGroup* group = nullptr;
  Tensor positions = nullptr;   // I32 [n_rows]
  Tensor write_rows = nullptr;  // I64 [n_head_kv * n_rows]: cache row of each new (row, head)
  Tensor read_rows = nullptr;  // I32 [n_kv * n_head_kv]: cache row of each visible (head, position)
  Tensor mask = nullptr;       // F32 [n_kv, n_rows]: 0 or -inf
};

/// How a layer's attention becomes graph nodes: our fused kernels, or ggml's ops.
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

class ReferenceAttention final : public AttentionPath {
 public:
  /// rope_factors [rope_dim / 2] divides the frequencies (llama 3); null otherwise.
  ReferenceAttention(const ModelConfig& config, Tensor rope_factors,
                     std::vector<ReferenceInputs> groups);
  Tensor store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) override;
  Tensor attend(GraphBuilder& g, Tensor stored, int layer) override;

 private:
  Tensor heads(GraphBuilder& g, Tensor qkv, std::int64_t first, std::int64_t n) const;
  Tensor rotate(GraphBuilder& g, const ReferenceInputs& inputs, Tensor heads, Tensor norm) const;
  Tensor write(GraphBuilder& g, const ReferenceInputs& inputs, Tensor rows, Tensor heads) const;
  Tensor read(GraphBuilder& g, const ReferenceInputs& inputs, Tensor cache_rows) const;

  const ModelConfig& config_;
  Tensor rope_factors_;
  std::vector<ReferenceInputs> groups_;
  Tensor k_rows_ = nullptr;  // this layer's cache after the write: reading it orders the nodes
  Tensor v_rows_ = nullptr;
};

}  // namespace modularbase
