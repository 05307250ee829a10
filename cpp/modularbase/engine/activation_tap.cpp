#include "modularbase/engine/activation_tap.h"

#include <exception>

#include "modularbase/graph/graph_builder.h"

namespace modularbase {

using channel::TensorType;

ActivationTap::ActivationTap(const TapOptions& options, int layer, std::int64_t n_embd)
    : layer_(layer),
      n_embd_(static_cast<std::size_t>(n_embd)),
      ring_(options.channel, {n_embd, options.row_type, options.n_records}),
      narrow_(options.row_type == TensorType::kF16 ? n_embd_ : 0) {}

void ActivationTap::push(const StepPlan& plan, std::span<const float> rows) noexcept {
  const std::lock_guard lock(mutex_);
  if (!is_open()) return;
  try {
    push_spans(plan.spans, rows);
    push_spans(plan.mid_spans, rows);
  } catch (const std::exception& error) {
    last_error_ = error.what();
    is_open_ = false;
    ring_.close();
  }
}

// Takes what the spans have off the front of the rows, which may end before them.
void ActivationTap::push_spans(const std::vector<StepSpan>& spans, std::span<const float>& rows) {
  for (const StepSpan& span : spans) {
    for (std::size_t i = 0; i < span.tokens.size() && !rows.empty(); ++i) {
      const auto position = static_cast<std::uint32_t>(span.pos0 + static_cast<std::int64_t>(i));
      push_row({span.sequence_id, position, span.tokens[i]}, rows.first(n_embd_));
      rows = rows.subspan(n_embd_);
    }
  }
}

void ActivationTap::push_row(const channel::RecordHeader& from, std::span<const float> row) {
  auto bytes = std::as_bytes(row);
  if (!narrow_.empty()) {
    ggml_fp32_to_fp16_row(row.data(), narrow_.data(), static_cast<std::int64_t>(n_embd_));
    bytes = std::as_bytes(std::span(narrow_));
  }
  if (ring_.push(from, bytes)) {
    n_pushed_.fetch_add(1, std::memory_order_relaxed);
  } else {
    n_dropped_.fetch_add(1, std::memory_order_relaxed);
  }
}

void ActivationTap::close() noexcept {
  const std::lock_guard lock(mutex_);
  is_open_ = false;
  ring_.close();
}

std::string ActivationTap::last_error() const {
  const std::lock_guard lock(mutex_);
  return last_error_;
}

}  // namespace modularbase
