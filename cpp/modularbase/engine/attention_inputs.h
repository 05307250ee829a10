#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "modularbase/engine/step_plan.h"
#include "modularbase/kernels/attention_scratch.h"
#include "modularbase/models/attention_path.h"

namespace modularbase {

/// The angles of a step's rows: [rope_dim / 2, n_rows] each.
struct RopeTable {
  std::vector<float> cos;
  std::vector<float> sin;
};

/// What the attention of one group of layers reads in a step, for either path (the other's is made
/// of it in reference_inputs.h): which rows belong to which positions, and where in the group's
/// memory those lie. Refilled before each step at a fixed address. Engine thread only.
class AttentionInputs {
 public:
  explicit AttentionInputs(const KvGroup& group) : group_(group) {}

  /// What a fused graph is built with.
  FusedInputs fused() { return {&group_, &batch_, &scratch_}; }
  const KvGroup& group() const { return group_; }
  std::span<const kernels::AttentionSpan> spans() const { return spans_; }
  std::int64_t n_rows() const { return n_rows_; }

  void clear();
  /// The next rows of the step; is_upper tells which of a sequence's blocks this group's are.
  void add(const StepSpan& span, bool is_upper);
  /// All rows are there.
  void finish(const RopeTable& rope, std::int64_t n_head);

 private:
  const KvGroup& group_;
  std::vector<kernels::AttentionSpan> spans_;
  std::vector<kernels::KvSegment> segments_;  // of all spans, in order
  std::int64_t n_rows_ = 0;
  kernels::AttentionBatch batch_{};
  kernels::AttentionScratch scratch_;
};

}  // namespace modularbase
