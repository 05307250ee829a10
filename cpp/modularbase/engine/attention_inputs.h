#pragma once

#include <cstdint>
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

/// What the attention of one group of layers reads in a step, for either path: which rows belong to
/// which positions, and where in the group's memory those lie. Refilled before each step at a fixed
/// address. Engine thread only.
class AttentionInputs {
 public:
  explicit AttentionInputs(const KvGroup& group) : group_(group), memory_(group.memory()) {}

  /// What a fused graph is built with.
  FusedInputs fused() { return {&group_, &batch_, &scratch_}; }
  /// The same for the reference, as new inputs of a graph; no tensors when there are no rows.
  ReferenceInputs reference(GraphBuilder& g, std::int64_t n_rows, std::int64_t n_kv) const;

  void clear();
  /// The next rows of the step; is_upper tells which of a sequence's blocks this group's are.
  void add(const StepSpan& span, bool is_upper);
  /// All rows are there.
  void finish(const RopeTable& rope, std::int64_t n_head);
  void fill(const ReferenceInputs& inputs) const;

 private:
  std::int64_t cache_row(const kernels::AttentionSpan& span, std::int64_t position,
                         std::int64_t head) const;

  const KvGroup& group_;
  const KvMemory& memory_;
  std::vector<kernels::AttentionSpan> spans_;
  std::vector<kernels::KvSegment> segments_;  // of all spans, in order
  std::int64_t n_rows_ = 0;
  kernels::AttentionBatch batch_{};
  kernels::AttentionScratch scratch_;
};

/// Fills an input of a graph. One that the graph does not use (a hidden state before any attention)
/// has no memory, one that it does not have is null.
template <class T>
void set_input(Tensor tensor, const std::vector<T>& values) {
  if (tensor && tensor->buffer)
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

}  // namespace modularbase
