#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/adapters/pack_batch.h"
#include "modularbase/core/head_query.h"
#include "modularbase/engine/sequence_window.h"
#include "modularbase/kv/kv_cache.h"

namespace modularbase {

/// What a step computes of its output rows.
enum class StepOutput {
  kLogits,          // what each row's query asks of the logits
  kTargetLogprobs,  // ln p(target) of each row
  kHidden,          // the residual stream at a layer (n_layer + 1: after the output norm), all rows
};

/// Consecutive positions of one sequence and their tokens.
struct StepSpan {
  const KvSequence* sequence;
  std::uint64_t sequence_id;
  std::int64_t pos0;
  std::span<const TokenId> tokens;
  const PackSet* packs = nullptr;          // null: the plain base
  std::int64_t packs_from = 0;             // positions before it are the plain base
  const SequenceWindow* window = nullptr;  // null: nobody wants its queries
};

/// One forward pass over rows of many requests, as the scheduler decided it; vectors are reused.
struct StepPlan {
  StepOutput output = StepOutput::kLogits;
  int hidden_layer = 0;
  int tap_layer = -1;               // whose entering rows are read, too; -1: none
  std::vector<StepSpan> spans;      // token rows, through all layers
  std::vector<StepSpan> mid_spans;  // positions that the lower group knows: the layers above only
  std::int64_t n_rows = 0;          // of spans
  std::int64_t n_mid_rows = 0;      // of mid_spans; behind the token rows in the batch
  std::vector<std::int32_t> out_rows;  // ascending token rows whose output is wanted
  std::vector<HeadQuery> queries;      // kLogits: one per out row; may be longer (reused storage)
  std::vector<TokenId> targets;        // kTargetLogprobs: one per out row
  bool wants_states = false;           // the out rows' states after the output norm are read, too

  /// The last n token rows so far have outputs, of which this is asked.
  void add_last_outputs(std::int64_t n, const HeadQuery& query) {
    for (std::int64_t row = n_rows - n; row < n_rows; ++row) {
      const std::size_t at = out_rows.size();
      out_rows.push_back(static_cast<std::int32_t>(row));
      if (queries.size() <= at) queries.resize(at + 1);
      queries[at] = query;
    }
  }

  void clear() {
    output = StepOutput::kLogits;
    spans.clear();
    mid_spans.clear();
    n_rows = 0;
    n_mid_rows = 0;
    out_rows.clear();
    targets.clear();
    wants_states = false;
  }
};

}  // namespace modularbase
