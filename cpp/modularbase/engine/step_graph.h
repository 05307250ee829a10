#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "modularbase/adapters/pack_site.h"
#include "modularbase/engine/options.h"
#include "modularbase/engine/reference_inputs.h"
#include "modularbase/engine/step_plan.h"
#include "modularbase/graph/layer_hook.h"
#include "modularbase/models/model.h"

namespace modularbase {

/// What a step's graph ends in.
enum class GraphEnd { kCacheOnly, kShortlist, kLogits, kTargetLogprobs, kHidden, kHeadOnly };

/// Steps with equal keys share one built and allocated graph.
struct GraphKey {
  GraphEnd end;
  std::int64_t n_rows = 0;
  std::int64_t n_mid_rows = 0;
  std::int64_t n_out = 0;
  int hidden_layer = 0;                 // kHidden only, else 0
  int tap_layer = -1;                   // -1: no tap
  bool keeps_queries = false;           // kCacheOnly only: the last layer attends, too
  ReferenceShape attention = {};        // reference attention only, else zeros
  std::vector<PackPoolKey> packs = {};  // empty: no sites
  bool operator==(const GraphKey&) const = default;
};

/// What all graphs of an engine are built from.
struct GraphParts {
  const Model* model;
  KernelPath attention_path;
  KernelPath linear_path;
  KernelPath site_path;
  PackBatch* packs;  // refilled before each step, as all below but the mid store
  AttentionInputs* lower;
  AttentionInputs* upper;  // null: lower is all layers
  Tensor mid_store;        // F32 [n_embd, n] of the lower group; null: not split
  int split;               // the last layer of the lower group
  kernels::HeadOp head;
};

/// A built graph with its inputs and outputs; the ones its key does not have are null.
struct StepGraph {
  StepGraph(const GraphKey& graph_key, const GraphParts& parts, const Backend& backend);

  GraphKey key;
  Graph graph;
  Tensor token_ids = nullptr;   // I32 [n_rows]
  Tensor out_rows = nullptr;    // I32 [n_out]; null when every row is wanted
  std::optional<MidRows> mid;   // empty when the layers are not split
  Tensor targets = nullptr;     // I32 [n_out]
  Tensor head_input = nullptr;  // F32 [n_embd, n_out], kHeadOnly
  ReferenceInputs lower_reference;
  ReferenceInputs upper_reference;
  ReferenceAttention* reference_attention = nullptr;  // null: the fused one
  Tensor normed = nullptr;                            // [n_embd, n_out]
  Tensor logits = nullptr;                            // [n_vocab, n_out]
  Tensor logprobs = nullptr;                          // [n_out]
  Tensor hidden = nullptr;                            // [n_embd, n_rows]
  TapPoint tap{-1};                                   // its rows: null without a tap
  ReferencePackSites* reference_sites = nullptr;      // reference sites only: inputs to be filled

 private:
  void build(const GraphParts& parts);
  ForwardArgs add_inputs(GraphBuilder& g, const GraphParts& parts);
  void add_attention(GraphBuilder& g, const GraphParts& parts);
  void add_mid(GraphBuilder& g, const GraphParts& parts);
  void add_sites(const GraphParts& parts);
  void build_end(GraphBuilder& g, const GraphParts& parts, const ForwardArgs& args);
  std::unique_ptr<AttentionPath> attention_;
  std::unique_ptr<LayerHook> sites_;  // null: the plain base
};

}  // namespace modularbase
