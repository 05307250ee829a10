#include "modularbase/engine/attention_inputs.h"

#include <algorithm>
#include <limits>

namespace modularbase {
namespace {

constexpr std::int64_t kBlock = kernels::kBlockTokens;

}  // namespace

ReferenceInputs AttentionInputs::reference(GraphBuilder& g, std::int64_t n_rows,
                                           std::int64_t n_kv) const {
  ReferenceInputs inputs{.group = &group_};
  if (n_rows == 0) return inputs;
  const std::int64_t n_head_kv = memory_.geometry().n_head_kv;
  inputs.positions = g.input("positions", GGML_TYPE_I32, n_rows);
  inputs.write_rows = g.input("write_rows", GGML_TYPE_I64, n_head_kv * n_rows);
  inputs.read_rows = g.input("read_rows", GGML_TYPE_I32, n_kv * n_head_kv);
  inputs.mask = g.input("mask", GGML_TYPE_F32, n_kv, n_rows);
  return inputs;
}

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
  const KvGeometry& geometry = memory_.geometry();
  const kernels::KvSegment* segments = segments_.data();
  for (kernels::AttentionSpan& span : spans_) {
    span.segments = segments;
    segments += span.n_segments;
  }
  batch_ = {spans_.data(), static_cast<int>(spans_.size()), n_rows_, rope.cos.data(),
            rope.sin.data()};
  scratch_.plan(batch_, n_head, geometry.n_head_kv, geometry.head_dim);
}

std::int64_t AttentionInputs::cache_row(const kernels::AttentionSpan& span, std::int64_t position,
                                        std::int64_t head) const {
  const std::int64_t block = span.block_table[position / kBlock];
  return block * memory_.geometry().block_rows() + head * kBlock + position % kBlock;
}

void AttentionInputs::fill(const ReferenceInputs& inputs) const {
  if (!inputs.mask) return;
  const std::int64_t n_head_kv = memory_.geometry().n_head_kv;
  const std::int64_t n_kv = inputs.mask->ne[0];
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> write_rows;
  // Padding reads a row that is always written, so that masked garbage is never NaN.
  std::vector<std::int32_t> read_rows(static_cast<std::size_t>(n_kv * n_head_kv),
                                      static_cast<std::int32_t>(cache_row(spans_[0], 0, 0)));
  std::vector<float> mask(static_cast<std::size_t>(n_kv * n_rows_),
                          -std::numeric_limits<float>::infinity());
  std::int64_t row = 0;
  std::int64_t kv0 = 0;
  for (const kernels::AttentionSpan& span : spans_) {
    const std::int64_t end = span.pos0 + span.n_rows;
    for (std::int64_t position = 0; position < end; ++position) {
      for (std::int64_t head = 0; head < n_head_kv; ++head) {
        read_rows[static_cast<std::size_t>(head * n_kv + kv0 + position)] =
            static_cast<std::int32_t>(cache_row(span, position, head));
      }
    }
    for (std::int64_t position = span.pos0; position < end; ++position, ++row) {
      positions.push_back(static_cast<std::int32_t>(position));
      for (std::int64_t head = 0; head < n_head_kv; ++head) {
        write_rows.push_back(cache_row(span, position, head));
      }
      std::fill_n(mask.begin() + row * n_kv + kv0, position + 1, 0.0f);
    }
    kv0 += end;
  }
  set_input(inputs.positions, positions);
  set_input(inputs.write_rows, write_rows);
  set_input(inputs.read_rows, read_rows);
  set_input(inputs.mask, mask);
}

}  // namespace modularbase
