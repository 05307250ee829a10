#include "modularbase/engine/model_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "modularbase/core/errors.h"
#include "modularbase/kernels/attention_scratch.h"

namespace modularbase {
namespace {

constexpr std::int64_t kMaxShortlistRows =
    16;  // beyond, the full product costs less than the screen
constexpr std::size_t kMaxGraphs = 24;
constexpr std::size_t kMaxGraphBytes = std::size_t{24} << 20;
constexpr std::int64_t kReferenceKvPad =
    256;  // reference graphs are rebuilt every so many positions

std::vector<float> rope_frequencies(const Model& model) {
  const ModelConfig& c = model.config;
  std::vector<float> factors(static_cast<std::size_t>(c.rope_dim / 2), 1.0f);
  if (model.rope_factors) {
    ggml_backend_tensor_get(model.rope_factors, factors.data(), 0, factors.size() * sizeof(float));
  }
  std::vector<float> frequencies(factors.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(c.rope_dim);
    frequencies[i] = static_cast<float>(std::pow(static_cast<double>(c.rope_freq_base), exponent) *
                                        c.rope_freq_scale / factors[i]);
  }
  return frequencies;
}

// An input that the graph does not use (a hidden state before any attention) has no memory.
template <class T>
void set_input(Tensor tensor, const std::vector<T>& values) {
  if (tensor && tensor->buffer)
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

void get_output(Tensor tensor, std::vector<float>& values) {
  values.resize(static_cast<std::size_t>(ggml_nelements(tensor)));
  ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
}

}  // namespace

ModelRunner::ModelRunner(const Model& model, Backend& backend, KvCache& cache,
                         const ResolvedOptions& options)
    : model_(model),
      backend_(backend),
      cache_(cache),
      options_(options),
      rope_frequencies_(rope_frequencies(model)),
      workspace_(kernels::make_head_workspace()),
      scratch_(std::make_unique<kernels::AttentionScratch>()),
      queries_(kMaxShortlistRows) {
  const Tensor head = model.output.weight;
  if (options.head == HeadPath::kCertified && backend.is_cpu()) {
    head_weight_ = {head->type, head->data, head->ne[0], head->ne[1],
                    static_cast<const float*>(model.output_norm->data)};
    screen_ = kernels::HeadScreen::build(head_weight_, backend.n_threads());
  }
  const bool fused = backend.is_cpu();
  const bool fused_attention = fused && kernels::attention_supported(model.config.head_dim);
  parts_ = {.model = &model,
            .memory = &cache.memory(),
            .attention_path = fused_attention ? options.attention : KernelPath::kReference,
            .linear_path = fused ? options.linear : KernelPath::kReference,
            .hook = nullptr,
            .batch = &batch_,
            .scratch = scratch_.get(),
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
  GraphKey key{GraphEnd::kLogits, plan.n_rows, n_out, 0, 0};
  if (parts_.attention_path == KernelPath::kReference) {
    for (const StepSpan& span : plan.spans) {
      key.n_kv += span.pos0 + static_cast<std::int64_t>(span.tokens.size());
    }
    key.n_kv = (key.n_kv + kReferenceKvPad - 1) / kReferenceKvPad * kReferenceKvPad;
  }
  if (plan.output == StepOutput::kHidden) {
    key.end = GraphEnd::kHidden;
    key.n_out = plan.n_rows;
    key.hidden_layer = plan.hidden_layer;
  } else if (n_out == 0) {
    key.end = GraphEnd::kCacheOnly;
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
  StepGraph& step = graph_for(key_of(plan));
  fill_batch(plan);
  fill_inputs(step, plan);
  step.graph.compute(backend_);
  read_outputs(step);
}

void ModelRunner::fill_batch(const StepPlan& plan) {
  const std::size_t n_pairs = rope_frequencies_.size();
  rope_cos_.resize(n_pairs * static_cast<std::size_t>(plan.n_rows));
  rope_sin_.resize(rope_cos_.size());
  spans_.clear();
  token_ids_.clear();
  std::size_t at = 0;
  for (const StepSpan& span : plan.spans) {
    spans_.push_back({static_cast<std::int32_t>(token_ids_.size()),
                      static_cast<std::int32_t>(span.tokens.size()),
                      static_cast<std::int32_t>(span.pos0), span.sequence->blocks.data()});
    token_ids_.insert(token_ids_.end(), span.tokens.begin(), span.tokens.end());
    for (std::size_t row = 0; row < span.tokens.size(); ++row) {
      const auto position = static_cast<float>(span.pos0 + static_cast<std::int64_t>(row));
      for (std::size_t i = 0; i < n_pairs; ++i, ++at) {
        rope_cos_[at] = std::cos(position * rope_frequencies_[i]);
        rope_sin_[at] = std::sin(position * rope_frequencies_[i]);
      }
    }
  }
  batch_ = {spans_.data(), static_cast<int>(spans_.size()), plan.n_rows, rope_cos_.data(),
            rope_sin_.data()};
  scratch_->plan(batch_, model_.config.n_head, model_.config.n_head_kv, model_.config.head_dim);
}

void ModelRunner::fill_inputs(StepGraph& step, const StepPlan& plan) {
  set_input(step.token_ids, token_ids_);
  set_input(step.out_rows, plan.out_rows);
  set_input(step.targets, plan.targets);
  if (step.reference.mask) fill_reference(step, plan);
  if (step.key.end == GraphEnd::kShortlist) {
    std::copy_n(plan.queries.begin(), step.key.n_out, queries_.begin());
  }
}

void ModelRunner::fill_reference(StepGraph& step, const StepPlan& plan) {
  const std::int64_t n_head_kv = model_.config.n_head_kv;
  const std::int64_t block_rows = cache_.memory().geometry().block_rows();
  const std::int64_t n_kv = step.key.n_kv;
  constexpr std::int64_t kBlock = kernels::kBlockTokens;
  const auto cache_row = [&](const StepSpan& span, std::int64_t position, std::int64_t head) {
    const BlockId block = span.sequence->blocks[static_cast<std::size_t>(position / kBlock)];
    return block * block_rows + head * kBlock + position % kBlock;
  };
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> write_rows;
  // Padding reads a row that is always written, so that masked garbage is never NaN.
  std::vector<std::int32_t> read_rows(static_cast<std::size_t>(n_kv * n_head_kv),
                                      static_cast<std::int32_t>(cache_row(plan.spans[0], 0, 0)));
  std::vector<float> mask(static_cast<std::size_t>(n_kv * plan.n_rows),
                          -std::numeric_limits<float>::infinity());
  std::int64_t row = 0;
  std::int64_t kv0 = 0;
  for (const StepSpan& span : plan.spans) {
    const std::int64_t end = span.pos0 + static_cast<std::int64_t>(span.tokens.size());
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
  set_input(step.reference.positions, positions);
  set_input(step.reference.write_rows, write_rows);
  set_input(step.reference.read_rows, read_rows);
  set_input(step.reference.mask, mask);
}

void ModelRunner::read_outputs(StepGraph& step) {
  is_shortlist_ = step.key.end == GraphEnd::kShortlist;
  if (is_shortlist_) read_shortlists(step);
  if (step.logits) get_output(step.logits, dense_);
  if (step.logprobs) get_output(step.logprobs, logprobs_);
  if (step.hidden) get_output(step.hidden, hidden_);
}

void ModelRunner::read_shortlists(StepGraph& step) {
  const auto rows = kernels::head_rows(*workspace_);
  const auto n_failed = std::count_if(rows.begin(), rows.begin() + step.key.n_out,
                                      [](const kernels::HeadRow& row) { return !row.certified; });
  if (n_failed == 0) return;
  n_head_fallbacks_ += n_failed;
  get_output(step.normed, normed_);
  StepGraph& head = graph_for({GraphEnd::kHeadOnly, 0, step.key.n_out, 0, 0});
  set_input(head.head_input, normed_);
  head.graph.compute(backend_);
  get_output(head.logits, dense_);
  is_shortlist_ = false;
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
