#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "modularbase/kernels/expected_attention.h"
#include "modularbase/kernels/slot_fit.h"
#include "modularbase/kv/key_shift.h"
#include "modularbase/kv/past_layout.h"

namespace modularbase {

/// The queries that a span's slots are fitted to; null: there are none, and nothing is fitted.
struct FitQueries {
  const kernels::QueryWindow* lower = nullptr;
  const kernels::QueryWindow* upper = nullptr;
  std::vector<std::int32_t> rows;  // of the windows: those of tokens behind the spans
};

/// Where queries were asked, and where those to come will be.
struct QueryPositions {
  std::vector<std::int32_t> asked;  // of each of FitQueries::rows
  std::int32_t first_ahead = 0;
  std::int32_t n_ahead = 0;
};

/// One layer of a group, as far as a compaction is concerned.
struct LayerView {
  kernels::KvLayer kv;
  bool is_upper = false;
  int in_group = 0;       // its number there
  std::size_t order = 0;  // and among all, as in the model
};

/// Fits the spans of a plan, a layer at a time. Engine thread only.
class SpanFitter {
 public:
  /// All outlive it.
  SpanFitter(const PastPlan& plan, const LocatedPast& located, const FitQueries& queries,
             std::int64_t n_head);

  /// In the layers' order.
  void fit(const LayerView& layer);
  /// The mean share of attention that the queries give to a token of each span in a layer; spans
  /// that are not whole are left out.
  void receive(const LayerView& layer, std::span<float> received);
  /// The mean over a span's tokens of what kernels::expected_attention gives, among the tokens of
  /// all spans that are whole; the others are left out.
  void expect(const LayerView& layer, const QueryPositions& positions, const KeyShift& shift,
              std::span<float> expected);
  /// The mean error of a span's fits, as a share of the queries' whole attention output; infinite
  /// where one could not be made.
  float error(std::size_t span) const;
  /// Of a span with a finite error.
  const kernels::SlotFit& fitted(std::size_t span, const LayerView& layer, std::int64_t head) const;

 private:
  void load_queries(const LayerView& layer, std::int64_t head);
  void load_span(const LayerView& layer, const SlotSpan& span, std::int64_t head,
                 TileReader& reader);
  /// Behind what is loaded.
  void add_span(const LayerView& layer, const SlotSpan& span, std::int64_t head,
                TileReader& reader);
  kernels::SlotFitArgs args(const SlotSpan& span,
                            std::int64_t head_dim) const;  // of what is loaded
  kernels::ExpectedAttentionArgs expectation(const LayerView& layer,
                                             const QueryPositions& positions,
                                             const KeyShift& shift) const;  // the same

  const PastPlan& plan_;
  const LocatedPast& located_;
  const FitQueries& queries_;
  const std::int64_t n_head_;
  std::int64_t n_head_kv_ = 0;
  std::vector<std::vector<std::optional<kernels::SlotFit>>> fits_;  // [span][layer * head]
  kernels::SlotFitRoom room_;
  kernels::ExpectedAttentionRoom expected_room_;
  std::vector<float> keys_;        // [head_dim, n_tokens] of a span, or of some
  std::vector<float> values_;      // the same
  std::vector<float> query_rows_;  // [head_dim, n_queries] of the query heads of a kv head
  std::vector<float> log_mass_;    // [n_queries]
};

}  // namespace modularbase
