#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "modularbase/engine/step_graph.h"
#include "modularbase/sampling/sampler.h"

namespace modularbase {

/// Executes step plans: picks or builds the graph, fills its inputs, computes, and shows the
/// outputs. Engine thread only.
class ModelRunner {
 public:
  ModelRunner(const Model& model, Backend& backend, const KvCache& cache,
              const ResolvedOptions& options);
  ~ModelRunner();

  /// Runs one forward pass. The outputs stay readable until the next call.
  void run(const StepPlan& plan);

  /// kLogits: output row i, dense or an exact shortlist.
  LogitsView logits(std::size_t i) const;
  /// kTargetLogprobs: one per output row.
  std::span<const float> target_logprobs() const { return logprobs_; }
  /// kHidden: [n_embd, n_rows].
  std::span<const float> hidden() const { return hidden_; }
  /// The rows that entered the plan's tap_layer, [n_embd, n]: of its spans, and from the split on
  /// of its mid_spans. Empty where the step ended below, or without a tap.
  std::span<const float> tapped() const { return tapped_; }
  /// When the plan wants them: output rows after the output norm, [n_embd, n].
  std::span<const float> states(std::size_t first, std::size_t n) const;
  /// Mean cosine between the deltas of a row's packs [n_rows + n_mid_rows, n_layer]; empty when no
  /// row had two.
  std::span<const float> pack_conflict() const { return conflict_; }

  std::size_t graph_bytes() const;
  std::size_t screen_bytes() const { return screen_ ? screen_->n_bytes() : 0; }
  /// Rows whose shortlist the bound did not separate, so that the full product was computed.
  std::int64_t n_head_fallbacks() const { return n_head_fallbacks_; }

 private:
  GraphKey key_of(const StepPlan& plan) const;
  StepGraph& graph_for(const GraphKey& key);
  void trim_graphs();
  void fill_rows(const StepPlan& plan);
  void fill_rope(const StepSpan& span);
  void fill_inputs(StepGraph& step, const StepPlan& plan);
  void fill_packs(const StepPlan& plan);
  void fill_mid(const MidRows& mid, const StepPlan& plan);
  void read_outputs(StepGraph& step, bool wants_states);
  void read_shortlists(StepGraph& step);

  const Model& model_;
  Backend& backend_;
  const ResolvedOptions options_;
  std::vector<float> rope_frequencies_;  // [rope_dim / 2]

  std::unique_ptr<kernels::HeadScreen> screen_;
  kernels::HeadWeight head_weight_{};
  kernels::HeadWorkspacePtr workspace_;
  AttentionInputs lower_;
  std::optional<AttentionInputs> upper_;  // none: lower is all layers
  PackBatch packs_;
  std::vector<const PackSet*> row_packs_;
  std::span<float> conflict_;
  GraphParts parts_{};
  std::vector<HeadQuery> queries_;  // fixed address: the head node reads it
  std::list<StepGraph> graphs_;     // most recently used first

  RopeTable rope_;
  std::vector<TokenId> token_ids_;
  std::vector<float> dense_;     // [n_vocab, n_out]
  std::vector<float> logprobs_;  // [n_out]
  std::vector<float> hidden_;    // [n_embd, n_rows]
  std::vector<float> tapped_;
  std::vector<float> normed_;
  bool is_shortlist_ = false;
  std::int64_t n_head_fallbacks_ = 0;
};

}  // namespace modularbase
