#pragma once

#include <map>
#include <vector>

#include "modularbase/models/attention_path.h"

namespace modularbase {

/// The blocks of one tier that the rows of a step see some of. Null: none in this step.
struct ReferenceTier {
  Tensor blocks = nullptr;  // I32 [n_blocks, n_head_kv]: the same of every head
  Tensor mask = nullptr;    // F32 [64 * n_blocks, n_rows]: 0 or -inf
};

/// What the reference attention of one group of layers works on; filled before each step. n_rows
/// are the rows of this group's layers.
struct ReferenceInputs {
  const KvGroup* group = nullptr;
  Tensor positions = nullptr;   // I32 [n_rows]
  Tensor write_rows = nullptr;  // I64 [n_head_kv * n_rows]: cache row of each new (row, head)
  Tensor read_rows = nullptr;   // I32 [n_kv * n_head_kv]: cache row of each visible exact token
  Tensor mask = nullptr;        // F32 [n_kv, n_rows]: 0 or -inf
  ReferenceTier tiers[kernels::kNKvTiers] = {};  // all but the exact one
  Tensor hadamard = nullptr;                     // F32 [n, n]; null where no tier is rotated
  Tensor window_rows = nullptr;  // I32 [n_window, n_head]: rows whose queries are kept; or null
};

/// What a layer's attention shows of the rows whose queries are kept.
struct ReferenceQueries {
  int layer;
  Tensor queries;   // [head_dim * n_head, n_window], rotated
  Tensor log_mass;  // [1, n_window, n_head]: ln sum exp(score)
};

/// Attention as ggml's ops, for every device they run on: the gathered rows of all tiers in one
/// masked softmax. 4-bit keys meet rotated queries, and the part of the output that 4-bit values
/// make is rotated back.
class ReferenceAttention final : public AttentionPath {
 public:
  /// rope_factors [rope_dim / 2] divides the frequencies (llama 3); null otherwise.
  ReferenceAttention(const ModelConfig& config, Tensor rope_factors,
                     std::vector<ReferenceInputs> groups);
  Tensor store(GraphBuilder& g, Tensor qkv, Tensor q_norm, Tensor k_norm, int layer) override;
  Tensor attend(GraphBuilder& g, Tensor stored, int layer) override;

  /// Of the layers whose attention was built.
  const std::vector<ReferenceQueries>& queries() const { return queries_; }

 private:
  /// A run of the columns that a layer's softmax is over.
  struct Segment {
    Tensor scores;  // [n, n_rows, n_head]
    Tensor mask;    // [n, n_rows]
    Tensor values;  // [head_dim, n, n_head_kv]
    bool is_rotated;
  };

  Tensor heads(GraphBuilder& g, Tensor qkv, std::int64_t first, std::int64_t n) const;
  Tensor rotate(GraphBuilder& g, const ReferenceInputs& inputs, Tensor heads, Tensor norm) const;
  Tensor write(GraphBuilder& g, const ReferenceInputs& inputs, Tensor rows, Tensor heads) const;
  Tensor read(GraphBuilder& g, const ReferenceInputs& inputs, Tensor cache_rows) const;
  Segment exact(GraphBuilder& g, const ReferenceInputs& inputs, Tensor q) const;
  Segment tier(GraphBuilder& g, const ReferenceInputs& inputs, const ReferenceTier& tier,
               const TileTables& tables, Tensor q) const;
  Tensor queries_of(GraphBuilder& g, const TileTables& tables, Tensor q) const;
  Segment spread(GraphBuilder& g, const TileTables& tables, Segment of_tiles) const;
  Tensor add_log_weights(GraphBuilder& g, const ReferenceTier& tier, const TileTables& tables,
                         Tensor scores) const;
  Tensor mask_of(GraphBuilder& g, const std::vector<Segment>& segments);
  Tensor mix(GraphBuilder& g, const ReferenceInputs& inputs, const std::vector<Segment>& segments,
             Tensor weights) const;
  void keep_queries(GraphBuilder& g, const ReferenceInputs& inputs, Tensor q, Tensor scores,
                    Tensor weights, int layer);

  const ModelConfig& config_;
  Tensor rope_factors_;
  std::vector<ReferenceInputs> groups_;
  const float scale_;        // of scores
  Tensor k_rows_ = nullptr;  // this layer's cache after the write: reading it orders the nodes
  Tensor v_rows_ = nullptr;
  std::map<std::vector<Tensor>, Tensor> masks_;  // by their segments'
  std::vector<ReferenceQueries> queries_;
};

}  // namespace modularbase
