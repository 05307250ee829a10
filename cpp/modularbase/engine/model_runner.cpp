#include "modularbase/engine/model_runner.h"

#include <algorithm>
#include <cmath>

#include "modularbase/core/errors.h"
#include "modularbase/models/rope_frequencies.h"

namespace modularbase {
namespace {

constexpr std::int64_t kMaxShortlistRows =
    16;  // beyond, the full product costs less than the screen
constexpr std::size_t kMaxGraphs = 24;
constexpr std::size_t kMaxGraphBytes = std::size_t{24} << 20;

// The rows of the mid store that hold the span's tokens.
template <class Id>
void append_mid_ids(const StepSpan& span, std::vector<Id>& ids) {
  constexpr std::int64_t kBlock = kernels::kBlockTokens;
  for (std::int64_t row = 0; row < std::ssize(span.tokens); ++row) {
    const std::int64_t position = span.pos0 + row;
    const std::int64_t block = span.sequence->lower[static_cast<std::size_t>(position / kBlock)];
    ids.push_back(static_cast<Id>(block * kBlock + position % kBlock));
  }
}

void get_output(Tensor tensor, std::vector<float>& values) {
  values.resize(static_cast<std::size_t>(ggml_nelements(tensor)));
  ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
}

}  // namespace

ModelRunner::ModelRunner(const Model& model, Backend& backend, const KvCache& cache,
                         const ResolvedOptions& options)
    : model_(model),
      backend_(backend),
      options_(options),
      rope_frequencies_(rope_frequencies(model)),
      workspace_(kernels::make_head_workspace()),
      lower_(cache.lower()),
      queries_(kMaxShortlistRows) {
  const Tensor head = model.output.weight;
  if (options.head == HeadPath::kCertified && backend.is_cpu()) {
    head_weight_ = {head->type, head->data, head->ne[0], head->ne[1],
                    static_cast<const float*>(model.output_norm->data)};
    screen_ = kernels::HeadScreen::build(head_weight_, backend.n_threads());
  }
  if (cache.upper()) upper_.emplace(*cache.upper());
  const bool fused = backend.is_cpu();
  parts_ = {.model = &model,
            .attention_path = attention_path(options, model.config.head_dim, backend),
            .linear_path = fused ? options.linear : KernelPath::kReference,
            .site_path = fused ? options.sites : KernelPath::kReference,
            .packs = &packs_,
            .lower = &lower_,
            .upper = upper_ ? &*upper_ : nullptr,
            .mid_store = cache.lower().memory().mid(),
            .split = static_cast<int>(cache.lower().memory().geometry().n_layer) - 1,
            .head = {&head_weight_, screen_.get(), queries_.data(), workspace_.get()}};
}

ModelRunner::~ModelRunner() = default;

std::size_t ModelRunner::graph_bytes() const {
  std::size_t n = 0;
  for (const StepGraph& step : graphs_) n += step.graph.n_bytes();
  return n;
}

GraphKey ModelRunner::key_of(const StepPlan& plan) const {
  const auto n_out = static_cast<std::int64_t>(plan.out_rows.size());
  GraphKey key{.end = GraphEnd::kLogits,
               .n_rows = plan.n_rows,
               .n_mid_rows = plan.n_mid_rows,
               .n_out = n_out,
               .tap_layer = plan.tap_layer};
  if (!packs_.empty()) {
    const bool is_fused = parts_.site_path == KernelPath::kFused;
    key.packs = is_fused ? packs_.key() : packs_.padded_key();
  }
  if (parts_.attention_path == KernelPath::kReference) {
    key.attention = reference_shape(upper_ ? *upper_ : lower_);  // the upper group has all rows
  }
  if (plan.output == StepOutput::kHidden) {
    key.end = GraphEnd::kHidden;
    key.n_out = plan.n_rows;
    key.hidden_layer = plan.hidden_layer;
  } else if (n_out == 0) {
    key.end = GraphEnd::kCacheOnly;
    key.keeps_queries = std::ranges::any_of(
        plan.spans, [](const StepSpan& span) { return span.window != nullptr; });
  } else if (plan.output == StepOutput::kTargetLogprobs) {
    key.end = GraphEnd::kTargetLogprobs;
  } else if (screen_ && n_out <= kMaxShortlistRows &&
             std::none_of(plan.queries.begin(), plan.queries.begin() + n_out,
                          [](const HeadQuery& query) { return query.all; })) {
    key.end = GraphEnd::kShortlist;
  }
  return key;
}

StepGraph& ModelRunner::graph_for(const GraphKey& key) {
  const auto known = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const StepGraph& step) { return step.key == key; });
  if (known != graphs_.end()) {
    graphs_.splice(graphs_.begin(), graphs_, known);
  } else {
    graphs_.emplace_front(key, parts_, backend_);
    trim_graphs();
  }
  return graphs_.front();
}

void ModelRunner::trim_graphs() {
  while (graphs_.size() > 1 && (graphs_.size() > kMaxGraphs || graph_bytes() > kMaxGraphBytes)) {
    graphs_.pop_back();
  }
}

void ModelRunner::run(const StepPlan& plan) {
  fill_packs(plan);
  fill_rows(plan);
  StepGraph& step = graph_for(key_of(plan));
  fill_inputs(step, plan);
  step.graph.compute(backend_);
  read_outputs(step, plan.wants_states);
}

void ModelRunner::fill_rows(const StepPlan& plan) {
  rope_.cos.clear();
  rope_.sin.clear();
  token_ids_.clear();
  lower_.clear();
  for (const StepSpan& span : plan.spans) {
    lower_.add(span, false);
    token_ids_.insert(token_ids_.end(), span.tokens.begin(), span.tokens.end());
    fill_rope(span);
  }
  for (const StepSpan& span : plan.mid_spans) fill_rope(span);
  lower_.finish(rope_, model_.config.n_head);
  if (!upper_) return;
  upper_->clear();
  for (const auto* spans : {&plan.spans, &plan.mid_spans}) {
    for (const StepSpan& span : *spans) upper_->add(span, true);
  }
  upper_->finish(rope_, model_.config.n_head);
}

void ModelRunner::fill_packs(const StepPlan& plan) {
  row_packs_.clear();
  for (const auto* spans : {&plan.spans, &plan.mid_spans}) {
    for (const StepSpan& span : *spans) {
      for (std::int64_t row = 0; row < std::ssize(span.tokens); ++row) {
        row_packs_.push_back(span.pos0 + row >= span.packs_from ? span.packs : nullptr);
      }
    }
  }
  packs_.fill(row_packs_, static_cast<std::size_t>(plan.n_rows), plan.out_rows);
  conflict_ = packs_.conflict(model_.config.n_layer);
}

void ModelRunner::fill_rope(const StepSpan& span) {
  for (std::int64_t row = 0; row < std::ssize(span.tokens); ++row) {
    const auto position = static_cast<float>(span.pos0 + row);
    for (const float frequency : rope_frequencies_) {
      rope_.cos.push_back(std::cos(position * frequency));
      rope_.sin.push_back(std::sin(position * frequency));
    }
  }
}

void ModelRunner::fill_inputs(StepGraph& step, const StepPlan& plan) {
  set_input(step.token_ids, token_ids_);
  set_input(step.out_rows, plan.out_rows);
  set_input(step.targets, plan.targets);
  fill_reference(step.lower_reference, lower_);
  if (upper_) fill_reference(step.upper_reference, *upper_);
  if (step.mid) fill_mid(*step.mid, plan);
  if (step.reference_sites) step.reference_sites->fill_inputs();
  if (step.key.end == GraphEnd::kShortlist) {
    std::copy_n(plan.queries.begin(), step.key.n_out, queries_.begin());
  }
}

void ModelRunner::fill_mid(const MidRows& mid, const StepPlan& plan) {
  std::vector<std::int64_t> write_ids;
  std::vector<std::int32_t> read_ids;
  for (const StepSpan& span : plan.spans) append_mid_ids(span, write_ids);
  for (const StepSpan& span : plan.mid_spans) append_mid_ids(span, read_ids);
  set_input(mid.write_ids, write_ids);
  set_input(mid.read_ids, read_ids);
}

void ModelRunner::read_outputs(StepGraph& step, bool wants_states) {
  is_shortlist_ = step.key.end == GraphEnd::kShortlist;
  if (is_shortlist_) read_shortlists(step);
  if (step.logits) get_output(step.logits, dense_);
  if (step.logprobs) get_output(step.logprobs, logprobs_);
  if (step.hidden) get_output(step.hidden, hidden_);
  tapped_.clear();
  if (step.tap.rows) get_output(step.tap.rows, tapped_);
  if (wants_states) get_output(step.normed, normed_);
  if (!step.reference_attention) return;
  keep_queries(step.reference_attention->queries(), lower_);
  if (upper_) keep_queries(step.reference_attention->queries(), *upper_);
}

void ModelRunner::read_shortlists(StepGraph& step) {
  const auto rows = kernels::head_rows(*workspace_);
  const auto n_failed = std::count_if(rows.begin(), rows.begin() + step.key.n_out,
                                      [](const kernels::HeadRow& row) { return !row.certified; });
  if (n_failed == 0) return;
  n_head_fallbacks_ += n_failed;
  get_output(step.normed, normed_);
  StepGraph& head = graph_for({.end = GraphEnd::kHeadOnly, .n_out = step.key.n_out});
  set_input(head.head_input, normed_);
  head.graph.compute(backend_);
  get_output(head.logits, dense_);
  is_shortlist_ = false;
}

std::span<const float> ModelRunner::states(std::size_t first, std::size_t n) const {
  const auto n_embd = static_cast<std::size_t>(model_.config.n_embd);
  return std::span(normed_).subspan(first * n_embd, n * n_embd);
}

LogitsView ModelRunner::logits(std::size_t i) const {
  if (is_shortlist_) {
    const kernels::HeadRow& row = kernels::head_rows(*workspace_)[i];
    return {row.ids, row.logits};
  }
  const auto n_vocab = static_cast<std::size_t>(model_.config.n_vocab);
  return {{}, std::span(dense_).subspan(i * n_vocab, n_vocab)};
}

}  // namespace modularbase
