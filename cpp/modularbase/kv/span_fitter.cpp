#include "modularbase/kv/span_fitter.h"

#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "modularbase/core/errors.h"

namespace modularbase {
namespace {

const kernels::SlotFit kNoLoss{};

}  // namespace

SpanFitter::SpanFitter(const PastPlan& plan, const LocatedPast& located, const FitQueries& queries,
                       std::int64_t n_head)
    : plan_(plan),
      located_(located),
      queries_(queries),
      n_head_(n_head),
      fits_(plan.spans.size()) {}

void SpanFitter::load_queries(const LayerView& layer, std::int64_t head) {
  const kernels::QueryWindow& window = layer.is_upper ? *queries_.upper : *queries_.lower;
  const std::int64_t head_dim = layer.kv.head_dim;
  const std::int64_t group = n_head_ / layer.kv.n_head_kv;
  query_rows_.resize(queries_.rows.size() * static_cast<std::size_t>(group * head_dim));
  log_mass_.clear();
  float* to = query_rows_.data();
  for (const std::int32_t row : queries_.rows) {
    const std::int64_t first_head =
        (std::int64_t{layer.in_group} * window.n_rows + row) * n_head_ + head * group;
    const auto* from = reinterpret_cast<const ggml_fp16_t*>(window.queries + first_head * head_dim);
    ggml_cpu_fp16_to_fp32(from, to, group * head_dim);
    to += group * head_dim;
    log_mass_.insert(log_mass_.end(), window.log_mass + first_head,
                     window.log_mass + first_head + group);
  }
}

void SpanFitter::load_span(const LayerView& layer, const SlotSpan& span, std::int64_t head,
                           TileReader& reader) {
  keys_.clear();
  values_.clear();
  add_span(layer, span, head, reader);
}

void SpanFitter::add_span(const LayerView& layer, const SlotSpan& span, std::int64_t head,
                          TileReader& reader) {
  const auto first = located_.places.begin() + span.start;
  for (const PastSource& source : std::span(first, static_cast<std::size_t>(span.n_tokens))) {
    const TokenPlace& place = layer.is_upper ? source.upper : source.lower;
    const float* key = reader.key(place, head);
    const float* value = reader.value(place, head);
    keys_.insert(keys_.end(), key, key + layer.kv.head_dim);
    values_.insert(values_.end(), value, value + layer.kv.head_dim);
  }
}

kernels::SlotFitArgs SpanFitter::args(const SlotSpan& span, std::int64_t head_dim) const {
  return {.head_dim = head_dim,
          .n_keys = span.n_tokens,
          .n_queries = std::ssize(log_mass_),
          .n_slots = span.n_slots,
          .keys = keys_.data(),
          .values = values_.data(),
          .queries = query_rows_.data(),
          .log_mass = log_mass_.data(),
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

void SpanFitter::receive(const LayerView& layer, std::span<float> received) {
  TileReader reader(layer.kv);
  std::vector<double> sums(plan_.spans.size(), 0.0);
  std::vector<float> of_keys;
  for (std::int64_t head = 0; head < layer.kv.n_head_kv; ++head) {
    load_queries(layer, head);
    for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
      const SlotSpan& span = plan_.spans[i];
      if (!is_whole(located_, span)) continue;
      load_span(layer, span, head, reader);
      of_keys.assign(static_cast<std::size_t>(span.n_tokens), 0.0f);
      kernels::attention_received(args(span, layer.kv.head_dim), room_, of_keys.data());
      for (const float share : of_keys) sums[i] += share;
    }
  }
  const auto n_queries = static_cast<double>(std::ssize(log_mass_) * layer.kv.n_head_kv);
  for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
    const SlotSpan& span = plan_.spans[i];
    if (is_whole(located_, span)) {
      received[i] = static_cast<float>(sums[i] / (n_queries * span.n_tokens));
    }
  }
}

void SpanFitter::expect(const LayerView& layer, const QueryPositions& positions,
                        const KeyShift& shift, std::span<float> expected) {
  TileReader reader(layer.kv);
  std::vector<double> sums(plan_.spans.size(), 0.0);
  std::vector<float> of_keys;
  for (std::int64_t head = 0; head < layer.kv.n_head_kv; ++head) {
    load_queries(layer, head);
    keys_.clear();
    values_.clear();
    for (const SlotSpan& span : plan_.spans) {
      if (is_whole(located_, span)) add_span(layer, span, head, reader);
    }
    const kernels::ExpectedAttentionArgs args = expectation(layer, positions, shift);
    of_keys.resize(static_cast<std::size_t>(args.n_keys));
    kernels::expected_attention(args, expected_room_, of_keys.data());
    auto next = of_keys.begin();
    for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
      if (!is_whole(located_, plan_.spans[i])) continue;
      const auto end = next + plan_.spans[i].n_tokens;
      sums[i] = std::accumulate(next, end, sums[i]);
      next = end;
    }
  }
  for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
    const SlotSpan& span = plan_.spans[i];
    const auto n_keys = static_cast<double>(layer.kv.n_head_kv * span.n_tokens);
    if (is_whole(located_, span)) expected[i] = static_cast<float>(sums[i] / n_keys);
  }
}

kernels::ExpectedAttentionArgs SpanFitter::expectation(const LayerView& layer,
                                                       const QueryPositions& positions,
                                                       const KeyShift& shift) const {
  return {.head_dim = layer.kv.head_dim,
          .n_keys = std::ssize(keys_) / layer.kv.head_dim,
          .n_heads = n_head_ / layer.kv.n_head_kv,
          .n_rows = std::ssize(queries_.rows),
          .keys = keys_.data(),
          .values = values_.data(),
          .queries = query_rows_.data(),
          .positions = positions.asked.data(),
          .first_ahead = positions.first_ahead,
          .n_ahead = positions.n_ahead,
          .frequencies = shift.frequencies().data(),
          .rope_dim = 2 * std::ssize(shift.frequencies()),
          .style = shift.style(),
          .scale = 1.0f / std::sqrt(static_cast<float>(layer.kv.head_dim))};
}

void SpanFitter::fit(const LayerView& layer) {
  n_head_kv_ = layer.kv.n_head_kv;
  TileReader reader(layer.kv);
  for (std::int64_t head = 0; head < n_head_kv_; ++head) {
    if (!layer.kv.tiers[kernels::kRedundantTier].has(head)) {  // it keeps the tokens themselves
      for (auto& fits : fits_) fits.emplace_back(kNoLoss);
      continue;
    }
    const bool has_queries = queries_.lower && !queries_.rows.empty();
    if (has_queries) load_queries(layer, head);
    for (std::size_t i = 0; i < plan_.spans.size(); ++i) {
      const SlotSpan& span = plan_.spans[i];
      const bool can = has_queries && span.n_slots > 0 && is_whole(located_, span);
      if (can) load_span(layer, span, head, reader);
      fits_[i].push_back(can ? kernels::fit_slots(args(span, layer.kv.head_dim), room_)
                             : std::nullopt);
    }
  }
}

float SpanFitter::error(std::size_t span) const {
  if (!is_whole(located_, plan_.spans[span])) return std::numeric_limits<float>::infinity();
  if (plan_.spans[span].n_slots == 0) return 0.0f;  // nothing shall stand for it
  double sum = 0.0;
  for (const auto& fit : fits_[span]) {
    if (!fit) return std::numeric_limits<float>::infinity();
    sum += fit->error * fit->share;  // of the whole output, not only of the span's part
  }
  return static_cast<float>(sum / static_cast<double>(fits_[span].size()));
}

const kernels::SlotFit& SpanFitter::fitted(std::size_t span, const LayerView& layer,
                                           std::int64_t head) const {
  const std::size_t at = layer.order * static_cast<std::size_t>(n_head_kv_);
  const auto& fit = fits_[span].at(at + static_cast<std::size_t>(head));
  if (!fit) throw Error("kv span " + std::to_string(span) + ": expected a fit, found none");
  return *fit;
}

}  // namespace modularbase
