#include "modularbase/engine/attention_inputs.h"

namespace modularbase {

void AttentionInputs::clear() {
  spans_.clear();
  segments_.clear();
  n_rows_ = 0;
}

void AttentionInputs::add(const StepSpan& span, bool is_upper) {
  const KvSequence& kv = *span.sequence;
  const kernels::QueryWindow* window = nullptr;
  if (span.window) window = is_upper ? &span.window->upper() : &span.window->lower();
  spans_.push_back({.row0 = static_cast<std::int32_t>(n_rows_),
                    .n_rows = static_cast<std::int32_t>(span.tokens.size()),
                    .pos0 = static_cast<std::int32_t>(span.pos0),
                    .block_table = is_upper ? kv.upper.data() : kv.lower.data(),
                    .first = static_cast<std::int32_t>(kv.past.n_positions),
                    .segments = nullptr,
                    .n_segments = static_cast<std::int32_t>(kv.past.blocks.size()),
                    .window = window});
  for (const PastBlock& block : kv.past.blocks) {
    segments_.push_back({block.visible, block.memory, is_upper ? block.upper : block.lower});
  }
  n_rows_ += std::ssize(span.tokens);
}

void AttentionInputs::finish(const RopeTable& rope, std::int64_t n_head) {
  const KvGeometry& geometry = group_.memory().geometry();
  const kernels::KvSegment* segments = segments_.data();
  for (kernels::AttentionSpan& span : spans_) {
    span.segments = segments;
    segments += span.n_segments;
  }
  batch_ = {spans_.data(), static_cast<int>(spans_.size()), n_rows_, rope.cos.data(),
            rope.sin.data()};
  scratch_.plan(batch_, n_head, geometry.n_head_kv, geometry.head_dim);
}

}  // namespace modularbase
